"""`make gpu`, without a GPU: it says so; and a rehearsal, so that its first minute on one is not spent on a typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from bptoolkit import OPS

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton", reason="Triton is not installed")


def command(*args):
    line = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *map(str, args)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(line, capture_output=True, text=True, cwd="/", env=env)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
def test_without_a_gpu(tmp_path):
    done = command("--out", tmp_path)
    assert done.returncode == 2 and "sees no GPU here" in done.stdout and not list(tmp_path.iterdir())


def test_rehearsal(tmp_path):
    """Every stage but the kernels' tests, on one op; a second run has nothing left to do."""
    stages = [a for s in ("machine", "ops", "warm", "speed", "large", "host", "compiled", "sanitizer") for a in ("--stage", s)]
    args = ["--rehearse", "--out", tmp_path, "--op", "rms_norm" if OPS["rms_norm"].kernel else "layer_norm", *stages]
    done = command(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in records} == set(stages[1::2])
    assert {r["status"] for r in records} == {"ok", "none"} and {r["device"] for r in records} == {"rehearsal"}
    page = (tmp_path / "gpu.md").read_text()
    assert "## speed: 2 ok" in page and "not available" in page
    again = command(*args)
    assert again.returncode == 0 and "[" not in again.stdout.split("results in")[0]
    assert [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()] == records


def test_rehearsal_of_convolutions(tmp_path):
    """The vendor's and ours, each as a share of a matrix product; every figure of a share follows from others of its row."""
    args = ["--rehearse", "--out", tmp_path, "--stage", "convolution", "--op", "conv2d"]
    done = command(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "gpu.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["name"] != "caches"]
    assert {r["name"].split(" | ")[1] for r in records} == {"forward", "input", "weight"}
    for r in records:
        for who in ("vendor", "ours"):
            assert r[f"{who}_of_product"] == pytest.approx(r["gflop"] / r[f"{who}_ms"] / r["product_tflops"])
    assert "## convolution: 5 ok" in (tmp_path / "gpu.md").read_text()
    assert "[" not in command(*args).stdout.split("results in")[0]


def test_layers_of_convolutions(benchmarks):
    """The operations of a row are those that torch counts, for each pass, and all passes of a layer agree with torch."""
    import gpu_conv
    from torch.utils.flop_counter import FlopCounterMode

    assert len({layer.label() for layer in gpu_conv.LAYERS}) == len(gpu_conv.LAYERS)
    for layer in gpu_conv.LAYERS[::4]:
        call = gpu_conv.drawn(layer, "cpu", True)
        for which in gpu_conv.PASSES:
            with FlopCounterMode(display=False) as counter:
                gpu_conv.vendor(call, which)()
            assert counter.get_total_flops() == call.flops()


def test_rehearsal_of_the_second_order(tmp_path):
    """A Hessian-vector product by the kernels, by the loops and by the plain maths."""
    done = command("--rehearse", "--out", tmp_path, "--stage", "twice", "--op", "scaled_dot_product_attention")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert record["status"] == "ok" and {"ours_ms", "loops_ms", "math_ms", "ours_error", "math_error"} <= set(record)


def test_rehearsal_of_paths(tmp_path):
    """Attention by pointers, by descriptors and with specialised warps: the same values, and a time each."""
    done = command("--rehearse", "--out", tmp_path, "--stage", "paths", "--op", "scaled_dot_product_attention")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert record["status"] == "ok" and record["specialised_gap"] == record["descriptors_gap"] == 0
    assert {f"{p}_{what}_ms" for p in ("pointers", "descriptors", "specialised") for what in ("forward", "both")} <= set(record)


def test_shortages(tmp_path):
    """No such stage; no time, and time again; the kernels' tests as a stage, one file of them."""
    done = command("--rehearse", "--out", tmp_path, "--stage", "nothing")
    assert done.returncode == 2 and "there are machine, kernels" in done.stdout
    args = ["--rehearse", "--out", tmp_path, "--stage", "machine", "--stage", "kernels", "--op", "running"]
    assert command(*args, "--budget", "0").returncode == 0
    assert {json.loads(line)["status"] for line in (tmp_path / "gpu.jsonl").read_text().splitlines()} == {"out of time"}
    done = command(*args)
    records = {r["name"]: r for r in map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())}
    assert {r["status"] for r in records.values()} == {"ok"}, done.stdout
    assert "passed" in records["test_running"]["said"]


def test_results_of_other_code_do_not_count(tmp_path, benchmarks):
    import gpu

    first = gpu.Ledger(tmp_path, None, "code one", "a device")
    first.add("ops", "linear", "failed", error="…")
    assert gpu.Ledger(tmp_path, None, "code one", "a device").done == {("ops", "linear")}
    assert not gpu.Ledger(tmp_path / "new", tmp_path, "code two", "a device").done
    assert not gpu.Ledger(tmp_path / "new", tmp_path, "code one", "another").done
    assert gpu.Ledger(tmp_path / "new", tmp_path, "code one", "a device").done


def test_every_kernel_has_a_case(benchmarks):
    """Or shares one with an op of its file that has."""
    from gpu_cases import CASES

    assert set(CASES) <= set(OPS), set(CASES) - set(OPS)
    files = {}
    for name, op in OPS.items():
        for rule in op.rules:
            if rule.kernel:
                files.setdefault(rule.forward.__module__, set()).add(name)
    assert all(names & set(CASES) for names in files.values()), files


def test_every_case_is_one_its_kernel_takes(benchmarks):
    from gpu_cases import CASES

    from bptoolkit.cases import Draw
    from bptoolkit.triton_kernels import interpret

    with interpret():
        for name, cases in CASES.items():
            for label, make in cases.items():
                case = make(Draw(Random(0), dtype=torch.bfloat16), 32)
                OPS[name].call(*case.args, **case.kwargs, backend="triton"), label
