"""The recipes and `bptoolkit fit`: they learn, both layer sets agree, runs resume exactly, errors name what exists."""

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
CHARS = ["char-lm", "--data.train_chars=4000", "--data.val_chars=1000", "--data.batch_size=4", "--data.window=20"]
CHARS += ["--model.hidden=24", "--model.embedding=8", "--model.dropout=0.2"]  # 50 steps an epoch
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


def apart(recipe: str, runs: tuple[str, str]) -> list[float]:
    first, second = (losses(recipe, run) for run in runs)
    assert len(first) == len(second) > 0
    return [abs(a - b) for a, b in zip(first, second)]


def test_digits_learns_and_both_layer_sets_agree():
    for layers in ("torch", "bptoolkit"):
        assert fit("digits", "--layers", layers, "--trainer.max_epochs=4") == 0
    for layers in ("torch", "bptoolkit"):
        curve = losses("digits", layers)
        assert curve[0] > 2.2 and sum(curve[-5:]) / 5 < 1.0
    assert max(apart("digits", ("torch", "bptoolkit"))[:46]) < 1e-4  # float32: rounding has not grown yet


def test_char_lm_learns_and_both_layer_sets_agree(capsys):
    for layers in ("torch", "bptoolkit"):
        assert fit(*CHARS, "--layers", layers, "--model.lr=0.03") == 0
    for layers in ("torch", "bptoolkit"):
        curve = losses("char-lm", layers)
        assert curve[0] > 4.4 and sum(curve[-10:]) / 10 < 3.5
    assert max(apart("char-lm", ("torch", "bptoolkit"))) < 1e-4
    printed = capsys.readouterr().out
    assert all(f"{name:6}" in printed for name in ("LSTM", "zlib", "bz2", "xz", "5-gram"))


@pytest.mark.parametrize("args", [[*DIGITS, "--trainer.max_epochs=3"], CHARS], ids=["digits", "char-lm"])
def test_the_curves_are_equal_in_float64(args):
    for layers in ("torch", "bptoolkit"):
        assert fit(*args, "--layers", layers, "--trainer.precision=64-true") == 0
    assert max(apart(args[0], ("torch", "bptoolkit"))) < 1e-11


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
    "hidden state": ([*CHARS, "--trainer.max_epochs=1"], "training_step", 18, 18),
    "step before validation": ([*CHARS, "--trainer.max_epochs=1"], "training_step", 12, 13),
    "second epoch": ([*CHARS, "--trainer.max_epochs=2", "--trainer.limit_train_batches=20"], "training_step", 31, 31),
    "accumulating": ([*CHARS, "--trainer.accumulate_grad_batches=3"], "training_step", 20, 7),
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


def test_a_killed_process_goes_on_from_its_last_checkpoint(tmp_path):
    """As a scheduler would: SIGTERM to another process, exit status 143; then SIGKILL, which nothing can answer."""
    args = [*CHARS, "--trainer.max_epochs=3", "--checkpoint.every_n_steps=10"]
    command = [sys.executable, "-m", "bptoolkit", "fit", *args, "--run", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: the sums are in the same order
    last = folder("char-lm", "killed") / "last.ckpt"
    steps = []
    for signum, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        seen = last.stat().st_mtime if last.exists() else None
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        end = time.monotonic() + 120
        while process.poll() is None and (not last.exists() or last.stat().st_mtime == seen) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signum)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == status, output
        assert last.stat().st_mtime != seen, output
        steps.append(checkpoint("char-lm", "killed")["global_step"])
        rows = read_csv(folder("char-lm", "killed") / "metrics.csv")
        assert len(rows) >= steps[-1]
    assert 10 <= steps[0] < steps[1] < 150
    torch.set_num_threads(1)
    assert fit(*args, "--run", "killed") == 0
    assert fit(*args, "--run", "straight") == 0
    a, b = checkpoint("char-lm", "straight")["state_dict"], checkpoint("char-lm", "killed")["state_dict"]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses("char-lm", "straight") == losses("char-lm", "killed")


def test_a_checkpoint_from_within_a_step_is_kept_apart(monkeypatch):
    """An error leaves exception.ckpt; the next fit goes on from the last good one."""
    args = [*DIGITS, "--trainer.max_epochs=2", "--run", "failed"]
    with monkeypatch.context() as patched:
        original = digits.Digits.training_step

        def step(self, batch):
            if self.trainer.global_step == 8:
                raise FloatingPointError("planted")
            return original(self, batch)

        patched.setattr(digits.Digits, "training_step", step)
        with pytest.raises(FloatingPointError, match="planted"):
            fit(*args)
    there = folder("digits", "failed")
    assert json.loads((there / "result.json").read_text())["status"] == "failed"
    assert torch.load(there / "exception.ckpt", weights_only=True)["global_step"] == 8
    assert checkpoint("digits", "failed")["global_step"] == 6
    assert fit(*args) == 0
    assert [int(row["step"]) for row in read_csv(there / "metrics.csv")] == list(range(1, 13))


def test_a_run_folder_says_what_was_run():
    assert fit(*DIGITS, "--trainer.max_epochs=1", "--run", "one") == 0
    there = folder("digits", "one")
    versions = json.loads((there / "versions.json").read_text())
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert len(versions["data"]) == 64 and {"python", "platform", "bptoolkit", "lightning"} <= versions.keys()
    # its config gives the same run again, in a folder of its own
    assert fit("digits", "--config", str(there / "config.yaml"), "--run", "two") == 0
    assert losses("digits", "one") == losses("digits", "two")
    result = json.loads((there / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == 6


def test_what_a_finished_run_does_when_fitted_again(capsys):
    assert fit(*DIGITS, "--trainer.max_epochs=1") == 0
    assert fit(*DIGITS, "--trainer.max_epochs=1") == 0
    assert "nothing was left to train" in capsys.readouterr().out
    assert fit(*DIGITS, "--trainer.max_epochs=2") == 0  # goes on
    assert len(losses("digits", "bptoolkit")) == 12
    assert fit(*DIGITS, "--trainer.max_epochs=1", "--resume", "none") == 0
    assert len(losses("digits", "bptoolkit")) == 6
    assert fit(*DIGITS, "--model.width=5", "--trainer.max_epochs=1") == 2
    assert "--model.width was 4, now 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["digts"], ["no recipe 'digts'", "did you mean digits", "char-lm, digits"]),
        (
            ["digits", "--model.widht=3"],
            ["did you mean --model.width", "--data.batch_size", "--trainer.devices"],
        ),
        (["digits", "--layer", "torch"], ["--layer", "--layers, --run, --resume"]),
        (["digits", "--layers", "jax"], ["'jax'", "torch", "bptoolkit"]),
        (["digits", "--model.lr=fast"], ["model.lr", "fast"]),
        (["digits", "--resume", "nowhere.ckpt"], ["nowhere.ckpt", "auto, none or the path"]),
        (["digits", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_what_does_not_exist_is_named_beside_what_does(args, says, capsys):
    try:
        status = fit(*args)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    printed = capsys.readouterr().err
    assert all(words in printed for words in says), printed


def test_print_config(capsys):
    with pytest.raises(SystemExit) as stop:
        fit("char-lm", "--trainer.max_epochs=7", "--layers", "torch", "--print_config")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "max_epochs: 7" in printed and "layers: torch" in printed and "hidden: 256" in printed
    assert not Path("runs").exists()


def test_without_jsonargparse_it_says_what_to_install(monkeypatch, capsys):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr("bptoolkit.fit.find_spec", lambda name: None if name == "jsonargparse" else there(name))
    assert fit("digits") == 2
    assert "pip install 'bptoolkit[recipes]'" in capsys.readouterr().err


def test_a_missed_floor_is_exit_status_1(monkeypatch, capsys):
    from dataclasses import replace

    short = replace(digits.RECIPE, trainer={"max_epochs": 1})  # so that a run of one epoch is in full length
    monkeypatch.setattr(digits, "RECIPE", short)
    assert fit(*DIGITS) == 1
    assert "MISSED" in capsys.readouterr().out
    monkeypatch.setattr(digits, "RECIPE", replace(short, floor=replace(short.floor, bound=1.0)))
    assert fit(*DIGITS, "--run", "easy") == 0
    assert "reached" in capsys.readouterr().out
    monkeypatch.setattr(digits, "RECIPE", replace(digits.RECIPE, smoke={"trainer.max_epochs": 1}))
    assert fit(*DIGITS, "--smoke") == 0
    assert "not judged: smoke" in capsys.readouterr().out


def test_floors():
    at_least, beside = Floor("acc", "accuracy", 98.5, "%"), Floor("bpc", "LSTM", "xz", "bits", at_least=False)
    assert (
        at_least.judge({"acc": 98.5})[0] and not at_least.judge({"acc": 98.4})[0] and not at_least.judge({"acc": math.nan})[0]
    )
    assert beside.judge({"bpc": 1.6, "beside": {"xz": 1.7}})[0] and not beside.judge({"bpc": 1.8, "beside": {"xz": 1.7}})[0]


def test_every_recipe_says_what_it_is(capsys):
    assert list(listings()) == ["char-lm", "digits"]
    assert cli.main(["recipes"]) == 0
    printed = capsys.readouterr().out
    for name, listing in listings().items():
        assert name in printed and f"bptoolkit fit {name}" in listing.said("Command")
        assert listing.said("Time") and listing.said("Expected")
        bound = find(name).load().floor.bound
        assert (f"{bound:g}" if isinstance(bound, float) else bound) in listing.said("Expected")


def test_ordered_goes_on_where_it_was():
    whole = [[(epoch, k) for k in range(5)] for epoch in range(3)]
    loader = Ordered(5, lambda epoch, k: (epoch, k))
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert list(loader) == whole[epoch]
    for stop in range(1, 6):
        loader.set_epoch(1)
        batches = iter(loader)
        got = [next(batches) for _ in range(stop)]
        again = Ordered(5, loader.batch)
        again.load_state_dict(loader.state_dict())
        again.set_epoch(1)
        assert got + list(again) == whole[1]
        again.set_epoch(2)
        assert list(again) == whole[2]


def test_batches_of_the_recipes_are_a_pure_function_of_seed_and_epoch():
    for make in (lambda seed: digits.DigitsData(seed=seed), lambda seed: char_lm.LibraryText(seed=seed, train_chars=9000)):
        loaders = []
        for seed in (0, 0, 1):
            data = make(seed)
            data.setup("fit")
            loaders.append(data.train_dataloader())
        a, b, other = loaders
        list(b)  # what was read before does not matter
        torch.manual_seed(5)
        same = [torch.equal(x, y) for epoch in (0, 3) for x, y in zip(a.batch(epoch, 2), b.batch(epoch, 2))]
        assert all(same)
        assert not torch.equal(a.batch(0, 0)[1], a.batch(1, 0)[1])
        assert not torch.equal(a.batch(0, 0)[1], other.batch(0, 0)[1])


def test_char_lm_windows_go_through_the_whole_text():
    data = char_lm.LibraryText(batch_size=3, window=7, val_chars=100, train_chars=100)
    data.setup("fit")
    windows = list(data.test_dataloader())
    assert sum(y.numel() for _, y in windows) == len(data.val) == 99
    text = torch.cat([y for _, y in windows]).mT.flatten()  # stream after stream
    assert torch.equal(text, data.val.long())
    assert torch.equal(torch.cat([x for x, _ in windows]).mT.flatten()[1:], text[:-1])


def test_ngram_against_its_formula():
    """Witten-Bell by dictionaries and recursion, on a text with unseen histories."""
    generator = torch.Generator().manual_seed(0)
    train, text = (torch.randint(0, 4, (n,), generator=generator).numpy() for n in (60, 40))
    follow: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(train)):
        for k in range(min(i, 2) + 1):
            follow.setdefault(tuple(train[i - k : i]), []).append(train[i])

    def p(c, h):
        lower = p(c, h[1:]) if h else 1 / 4
        seen = follow.get(h, [])
        return (seen.count(c) + len(set(seen)) * lower) / (len(seen) + len(set(seen))) if seen else lower

    assert abs(sum(p(c, (0, 1)) for c in range(4)) - 1) < 1e-12
    bits = [-math.log2(p(text[i], tuple(text[max(i - 2, 0) : i]))) for i in range(len(text))]
    assert compressors.ngram(train, text, 4, 3) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_importing_a_recipe_needs_no_jsonargparse():
    code = "import sys; sys.modules['jsonargparse'] = None; import bptoolkit.recipes.digits, bptoolkit.recipes.char_lm"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_and_the_list_do_not_import_lightning():
    code = "import sys; from bptoolkit.cli import main; main(['fit', '--help']); main(['recipes'])\n"
    code += "assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_demo_judges_what_it_compares():
    from bptoolkit.recipes import demo

    torch.set_num_threads(1)
    pair = demo.side_by_side(torch.float64, 12)
    assert max(abs(a - b) for a, b in pair.losses) < 1e-12 and len(pair.times) == 7
    x, y = demo.batches(1)[0]
    ours, theirs = (demo.saved_bytes(m, x, y) for m in reversed(demo.models()))
    assert x.numel() * 4 < ours <= theirs * 1.01

    def missed(accuracy: float, apart: float, apart64: float) -> list[str]:
        result = {"test_acc": accuracy, "floor": {"bound": "98.5 %", "verdict": "reached" if accuracy > 98.5 else "MISSED"}}
        curves = [[1.0] * 100, [1.0] * 20 + [1.0 + apart] * 80]
        double = demo.SideBySide([(1.0, 1.0 + apart64)], [(1.0, 1.0)])
        rows = demo.compare([result, result], curves, double, pair)
        assert demo.table(rows).count("MISSED") == sum(not row.ok for row in rows)
        return [row.label.strip() for row in rows if not row.ok]

    assert missed(99.0, 1e-6, 1e-14) == []
    assert missed(98.0, 1e-6, 1e-14) == ["test accuracy"]
    assert missed(99.0, 1e-3, 1e-14) == ["of their first 46 steps"]
    assert len(missed(99.0, math.nan, 1e-14)) >= 1 and missed(99.0, 0.0, 1e-6) == ["of float64 curves, 1 steps"]
