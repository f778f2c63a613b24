"""The GRU's kernels beside the eager rules."""

from __future__ import annotations

import pytest
import recurring as check
import torch
from fused import LAYOUTS, each_dtype, ragged
from recurring import Cell, drawn, each_path
from torch.utils.flop_counter import FlopCounterMode

from bptoolkit.ops.gru import GATES, OUTPUTS
from bptoolkit.triton_kernels import recurrent

GRU = Cell("gru", (GATES, OUTPUTS), 3, 1, biases=2)
each_way = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@each_path
@pytest.mark.parametrize("T, B, I, H", check.SIZES)
def test_sizes(device, way, T, B, I, H):
    check.check_sizes(GRU, device, way, T, B, I, H)


@each_way
@each_path
def test_ways(device, way, reverse):
    check.check_ways(GRU, device, way, reverse)


@each_path
@pytest.mark.parametrize("one", [0, 1, 2, 3, 4, 5])
def test_what_is_needed(device, way, one):
    check.check_needs(GRU, device, way, one)


@each_path
@pytest.mark.parametrize("of_sequence, of_weight", [*zip(LAYOUTS, reversed(LAYOUTS))])
def test_layouts(device, way, of_sequence, of_weight):
    check.check_layouts(GRU, device, way, of_sequence, of_weight)


@each_path
def test_no_rows(device, way):
    check.check_no_rows(GRU, device, way)


@each_way
@each_path
def test_what_is_past_a_length_is_not_read(device, way, reverse):
    check.check_past_a_length(GRU, device, way, reverse)


@each_path
def test_rows_keep_to_themselves(device, way):
    check.check_rows_apart(GRU, device, way)


@each_path
@each_dtype
def test_dtypes(device, way, dtype):
    check.check_dtypes(GRU, device, way, dtype, way == "steps")


def test_paths_agree(device):
    check.check_paths_agree(GRU, device, lambda: [*drawn(GRU, device, 5, 18, 2, 20), ragged(device, 5, 18), True, 0])


@pytest.mark.parametrize("save", ["gates", "outputs"])
def test_second_order(device, save):
    check.check_second_order(GRU, device, save)


@pytest.mark.parametrize("way, B, H", check.SLICES)
def test_slices(device, monkeypatch, way, B, H):
    check.check_slices(GRU, device, monkeypatch, way, B, H)


@pytest.mark.parametrize("way", ["slices", "persistent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slices_in_half(device, way, dtype):
    check.check_slices_in_half(GRU, device, way, dtype)


def test_persistent_on_cuda():
    check.check_persistent_on_cuda(GRU)


@pytest.mark.parametrize("way", recurrent.PATHS)
@pytest.mark.parametrize("save", check.SAVES)
def test_gradient_norms(device, monkeypatch, way, save):
    check.check_gradient_norms(GRU, device, monkeypatch, way, save)


def test_products_are_counted(device):
    """With x, and of each step: what the eager rule's are."""
    T, B, I, H = 3, 2, 5, 4
    args = [t.requires_grad_() for t in drawn(GRU, device, T, B, I, H)]
    with FlopCounterMode(display=False) as counter:
        y, *_ = GATES(*args, None, False, 0, backend="triton")
        y.sum().backward()
    assert counter.get_total_flops() == 2 * T * B * 3 * H * (3 * I + 3 * H)
