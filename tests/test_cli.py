"""The command line: every command answers, and what does not exist is named with what does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bptoolkit import OPS
from bptoolkit.cli import COMMANDS, main


def test_both_names_of_the_command(tmp_path):
    a = subprocess.run([sys.executable, "-m", "bptoolkit", "ops"], cwd=tmp_path, capture_output=True, text=True)
    assert a.returncode == 0
    assert all(f"`{name}`" in a.stdout for name in OPS)


def test_usage_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert main([]) == 2


def test_unknown_command(capsys):
    assert main(["nope"]) == 2
    err = capsys.readouterr().err
    assert "'nope'" in err and "verify" in err


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_unknown_op_lists_those_there_are(command, capsys):
    assert main([command, "nope"]) == 2
    out = capsys.readouterr().out
    assert "'nope'" in out and "linear" in out


def test_verify(capsys):
    assert main(["verify", "linear", "--calls", "2"]) == 0
    assert "ok" in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "linear" in out and "eager" in out


def test_bench_writes_its_results(tmp_path, capsys):
    assert main(["bench", "relu", "--seconds", "0.05", "--out", str(tmp_path), "--name", "r"]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    (row, *_) = record["rows"]
    assert row["both"] > 0 and row["saved"] > 0 and record["where"]["torch"]
    assert "fwd+bwd ×" in (tmp_path / "r.md").read_text()
    assert "device: CPU" in capsys.readouterr().out


def test_bench_refuses_a_red_op(monkeypatch, capsys):
    import dataclasses

    from bptoolkit.bench import cli

    wrong = dataclasses.replace(OPS["linear"], call=lambda *a, **k: OPS["linear"].call(*a, **k) * 1.001)
    monkeypatch.setitem(cli.OPS, "linear", wrong)
    assert main(["bench", "linear", "--seconds", "0.01"]) == 1
    assert "not timed" in capsys.readouterr().out


def test_saved_bytes_counts_each_storage_once():
    import torch

    from bptoolkit.bench import saved_bytes

    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: (x * x, x.sin())) == 400
    assert saved_bytes(lambda: x.exp()) == 400
    assert saved_bytes(lambda: x + 1) == 0
