"""`bptoolkit verify TARGET --mutate -- COMMAND`: which mistakes in a backward would the user's own tests notice?

Generic mistakes (`bptoolkit.verify.mutants`) are planted into the target one at a time, and the tests are run. No file of the
user changes: the processes of the command find a `sitecustomize.py` first on PYTHONPATH, which plants the mistake when the
class is made, wherever its code comes from: an import, a script, a file that pytest has rewritten, a worker of pytest-xdist.
"""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bptoolkit.function import Rule
from bptoolkit.verify import mutants as mutants  # fills MUTANTS
from bptoolkit.verify.planting import MUTANTS, Mutant

SITE = '''"""Written by `bptoolkit verify --mutate` for one run of the tests: plants one mistake."""

import os, sys

HERE, MARKS, VERIFY, QUALNAME, MODULE, FILE, RULE, NAME, WHICH = {values!r}
if HERE in sys.path:
    sys.path.remove(HERE)
told = set()


def say(what):
    if what not in told:
        told.add(what)
        with open(os.path.join(MARKS, what), "w"):
            pass


def plant(cls):
    import types

    say("made")
    if "_bptoolkit_planted" not in sys.modules:
        package = types.ModuleType("_bptoolkit_planted")
        package.__path__ = [VERIFY]
        sys.modules["_bptoolkit_planted"] = package
    from _bptoolkit_planted import mutants, planting

    planting.plant(cls, NAME, WHICH, say)


def is_target(cls, frame):
    if cls.__qualname__ != QUALNAME:
        return False
    module = sys.modules.get(cls.__module__)
    files = frame.f_code.co_filename, getattr(module, "__file__", None) or ""
    return cls.__module__ == MODULE or any(os.path.realpath(f) == FILE for f in files)


def watch_functions(module):
    meta, init = module.FunctionMeta, module.FunctionMeta.__init__

    def __init__(cls, *args, **kwargs):
        init(cls, *args, **kwargs)
        if is_target(cls, sys._getframe(1)):
            plant(cls)

    meta.__init__ = __init__


def watch_rules(module):
    init = module.Rule.__init__

    def __init__(self, name, *args, **kwargs):
        init(self, name, *args, **kwargs)
        if name == RULE:
            plant(self.function)

    module.Rule.__init__ = __init__


class Finder:
    """Calls back once, right after the module that makes the target has been executed."""

    name, watch = ("bptoolkit.function", watch_rules) if RULE else ("torch.autograd.function", watch_functions)

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != cls.name:
            return None
        sys.meta_path.remove(cls)
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                cls.watch(module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)


def chain():
    """The sitecustomize that this one hides."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


chain()
'''

# The shell reads the variables it adds to, so that bptoolkit reads none. Tests stop at the first failure, and neither pytest
# nor Hypothesis remembers a failure that was planted.
SHELL = """
PYTHONPATH="$1${PYTHONPATH:+:$PYTHONPATH}"
PYTEST_ADDOPTS="${PYTEST_ADDOPTS:+$PYTEST_ADDOPTS }-x -o 'cache_dir=$2/pytest'"
HYPOTHESIS_STORAGE_DIRECTORY="$2/hypothesis"
export PYTHONPATH PYTEST_ADDOPTS HYPOTHESIS_STORAGE_DIRECTORY
shift 2
exec "$@"
"""


@dataclass(frozen=True)
class Target:
    """Where the Function is made: its qualified name, module and real file, or the name of the rule; and its inputs' names."""

    qualname: str
    module: str
    file: str
    rule: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run of the tests: exit status (None: it ran out of time), seconds, what was said, the output's last lines."""

    status: int | None
    seconds: float
    marks: frozenset[str]
    tail: str


@dataclass(frozen=True)
class Outcome:
    """One mutant's run. `status` is "killed", "timeout" (which counts as killed), "survived" or "not applicable"."""

    label: str
    mutant: Mutant
    status: str
    reached: bool
    seconds: float


def main(target: str, command: list[str], *, timeout: float | None = None, only: list[str] | None = None, seed: int = 0) -> int:
    """Score the tests that `command` runs.

    Args:
        target: `module:Class` or `file.py:Class`, an `autograd.Function`; or the place of a `bptoolkit.Rule`.
        command: runs the tests; exit status 0 means that they pass.
        timeout: seconds for one run; by default ten, and five times what the tests take as they are.
        only: names of mutants ("zero") or of one gradient's ("zero[w]"); all by default.
        seed: not used, no mutant is drawn; taken since every verify command takes it.

    Returns:
        0 if the tests notice every mistake, 1 if some survive, 2 if there is nothing to score.
    """
    from bptoolkit.verify.cli import Usage

    try:
        return _score(resolve(target), target, command, timeout, only)
    except Usage as problem:
        print(f"bptoolkit verify --mutate: {problem}", flush=True)
        return 2


def resolve(text: str) -> Target:
    """The target that a text names.

    Raises:
        Usage: it is nothing that has a backward to spoil.
    """
    from bptoolkit.ops import OPS
    from bptoolkit.verify.cli import Usage, named

    if text in OPS:
        rules = ", ".join(r.name for r in OPS[text].rules)
        raise Usage(f"{text} is an op; name the rule or Function that it runs, as module:NAME (its rules: {rules or 'none'})")
    found: Any = named(text)
    found = getattr(found, "__self__", found)  # MyFunction.apply
    if isinstance(found, Rule):
        return Target("", "", "", found.name, ("backend", *found.inputs))
    if not (isinstance(found, type) and issubclass(found, torch.autograd.Function)):
        kind = f"a {type(found).__name__}"
        raise Usage(
            f"{text} is {kind}: a mistake is planted into an autograd.Function (the class) or a bptoolkit Rule. "
            "Functions, modules, ops of torch.library and compiled functions are refused: name the Function that they call"
        )
    if "<locals>" in found.__qualname__:
        raise Usage(f"{text} is made inside a function; move the class to the top level of its module")
    if found.backward is torch.autograd.Function.backward and found.vjp is torch.autograd.Function.vjp:
        raise Usage(f"{text} has no backward")
    names = tuple(inspect.signature(found.forward).parameters)
    combined = found.setup_context is torch.autograd.Function.setup_context
    file = os.path.realpath(inspect.getfile(found))
    return Target(found.__qualname__, found.__module__, file, "", names[combined:])


def _score(target: Target, text: str, command: list[str], timeout: float | None, only: list[str] | None) -> int:
    from bptoolkit.verify.cli import Usage

    for name in only or ():
        if name.split("[")[0] not in MUTANTS:
            raise Usage(f"there is no mutant {name!r}; there are {', '.join(MUTANTS)}")
    harmless = _run(target, "harmless", None, command, timeout)
    if harmless.status != 0:  # then as they are, to say whose fault it is
        plain = _run(None, "", None, command, timeout)
        if plain.status != 0:
            raise Usage(f"the tests do not pass as they are ({_ended(plain)}):\n{plain.tail}")
        raise Usage(f"the tests do not bear a wrapper around backward ({_ended(harmless)}); leave out those:\n{harmless.tail}")
    if "made" not in harmless.marks:
        raise Usage(f"the tests never import {text}")
    if "called" not in harmless.marks:
        raise Usage(f"the tests never run this backward: {text}")
    limit = timeout or 10 + 5 * harmless.seconds
    if _run(target, "raises", None, command, limit).status == 0:
        raise Usage(f"the tests pass even if {text} raises in backward: they ignore its errors, or never run this backward")

    gradients = sorted(int(m.removeprefix("gradient-")) for m in harmless.marks if m.startswith("gradient-"))
    plans = list(_plans(target, gradients, only))
    if not plans:
        raise Usage(f"none of {', '.join(only or ())} exists for {text}, which has the gradients {_names(target, gradients)}")
    print(f"{text}: {len(plans)} mistakes, one run of the tests each, {harmless.seconds:.1f} s a run", flush=True)
    outcomes = []
    for label, chosen, which in plans:
        outcome = _judge(label, chosen, _run(target, chosen.name, which, command, limit))
        print(f"  {outcome.status:14}  {label:24} {outcome.seconds:6.1f} s  {chosen.words}", flush=True)
        outcomes.append(outcome)
    print("\n" + summary(outcomes), flush=True)
    return int(any(o.status == "survived" for o in outcomes))


def _names(target: Target, gradients: list[int]) -> str:
    return ", ".join(_name(target, k) for k in gradients)


def _name(target: Target, k: int) -> str:
    return target.names[k] if k < len(target.names) else str(k)


def _plans(target: Target, gradients: list[int], only: list[str] | None) -> Iterator[tuple[str, Mutant, int | None]]:
    for m in MUTANTS.values():
        for k in gradients if m.each else [None]:
            label = m.name if k is None else f"{m.name}[{_name(target, k)}]"
            if only is None or m.name in only or label in only:
                yield label, m, k


def _judge(label: str, m: Mutant, run: Run) -> Outcome:
    reached = "applied" in run.marks
    if run.status is None:
        status = "timeout"
    elif run.status != 0:
        status = "killed"
    elif reached or m.waits or "possible" in run.marks:
        status = "survived"
    else:
        status = "not applicable"
    return Outcome(label, m, status, reached, run.seconds)


def summary(outcomes: list[Outcome]) -> str:
    """The table by class, the score, and what each survivor was."""
    lines = [f"{'class':12} {'killed':>7} {'survived':>9} {'n/a':>4}"]
    for group in dict.fromkeys(o.mutant.group for o in outcomes):
        mine = [o.status for o in outcomes if o.mutant.group == group]
        killed = sum(s in ("killed", "timeout") for s in mine)
        lines.append(f"{group:12} {killed:7} {mine.count('survived'):9} {mine.count('not applicable'):4}")
    judged = [o for o in outcomes if o.status != "not applicable"]
    survivors = [o for o in judged if o.status == "survived"]
    killed = len(judged) - len(survivors)
    lines.append(f"score: {killed} of {len(judged)} mistakes noticed" + (f" ({killed / len(judged):.0%})" if judged else ""))
    late = [o.label for o in outcomes if o.status == "timeout"]
    lines += [f"counted as noticed, since the tests ran out of time: {', '.join(late)}"] if late else []
    for o in survivors:
        why = "" if o.reached else " (no test makes such a call)"
        lines += [f"\nsurvived {o.label}: {o.mutant.words}{why}", f"  a test that notices it: {o.mutant.advice}"]
    return "\n".join(lines)


def _run(target: Target | None, name: str, which: int | None, command: list[str], limit: float | None) -> Run:
    """The tests, run once; with a mutant planted if there is a target."""
    with _folder() as folder:
        site, marks, cache = (folder / n for n in ("site", "marks", "cache"))
        for made in (site, marks, cache):
            made.mkdir()
        if target is not None:
            verify = str(Path(__file__).parent)
            place = target.qualname, target.module, target.file, target.rule
            (site / "sitecustomize.py").write_text(
                SITE.replace("{values!r}", repr((str(site), str(marks), verify, *place, name, which)))
            )
        start = time.monotonic()
        with (folder / "output").open("w+b") as output:
            try:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", SHELL, "sh", str(site), str(cache), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that workers end with it
                )
                status = _wait(process, limit)
            finally:
                seconds = time.monotonic() - start
            tail = b"".join((folder / "output").read_bytes().splitlines(keepends=True)[-30:]).decode(errors="replace")
        return Run(status, seconds, frozenset(p.name for p in marks.iterdir()), tail)


def _wait(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="bptoolkit-mutate-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ended(run: Run) -> str:
    return "out of time" if run.status is None else f"exit status {run.status}"
