"""Blocks of several layers, one a file; `bptoolkit.nn` has them all."""
