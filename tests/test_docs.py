"""What the documents say is true: snippets run, the table is fresh, the files they name exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bptoolkit import OPS
from bptoolkit.table import main as ops_main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_readme_snippets_run(tmp_path):
    """As a new user would: each block in a process of its own, outside the checkout."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, block + done.stderr


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="the table has a module that torch has from 2.13 on"
)
def test_readme_table_is_fresh(capsys):
    assert ops_main(["--markdown", str(ROOT / "README.md"), "--check"]) == 0, capsys.readouterr().out


def test_every_slow_row_of_the_benchmark_is_explained():
    rows = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())["rows"]
    slow = {r["op"] for r in rows if r["both"] > 1.15 * r["both_torch"]}
    section = (ROOT / "docs" / "results.md").read_text().partition("### Rows over 1.15")[2].partition("\n## ")[0]
    assert slow and not slow - set(re.findall(r"\w+", section))


def test_the_tutorial_says_what_happens():
    """Each version of mine.py in docs/verify.md gets the verdicts that the page quotes."""
    from tutorial import quoted, reports, verdicts

    pages, now = quoted(), reports()
    assert len(pages) == len(now) == 3
    for page, report in zip(pages, now):
        assert verdicts(page) == verdicts(report), report
    assert "FAIL gradient_value" in verdicts(now[0]) and {"FAIL version_counter", "FAIL memory"} <= set(verdicts(now[1]))
    assert not any(v.startswith("FAIL") for v in verdicts(now[2]))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", OPS)
def test_op_files_state_their_maths(name):
    module = sys.modules[OPS[name].call.__module__]
    for heading in ("Maths", "Letters", "Source"):
        assert heading in (module.__doc__ or ""), f"{module.__name__} has no {heading} on top"
    doc = OPS[name].call.__doc__
    assert doc, f"{name} has no docstring"
    other = re.search(r"arguments and errors as `(\w+)`", doc)  # a sibling that states them
    doc = OPS[other[1]].call.__doc__ if other else doc
    for part in ("Args:", "Returns:", "Raises:"):
        assert part in doc, f"{name}: the docstring has no {part}"


def test_nothing_of_a_machine_or_a_host():
    """No absolute path and no registry host in what is committed."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yaml", "") and path.is_file() and name != "tests/test_docs.py":
            text = path.read_text(errors="ignore")
            for bad in ("/root/", "/home/", "download.pytorch.org", "pypi.org/simple"):
                assert bad not in text, f"{name} has {bad}"
