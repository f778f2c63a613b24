"""docs/verify.md, run: each version of mine.py is verified, and `python tests/tutorial.py` writes the reports into the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "verify.md"
CALL = """
import bptoolkit as bp
from mine import Mine, reference
print(bp.verify.check(Mine, "x: B I, w: O I, b: O -> B O", reference=reference))
"""
FILES = re.compile(r"```python file=mine\.py\n(.*?)```", re.S)
PLACES = re.compile(r"(<!-- report: \w+ -->\n).*?(<!-- end of report -->)", re.S)


def reports() -> list[str]:
    """The report on each version of mine.py, in the order of the page."""
    found = []
    for source in FILES.findall(PAGE.read_text()):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "mine.py").write_text(source)
            done = subprocess.run(
                [sys.executable, "-c", CALL], cwd=folder, capture_output=True, text=True, env=dict(os.environ)
            )
            assert done.returncode == 0, done.stderr
            found.append(done.stdout.strip())
    return found


def verdicts(report: str) -> list[str]:
    """What a report says of each property, without its figures."""
    return [" ".join(line.split()[:2]) for line in report.splitlines() if line.startswith(("  pass", "  FAIL", "  n/a"))]


def quoted() -> list[str]:
    """The reports as they stand in the page."""
    return [m.group(0) for m in PLACES.finditer(PAGE.read_text())]


def main() -> None:
    texts = iter(reports())

    def fill(m: re.Match[str]) -> str:
        lines = [line if len(line) < 150 else line[:146] + " ..." for line in next(texts).splitlines()]
        return f"{m[1]}\n```text\n" + "\n".join(lines) + f"\n```\n\n{m[2]}"

    PAGE.write_text(PLACES.sub(fill, PAGE.read_text()))


if __name__ == "__main__":
    main()
