"""`python -m bptoolkit` is the `bptoolkit` command."""

from bptoolkit.cli import main

raise SystemExit(main())
