"""What a verification found: a `Report` to read, as text, JSON or JUnit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from xml.etree import ElementTree

from bptoolkit.verify.point import Point


@dataclass(frozen=True)
class Failure:
    """One property that does not hold, at the smallest point found that shows it.

    Attributes:
        property: its name.
        message: what differs, where, and by how much.
        point: the configuration.
        matters: per axis that has to be as it is: the values at which it fails, and those at which it passes.
        diagnosis: which mistake it looks like, likeliest first.
        heat_map: where the error sits, as text; "" if there is nothing to draw.
        code: reproduces it when pasted.
        line: what `bptoolkit verify TARGET --replay` takes.
    """

    property: str
    message: str
    point: Point
    matters: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    diagnosis: tuple[str, ...] = ()
    heat_map: str = ""
    code: str = ""
    line: str = ""

    def __str__(self) -> str:
        lines = [f"FAILED {self.property}: {self.message}", f"  smallest case  {_words(self.point)}"]
        for axis, (fails, passes) in self.matters.items():
            shown = f"; passes: {', '.join(passes)}" if passes else ""
            lines.append(f"  matters        {axis}: fails: {', '.join(fails)}{shown}")
        lines += [f"  looks like     {guess}" for guess in self.diagnosis]
        if self.heat_map:
            lines += ["  error", *("    " + row for row in self.heat_map.splitlines())]
        lines.append(f"  replay         --replay '{self.line}'")
        return "\n".join([*lines, "  reproduce", *("    " + row for row in self.code.splitlines())])


@dataclass
class Report:
    """The outcome of `check`.

    Attributes:
        name: of what was verified.
        calls: property -> on how many points it was judged.
        skipped: property -> why it says nothing here.
        failures: what does not hold.
        contract: what the function declares, where it differs from the default.
        notes: what else a reader should know: dtypes that the function refuses, points left out.
        seconds: the time it took.
        seed: of all that was drawn.
    """

    name: str
    calls: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    contract: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    seed: int = 0

    @property
    def ok(self) -> bool:
        """Every property that was judged holds, and some were."""
        return not self.failures and any(self.calls.values())

    def status(self, name: str) -> str:
        """What became of a property: pass, FAIL or n/a."""
        if any(f.property == name for f in self.failures):
            return "FAIL"
        return "pass" if self.calls.get(name) else "n/a"

    def __str__(self) -> str:
        lines = [f"{self.name}: {'ok' if self.ok else 'FAILED'}  ({self.seconds:.1f} s, seed {self.seed})"]
        for name in dict.fromkeys((*self.calls, *self.skipped, *(f.property for f in self.failures))):
            status, n = self.status(name), self.calls.get(name, 0)
            why = f"({self.skipped.get(name, 'nothing to judge')})" if status == "n/a" else f"({n} call{'s' * (n != 1)})"
            lines.append(f"  {status:4}  {name:20} {why}")
        lines += [f"  declared: {k} = {v!r}" for k, v in self.contract.items()]
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join([*lines, *("\n" + str(f) for f in self.failures)])

    def as_dict(self) -> dict[str, Any]:
        """Everything, in plain types."""
        record = asdict(self) | {"ok": self.ok}
        for row, f in zip(record["failures"], self.failures):
            row["point"] = str(f.point)
        record["contract"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.contract.items()}
        return record

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.as_dict(), indent=1)

    def to_junit(self) -> str:
        """The report as JUnit XML: one test case a property."""
        names = list(dict.fromkeys((*self.calls, *self.skipped, *(f.property for f in self.failures))))
        skipped = [n for n in names if self.status(n) == "n/a"]
        suite = ElementTree.Element(
            "testsuite",
            name=f"bptoolkit verify {self.name}",
            tests=str(len(names)),
            failures=str(sum(self.status(n) == "FAIL" for n in names)),
            errors="0",
            skipped=str(len(skipped)),
            time=f"{self.seconds:.3f}",
        )
        for name in names:
            case = ElementTree.SubElement(suite, "testcase", classname=self.name, name=name)
            for f in self.failures:
                if f.property == name:
                    ElementTree.SubElement(case, "failure", message=f.message).text = str(f)
            if name in skipped:
                ElementTree.SubElement(case, "skipped", message=self.skipped.get(name, "nothing to judge"))
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


class VerificationError(AssertionError):
    """`assert_correct` found a property that does not hold; the message is the report, `report` has it."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


def _words(point: Point) -> str:
    """A point for a reader: what is at its simplest is left out."""
    sizes = " ".join(f"{k}={v}" for k, v in point.sizes) or "as given"
    said = [
        f"inputs {point.layout}" * (point.layout != "contiguous"),
        f"cotangent {point.cotangent}" * (point.cotangent != "random"),
    ]
    said += [
        f"requires grad {point.need}" * (point.need != "1"),
        f"values {point.values}" * (point.values not in ("normal", "given")),
    ]
    return "; ".join([sizes, point.dtype, *(s for s in said if s)])
