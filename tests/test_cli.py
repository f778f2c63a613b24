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
    assert main(["verify", "linear", "--quick"]) == 0
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
    assert main(["bench", "tanh", "--seconds", "0.05", "--out", str(tmp_path), "--name", "r"]) == 0
    assert [row["op"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["relu", "tanh"]


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


MINE = """
import torch

class Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0].cos() * (2 if dy.dim() and dy.stride(-1) == 0 else 1)
"""


def test_verify_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    words = ["verify", "mine.py:Mine", "--inputs", "x: B N -> B N", "--reference", "torch:sin"]
    files = ["--json", "out.json", "--junit", "out.xml"]
    assert main([*words, "--quick", *files]) == 1
    out = capsys.readouterr().out
    assert "FAILED cotangent_layout" in out and "reads past strides" in out
    record = json.loads((tmp_path / "out.json").read_text())[0]
    assert not record["ok"] and 'failures="' in (tmp_path / "out.xml").read_text()
    assert main([*words, "--replay", record["failures"][0]["line"]]) == 1
    assert main([*words, "--only", "forward_value"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mine.py:Mine"], "needs --inputs"),
        (["mine.py:Nope", "--inputs", "x: B -> B"], "has no 'Nope'"),
        (["nope.py:Mine", "--inputs", "x: B -> B"], "no file"),
        (["nope.nope:f", "--inputs", "x: B -> B"], "cannot import"),
        (["mine.py:Mine", "--inputs", "x: B -> B", "--contract", "nope=1"], "no 'nope'"),
        (["mine.py:Mine", "--inputs", "x: B -> B", "--only", "nope"], "no property"),
        (["mine.py:Mine", "--mutate"], "--mutate takes"),
        (["mine.py:Mine", "--inputs", "x: B -> B", "--replay", "nonsense"], "not a point"),
    ],
)
def test_verify_says_what_is_missing(tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *words]) == 2
    assert said in capsys.readouterr().out


def test_verify_lists_its_properties(capsys):
    assert main(["verify", "--list"]) == 0
    out = capsys.readouterr().out
    assert "cotangent_layout" in out and "stride 0" in out
