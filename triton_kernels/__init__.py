"""Fused Triton kernels; same stem as the op they serve. Installs as `bptoolkit.triton_kernels`.

A kernel's module has the two rules of its op, `forward` and `backward`, with the eager rule's parameters; `unsupported`, which
says why it cannot take a call; and `specs`, what is compiled of it by the ahead-of-time gate (`aot`). Importing this package
imports no Triton.
"""

if __name__ == "triton_kernels":
    raise ImportError("this folder is bptoolkit.triton_kernels, not triton-lang's package of that name")

from bptoolkit.triton_kernels.interpreter import interpret as interpret
