"""`bptoolkit verify OP ...`: check the backward of one op, several, or all."""

from __future__ import annotations

import argparse
import time

from bptoolkit.ops import OPS
from bptoolkit.verify import check
from bptoolkit.verify.properties import PROPERTIES


def main(argv: list[str]) -> int:
    """Exit status 0 if everything holds, 1 if not, 2 for an op that does not exist."""
    parser = argparse.ArgumentParser(prog="bptoolkit verify", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="op names; all by default")
    parser.add_argument("--calls", type=int, default=20, help="calls drawn per property (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per op (default 30)")
    parser.add_argument("--only", action="append", choices=list(PROPERTIES), help="judge this property; may be repeated")
    args = parser.parse_args(argv)
    unknown = [name for name in args.ops if name not in OPS]
    if unknown:
        print(f"bptoolkit verify: there is no op {unknown[0]!r}; there are {', '.join(OPS)}")
        return 2
    status = 0
    for name in args.ops or OPS:
        began = time.monotonic()
        report = check(OPS[name], properties=args.only, calls=args.calls, seed=args.seed, budget=args.budget)
        status |= not report.ok
        if report.ok:
            judged = f"{len(report.calls)} properties on {sum(report.calls.values())} calls"
            print(f"{name:32} ok      {judged}, {time.monotonic() - began:.1f} s", flush=True)
        else:
            print(report, flush=True)
    return int(status)
