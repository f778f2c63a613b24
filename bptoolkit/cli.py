"""`bptoolkit COMMAND ...`, also `python -m bptoolkit`: each command is one module with `main(argv) -> exit status`."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "ops": ("bptoolkit.table", "the ops, and what each supports"),
    "verify": ("bptoolkit.verify.cli", "check an op's backward"),
    "bench": ("bptoolkit.bench.cli", "time, memory and error of an op beside torch's"),
    "kernels": (
        "bptoolkit.triton_kernels.cli",
        "compile the fused kernels for four parts, and print what they use",
    ),
    "fit": ("bptoolkit.fit", "train a recipe"),
    "recipes": ("bptoolkit.recipe", "the recipes"),
    "doctor": ("bptoolkit.doctor", "versions, devices, and what will run where and why"),
}


def usage() -> str:
    lines = [f"  {name:8} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: bptoolkit COMMAND [--help] ...", "", *lines])


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        Its exit status; 2 for a command that does not exist.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from bptoolkit import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"bptoolkit: there is no command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return int(import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0)
