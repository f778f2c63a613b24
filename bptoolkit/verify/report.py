"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Failure:
    """One property that does not hold, with the smallest call found that shows it."""

    property: str
    message: str
    code: str  # reproduces it when pasted

    def __str__(self) -> str:
        return f"{self.property}: {self.message}\n" + "\n".join("    " + line for line in self.code.splitlines())


@dataclass
class Report:
    """The outcome of `check`: how many calls each property was judged on, and what failed."""

    name: str
    calls: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every property that was judged holds, and some were."""
        return not self.failures and any(self.calls.values())

    def __str__(self) -> str:
        bad = {f.property for f in self.failures}
        lines = [f"{self.name}: {'ok' if self.ok else 'FAILED'}"]
        for name, n in self.calls.items():
            lines.append(f"  {'FAIL' if name in bad else 'pass'}  {name} ({n} calls)")
        lines += [f"  ----  {name} (not applicable: {why})" for name, why in self.skipped.items()]
        lines += ["", *(str(f) for f in self.failures)] if self.failures else []
        return "\n".join(lines)


class VerificationError(AssertionError):
    """`assert_correct` found a property that does not hold; the message is the report."""
