"""`bptoolkit verify TARGET ...`: prove a backward right; score a test suite; judge a counterexample again.

A TARGET is an op (`linear`), `package.module:function`, or `file.py:Class`; no target at all means every op. What is no op
needs `--inputs`. Examples:

    bptoolkit verify linear
    bptoolkit verify mine.py:MyFunction --inputs "x: *B N -> *B N" --reference torch.nn.functional:silu
    bptoolkit verify mine.py:MyFunction --inputs "x: *B N -> *B N" --replay "cotangent_layout sizes=..."
    bptoolkit verify mine.py:MyFunction --mutate -- pytest tests/test_mine.py
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from bptoolkit.ops import OPS
from bptoolkit.verify import check, replay
from bptoolkit.verify.report import Report


class Usage(Exception):
    """The command line asks for something that is not there."""


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    p = argparse.ArgumentParser(
        prog="bptoolkit verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("targets", nargs="*", metavar="TARGET", help="op names, module:name or file.py:name; every op by default")
    p.add_argument(
        "--inputs", help="a shapes string, or module:name / file.py:name of example tensors or of a Hypothesis strategy"
    )
    p.add_argument("--reference", metavar="TARGET", help="plain torch, a function of the same arguments")
    p.add_argument(
        "--contract", action="append", default=[], metavar="NAME=VALUE", help="what is claimed: double_backward=False ..."
    )
    p.add_argument(
        "--only",
        action="append",
        metavar="PROPERTY",
        help="judge this property (with --mutate: plant this mutant); may be repeated",
    )
    p.add_argument("--quick", action="store_true", help="fewer calls, under three seconds for a small op")
    p.add_argument("--long", action="store_true", help="for a night: a thousand drawn calls and no time limit to speak of")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--budget", type=float, help="seconds per target")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the reports there as JSON")
    p.add_argument("--junit", type=Path, metavar="FILE", help="write the report there as JUnit XML (one target)")
    p.add_argument("--replay", metavar="LINE", help="judge one counterexample again")
    p.add_argument("--list", action="store_true", help="the properties, and the mistakes each catches")
    p.add_argument("--mutate", action="store_true", help="score your own tests: -- COMMAND runs them")
    p.add_argument("--timeout", type=float, help="with --mutate: seconds per run of the tests")
    return p


def main(argv: list[str]) -> int:
    """Exit status 0 if everything holds, 1 if not, 2 for what cannot be asked."""
    argv, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser().parse_args(argv)
    try:
        if args.list:
            return list_properties()
        if args.mutate:
            return _mutate(args, command)
        return _verify(args)
    except Usage as problem:
        print(f"bptoolkit verify: {problem}")
        return 2


def list_properties() -> int:
    """Print every property with its docstring."""
    from bptoolkit.verify.properties import PROPERTIES

    for name, judge in PROPERTIES.items():
        words = " ".join(inspect.cleandoc(judge.__doc__ or "").split())
        print(f"{name:20} {words}")
    return 0


def _mutate(args: argparse.Namespace, command: list[str]) -> int:
    if len(args.targets) != 1 or not command:
        raise Usage("--mutate takes one TARGET and the tests to score: verify file.py:Class --mutate -- pytest tests")
    from bptoolkit.verify.mutate import main as mutate

    return mutate(args.targets[0], command, timeout=args.timeout, only=args.only, seed=args.seed)


def _verify(args: argparse.Namespace) -> int:
    reports = []
    for text in args.targets or OPS:
        fn, inputs, reference = target_of(text, args)
        options: dict[str, Any] = {"reference": reference, "contract": contract_of(args.contract)}
        try:
            if args.replay:
                report = replay(args.replay, fn, inputs, **options)
            else:
                report = check(
                    fn,
                    inputs,
                    properties=args.only,
                    seed=args.seed,
                    quick=args.quick,
                    examples=1000 if args.long else None,
                    cases=200 if args.long else None,
                    budget=args.budget or (36_000.0 if args.long else None),
                    progress=_live(text),
                    **options,
                )
        except (TypeError, ValueError) as problem:
            if not str(problem).startswith(("verify:", "fn:", "contract")):
                raise
            raise Usage(str(problem).removeprefix("verify: ")) from None
        _live(text)("")
        reports.append(report)
        print(_line(text, report) if report.ok and len(args.targets) != 1 else report, flush=True)
    if args.json:
        args.json.write_text("[\n" + ",\n".join(r.to_json() for r in reports) + "\n]\n")
    if args.junit:
        args.junit.write_text(reports[0].to_junit())
    return int(not all(r.ok for r in reports))


def _line(text: str, report: Report) -> str:
    judged = f"{sum(bool(n) for n in report.calls.values())} properties on {sum(report.calls.values())} calls"
    return f"{text:32} ok      {judged}, {report.seconds:.1f} s"


def _live(text: str) -> Any:
    """A line that says what is being done, on a terminal; elsewhere nothing."""
    if not sys.stderr.isatty():
        return lambda line: None
    return lambda line: print(f"\r\033[K{text}: {line}" if line else "\r\033[K", end="", file=sys.stderr, flush=True)


def target_of(text: str, args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The function, its inputs and its reference, from the command line."""
    reference = named(args.reference) if args.reference else None
    if text in OPS:
        return OPS[text], None, reference
    if ":" not in text:
        raise Usage(f"there is no op {text!r}; there are {', '.join(OPS)}; anything else is module:name or file.py:name")
    fn = named(text)
    if args.inputs is None:
        raise Usage(f"{text} needs --inputs: a shapes string such as 'x: *B N -> *B N', or module:name of example tensors")
    is_shapes = "->" in args.inputs or ": " in args.inputs
    return fn, args.inputs if is_shapes else named(args.inputs), reference


def named(text: str) -> Any:
    """What `module:name` or `file.py:name` names; the name may have dots."""
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise Usage(f"{text!r} is neither module:name nor file.py:name")
    try:
        found: Any = _file(Path(place)) if place.endswith(".py") else import_module(place)
    except ImportError as problem:
        raise Usage(f"{text}: cannot import {place}: {problem}") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise Usage(f"{text}: {getattr(found, '__name__', place)} has no {part!r}")
        found = getattr(found, part)
    return found


def _file(path: Path) -> Any:
    """The module in a file, under the name of its stem, as `import` would have it from its folder."""
    if not path.is_file():
        raise Usage(f"there is no file {path}")
    loaded = sys.modules.get(path.stem)
    if getattr(loaded, "__file__", None) and Path(str(loaded.__file__)).resolve() == path.resolve():  # type: ignore[union-attr]
        return loaded
    sys.path.insert(0, str(path.resolve().parent))
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def contract_of(given: list[str]) -> dict[str, Any]:
    """The contract from NAME=VALUE words."""
    contract = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals:
            raise Usage(f"--contract takes NAME=VALUE, not {word!r}")
        try:
            contract[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            contract[name] = value
    return contract
