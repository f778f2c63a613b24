"""The LSTM's kernels beside the eager rules."""

from __future__ import annotations

import pytest
import recurring as check
import torch
from fused import LAYOUTS, both_rules, each_dtype, normal, ragged
from recurring import Cell, drawn, each_path
from torch.utils.flop_counter import FlopCounterMode

import bptoolkit as bp
from bptoolkit.ops.lstm import GATES, OUTPUTS
from bptoolkit.triton_kernels import recurrent

LSTM = Cell("lstm", (GATES, OUTPUTS), 4, 2, rest=(None,))
each_way = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@each_path
@pytest.mark.parametrize("T, B, I, H", check.SIZES)
def test_sizes(device, way, T, B, I, H):
    check.check_sizes(LSTM, device, way, T, B, I, H)


@each_way
@each_path
def test_ways(device, way, reverse):
    check.check_ways(LSTM, device, way, reverse)


@each_path
@pytest.mark.parametrize("one", [0, 1, 2, 3, 4, 5])
def test_what_is_needed(device, way, one):
    check.check_needs(LSTM, device, way, one)


@each_path
@pytest.mark.parametrize("of_sequence, of_weight", [*zip(LAYOUTS, reversed(LAYOUTS))])
def test_layouts(device, way, of_sequence, of_weight):
    check.check_layouts(LSTM, device, way, of_sequence, of_weight)


@each_path
def test_no_rows(device, way):
    check.check_no_rows(LSTM, device, way)


@each_way
@each_path
def test_what_is_past_a_length_is_not_read(device, way, reverse):
    check.check_past_a_length(LSTM, device, way, reverse)


@each_path
def test_rows_keep_to_themselves(device, way):
    check.check_rows_apart(LSTM, device, way)


@each_path
@each_dtype
def test_dtypes(device, way, dtype):
    check.check_dtypes(LSTM, device, way, dtype, way == "steps")


@each_path
@pytest.mark.parametrize("missing", ["dy", "dc"])
def test_an_output_that_nothing_flows_into(device, way, missing):
    with recurrent.forced(way):
        rule = GATES if way == "steps" else OUTPUTS
        both_rules(rule, *drawn(LSTM, device, 3, 2, 2, 3), None, False, 0, cotangents={missing: None, "dG": None}, errors=64)


def test_paths_agree(device):
    check.check_paths_agree(LSTM, device, lambda: [*drawn(LSTM, device, 5, 18, 2, 20), ragged(device, 5, 18), True, 0])


@pytest.mark.parametrize("save", ["gates", "outputs"])
def test_second_order(device, save):
    """Which cuDNN refuses."""
    check.check_second_order(LSTM, device, save)


@pytest.mark.parametrize("way", recurrent.PATHS)
@pytest.mark.parametrize("save", check.SAVES)
def test_gradient_norms(device, monkeypatch, way, save):
    check.check_gradient_norms(LSTM, device, monkeypatch, way, save)


# --- by slices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way, B, H", check.SLICES)
def test_slices(device, monkeypatch, way, B, H):
    check.check_slices(LSTM, device, monkeypatch, way, B, H)


@pytest.mark.parametrize("way", ["slices", "persistent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slices_in_half(device, way, dtype):
    check.check_slices_in_half(LSTM, device, way, dtype)


def test_persistent_on_cuda():
    check.check_persistent_on_cuda(LSTM)


def test_slices_that_cannot_be(device):
    args = (*drawn(LSTM, device, 2, 2, 2, 200), None, False, 0)
    with (
        recurrent.forced("persistent"),
        pytest.raises(ValueError, match=r"persistent path takes at most \d+ units of torch.float32"),
    ):
        GATES.kernel().forward(*args)
    if device == "cpu":
        args = (*drawn(LSTM, device, 2, 2, 2, 17), None, False, 0)
        with recurrent.forced("persistent"), pytest.raises(ValueError, match="needs 2 programs at a time; this device runs 1"):
            GATES.kernel().forward(*args)


# --- the choice -----------------------------------------------------------------------------------------------------------


def test_the_choice_of_a_path():
    """By the bytes of the weights; by name; what does not fit, and what is not there, is refused."""
    cpu, half, single = torch.device("cpu"), torch.bfloat16, torch.float32
    for gates, dtype in ((4, half), (3, half), (1, half), (4, single), (1, single)):
        most = recurrent.widest(gates, dtype.itemsize, recurrent.WARP, recurrent.room(cpu))
        assert most >= 32
        assert recurrent.path(most, gates, dtype, cpu) == "resident" and recurrent.path(most + 1, gates, dtype, cpu) == "steps"
    assert [recurrent.widest(g, b, 32, 128 << 10) for g, b in ((4, 2), (3, 2), (1, 2), (4, 4), (1, 4))] == [
        128,
        128,
        256,
        64,
        128,
    ]
    assert recurrent.widest(4, 2, 32, 84 << 10) == 64 and recurrent.widest(3, 2, 32, 84 << 10) == 64  # a part with 100 KiB
    assert recurrent.widest_sliced(4, 2, 32, 128 << 10) == 1024 and recurrent.widest_sliced(4, 2, 32, 84 << 10) == 0
    with recurrent.forced("steps"):
        assert recurrent.path(1, 4, single, cpu) == "steps"
    with recurrent.forced("resident"), pytest.raises(ValueError, match=r"at most \d+ units of torch.float32, not 200"):
        recurrent.path(200, 4, single, cpu)
    with pytest.raises(ValueError, match="no path 'nothing'"), recurrent.forced("nothing"):
        pass
    assert recurrent.path(200, 4, single, cpu) == "steps"


def test_what_the_kernel_cannot_take(device):
    weights = [normal(8, 3), normal(8, 1), normal(8), normal(8), normal(1, 2)]
    args = normal(4, 2, 3), None, weights
    with pytest.raises(ValueError, match="lstm: backend='triton' cannot run here: the fused kernels have no projection"):
        bp.functional.lstm(*args, proj_size=1, backend="triton")
    with pytest.raises(ValueError, match=r"lstm: backend='triton' cannot run here: .* no e-prop, no ARTBP"):
        few = [normal(8, 3), normal(8, 2)]
        bp.functional.lstm(normal(4, 2, 3), None, few, bias=False, truncate="eprop", backend="triton")
    y, _ = bp.functional.lstm(*args, proj_size=1)
    assert y.shape == (4, 2, 1)


def test_products_are_counted(device):
    """With x, and of each step: what the eager rule's are."""
    T, B, I, H = 3, 2, 5, 4
    args = [t if t is None else t.requires_grad_() for t in drawn(LSTM, device, T, B, I, H)[:6]]
    with FlopCounterMode(display=False) as counter:
        y, *_ = GATES(*args, None, None, False, 0, backend="triton")
        y.sum().backward()
    assert counter.get_total_flops() == 2 * T * B * 4 * H * (3 * I + 3 * H)
