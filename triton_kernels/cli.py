"""`bptoolkit kernels`: compile every fused kernel for parts that need not be there, and print what it uses."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bptoolkit.table import between, markdown

BEGIN, END = "<!-- kernels: bptoolkit kernels --markdown docs/kernels.md -->", "<!-- end of kernels -->"
FIELDS = ("registers", "spilled", "shared", "instructions", "wide_loads", "wide_stores", "tensor_core")
PARTS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEADER = ["kernel", "registers", "spilled", "shared bytes", "instructions", "16-byte loads", "16-byte stores", "matrix"]


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown table of measurements "kernel @ part" -> what it uses: a row a kernel, parts side by side if they differ."""
    kernels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, entry in entries.items():
        kernel, part = name.split(" @ ")
        kernels.setdefault(kernel, {})[part] = entry
    found = {part for of in kernels.values() for part in of}
    parts = [p for p in PARTS if p in found]
    rows = []
    for kernel in sorted(kernels):
        cells = [[str(kernels[kernel][p][f]) if p in kernels[kernel] else "–" for p in parts] for f in FIELDS]
        rows.append([kernel, *(c[0] if len(set(c)) == 1 else " / ".join(c) for c in cells)])
    return f"{' / '.join(parts)}\n\n{markdown(HEADER, rows)}"


class Record:
    """What was measured, by kernel and part, in a file; a measurement holds for as long as its key does.

    Args:
        path: the JSON file; None keeps nothing.
        fresh: measure all of it again.
    """

    def __init__(self, path: Path | None, fresh: bool = False) -> None:
        self.path = path
        self.old: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() and not fresh else {}
        self.old.pop("triton", None)  # the version is in every key
        self.new: dict[str, Any] = {}

    def usage(self, spec: Any, part: str) -> Any:
        """What the kernel uses on the part: remembered, or measured now."""
        from bptoolkit.triton_kernels import aot

        name, key = f"{spec.label} @ {part}", aot.key(spec, aot.TARGETS[part])
        entry = self.old.get(name)
        if entry is None or entry["key"] != key:
            entry = {"key": key, **aot.compile_for(spec, aot.TARGETS[part])._asdict()}
        self.new[name] = entry
        return aot.Usage(**{k: v for k, v in entry.items() if k != "key"})

    def write(self, version: str, whole: bool) -> None:
        """Write what was measured; and what there was before, unless it was measured `whole`."""
        if self.path:
            kept = {"triton": version} | ({} if whole else self.old) | self.new
            lines = [f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept, key=lambda n: (n != "triton", n))]
            self.path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(argv: list[str]) -> int:
    """Exit status 0; 1 if a kernel does not compile or may not ship; 2 for one that does not exist, or without Triton."""
    parser = argparse.ArgumentParser(prog="bptoolkit kernels", description=__doc__)
    parser.add_argument("stems", nargs="*", metavar="KERNEL", help="files under triton_kernels; all by default")
    parser.add_argument("--part", action="append", help="sm_80, sm_90, sm_100 or gfx942; all by default; may be repeated")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="what was measured before; only what changed is compiled again"
    )
    parser.add_argument("--fresh", action="store_true", help="compile all of it again")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between its two marks in FILE as well")
    args = parser.parse_args(argv)
    try:
        import triton

        from bptoolkit.triton_kernels import aot
    except ImportError as error:
        print(f"bptoolkit kernels: Triton is not installed ({error})")
        return 2
    modules = {m.__name__.rpartition(".")[2]: m for m in aot.modules()}
    for given, known in ((args.stems, modules), (args.part or [], aot.TARGETS)):
        for name in given:
            if name not in known:
                print(f"bptoolkit kernels: there is no {name!r}; there are {', '.join(known)}")
                return 2
    stems, parts = args.stems or list(modules), args.part or list(aot.TARGETS)
    record, bad = Record(args.record, args.fresh), []
    for stem in stems:
        for part in parts:
            target = aot.TARGETS[part]
            for spec in aot.specs_for(modules[stem], part):
                try:
                    usage = record.usage(spec, part)
                    wrong = aot.problems(spec, target, usage)
                except Exception as error:  # a compiler's own, of many classes
                    bad.append(f"{spec.label} @ {part}: does not compile: {type(error).__name__}: {error}")
                    continue
                bad += [f"{spec.label} @ {part}: {w}" for w in wrong]
    text = f"triton {triton.__version__}\n\n{table(dict(sorted(record.new.items())))}"
    print(f"{text}\n")
    known = sum(bool(entry["spilled"]) for entry in record.new.values())
    said = f"{known} spill as spills.py knows" if known else "nothing spills"
    good = f"{len(record.new)} compilations: {said}, all fit, wide accesses and matrix instructions are there"
    print("\n".join(bad) or good)
    record.write(triton.__version__, whole=not args.stems and not args.part)
    if args.markdown:
        fresh, _ = between(args.markdown, BEGIN, END, text)
        args.markdown.write_text(fresh)
    return int(bool(bad))
