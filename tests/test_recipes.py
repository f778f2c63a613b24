"""The recipes and `bptoolkit fit`: they learn, both layer sets agree, an interrupted run goes on exactly, errors name what exists."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="the recipes need the extra [recipes]")
pytest.importorskip("jsonargparse", reason="the recipes need the extra [recipes]")

from bptoolkit import cli
from bptoolkit.recipe import Floor, find, listings
from bptoolkit.recipes import char_lm, compressors, digits
from bptoolkit.training import Ordered, read_csv

DIGITS = ["digits", "--data.batch_size=256", "--model.width=4"]  # 6 steps an epoch
CHARS = ["char-lm", "--data.train_chars=8000", "--data.val_chars=2000", "--data.batch_size=4", "--data.window=20"]
CHARS += ["--model.hidden=24", "--model.embedding=8", "--model.dropout=0.2"]  # 100 steps an epoch
STEP = {"digits": digits.Digits, "char-lm": char_lm.CharLM}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


def fit(*args: str) -> int:
    return cli.main(["fit", *args])


def folder(recipe: str, run: str) -> Path:
    return Path("runs", recipe, run)


def losses(recipe: str, run: str) -> list[float]:
    return [float(row["train_loss"]) for row in read_csv(folder(recipe, run) / "metrics.csv")]


def checkpoint(recipe: str, run: str) -> dict[str, Any]:
    return torch.load(folder(recipe, run) / "last.ckpt", weights_only=True)


def test_both_layer_sets_learn_the_digits_and_agree():
    for layers in ("torch", "bptoolkit"):
        assert fit("digits", "--layers", layers, "--trainer.max_epochs=6", "--model.dropout=0") == 0
    ours, torchs = (losses("digits", layers) for layers in ("bptoolkit", "torch"))
    assert len(ours) == len(torchs) == 6 * 23
    assert torchs[0] > 2.2 and sum(torchs[-10:]) < 7
    assert max(abs(a - b) for a, b in zip(ours, torchs)) < 1e-3


def stop_at(monkeypatch, recipe: str, call: int, hook: str, signum: int) -> None:
    """Send this process a signal inside a call of a hook of the recipe's module."""
    module, calls = STEP[recipe], [0]
    original = getattr(module, hook)

    @wraps(original)  # Lightning reads the signature
    def hooked(self, *args):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signum)
        return original(self, *args)

    monkeypatch.setattr(module, hook, hooked)


STOPS = {  # options, hook and call in which the signal comes, step at which the run stops
    "mid-epoch": ([*DIGITS, "--trainer.max_epochs=3"], "training_step", 9, 9),
    "last step of an epoch": ([*DIGITS, "--trainer.max_epochs=3"], "training_step", 6, 6),
    "in validation": ([*DIGITS, "--trainer.max_epochs=3"], "validation_step", 3, 12),
    "counted in steps": ([*DIGITS, "--trainer.max_steps=16", "--trainer.max_epochs=-1"], "training_step", 8, 8),
    "hidden state": ([*CHARS, "--trainer.max_epochs=1"], "training_step", 37, 37),
    "step before validation": ([*CHARS, "--trainer.max_epochs=1"], "training_step", 25, 26),
    "second epoch": ([*CHARS, "--trainer.max_epochs=2", "--trainer.limit_train_batches=30"], "training_step", 41, 41),
    "accumulating": ([*CHARS, "--trainer.accumulate_grad_batches=3"], "training_step", 40, 14),
}


@pytest.mark.parametrize("where", STOPS)
def test_an_interrupted_run_goes_on_exactly(where, monkeypatch, capsys):
    args, hook, call, step = STOPS[where]
    recipe = args[0]
    assert fit(*args, "--run", "straight") == 0
    with monkeypatch.context() as patched:
        stop_at(patched, recipe, call, hook, signal.SIGINT)
        assert fit(*args, "--run", "stopped") == 130
    stopped = checkpoint(recipe, "stopped")
    assert stopped["global_step"] == step
    assert json.loads((folder(recipe, "stopped") / "result.json").read_text())["status"] == "interrupted"
    torch.manual_seed(12345)  # another process would be in another state as well
    assert fit(*args, "--run", "stopped") == 0
    assert "resumed from" in capsys.readouterr().out
    a, b = checkpoint(recipe, "straight"), checkpoint(recipe, "stopped")
    assert a["global_step"] == b["global_step"] > step
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert max((a["state_dict"][k] - b["state_dict"][k]).abs().max().item() for k in a["state_dict"]) == 0
    assert read_csv(folder(recipe, "straight") / "metrics.csv") == read_csv(folder(recipe, "stopped") / "metrics.csv")
    results = [json.loads((folder(recipe, run) / "result.json").read_text()) for run in ("straight", "stopped")]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
