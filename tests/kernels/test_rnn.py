"""The simple recurrence's kernels beside the eager rule."""

from __future__ import annotations

import pytest
import recurring as check
import torch
from fused import LAYOUTS, each_dtype, ragged
from recurring import Cell, drawn, each_path
from torch.utils.flop_counter import FlopCounterMode

from bptoolkit.ops.rnn import RULE
from bptoolkit.triton_kernels import recurrent

CELLS = {name: Cell("rnn", (RULE,), 1, 1, options=(name, 0)) for name in ("tanh", "relu")}
TANH = CELLS["tanh"]
each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
each_way = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@each_path
@pytest.mark.parametrize("T, B, I, H", check.SIZES)
def test_sizes(device, way, T, B, I, H):
    check.check_sizes(CELLS["relu" if T % 2 else "tanh"], device, way, T, B, I, H)


@each_way
@each_path
@each_cell
def test_ways(device, cell, way, reverse):
    check.check_ways(cell, device, way, reverse)


@each_path
@pytest.mark.parametrize("one", [0, 1, 2, 3, 4])
def test_what_is_needed(device, way, one):
    check.check_needs(TANH, device, way, one)


@each_path
@pytest.mark.parametrize("of_sequence, of_weight", [*zip(LAYOUTS, reversed(LAYOUTS))])
def test_layouts(device, way, of_sequence, of_weight):
    check.check_layouts(TANH, device, way, of_sequence, of_weight)


@each_path
@each_cell
def test_no_rows(device, cell, way):
    check.check_no_rows(cell, device, way)


@each_way
@each_path
def test_what_is_past_a_length_is_not_read(device, way, reverse):
    check.check_past_a_length(TANH, device, way, reverse)


@each_path
@each_cell
def test_rows_keep_to_themselves(device, cell, way):
    check.check_rows_apart(cell, device, way)


@each_path
@each_dtype
def test_dtypes(device, way, dtype):
    check.check_dtypes(TANH, device, way, dtype, way == "steps")


@each_cell
def test_paths_agree(device, cell):
    given = (ragged(device, 5, 18), True, *cell.options)
    check.check_paths_agree(cell, device, lambda: [*drawn(cell, device, 5, 18, 2, 20), *given])


@each_cell
def test_second_order(device, cell):
    check.check_second_order(cell, device, "gates", nonlinearity=cell.options[0])


@each_cell
@pytest.mark.parametrize("way, B, H", check.SLICES)
def test_slices(device, monkeypatch, cell, way, B, H):
    check.check_slices(cell, device, monkeypatch, way, B, H)


@pytest.mark.parametrize("way", ["slices", "persistent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slices_in_half(device, way, dtype):
    check.check_slices_in_half(TANH, device, way, dtype)


def test_persistent_on_cuda():
    check.check_persistent_on_cuda(TANH)


@pytest.mark.parametrize("way", recurrent.PATHS)
@pytest.mark.parametrize("save", check.SAVES)
def test_gradient_norms(device, monkeypatch, way, save):
    check.check_gradient_norms(TANH, device, monkeypatch, way, save)


def test_products_are_counted(device):
    """With x, and of each step: what the eager rule's are."""
    T, B, I, H = 3, 2, 5, 4
    args = [t.requires_grad_() for t in drawn(TANH, device, T, B, I, H)]
    with FlopCounterMode(display=False) as counter:
        RULE(*args, None, False, "tanh", 0, backend="triton").sum().backward()
    assert counter.get_total_flops() == 2 * T * B * H * (3 * I + 3 * H)
