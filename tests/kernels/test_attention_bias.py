"""The gradient of attention's additive mask, and masks over any dimensions, beside the eager rule."""

from __future__ import annotations

import pytest
import torch
from fused import both_rules, normal
from fused_attention import run

from bptoolkit.ops.attention_rule import RULE
from bptoolkit.ops.attention_tiles import CAUSAL, EVERYWHERE
from bptoolkit.triton_kernels import attention_bias as file
from bptoolkit.triton_kernels import attention_layout as layout


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 32 rows and columns: several without many elements."""
    monkeypatch.setattr(layout, "tile", lambda *_: layout.Tile(32, 32, 4, 1))


SHAPES = [(2, 3, 33, 34), (1, 1, 33, 34), (2, 1, 33, 34), (1, 3, 33, 34), (2, 1, 1, 34), (1, 1, 33, 1), (1, 3, 1, 1)]


@pytest.mark.parametrize("programs", [1, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_broadcast(device, shape, programs, monkeypatch):
    """Summed over what the mask is broadcast over: in one program, or in parts that are added up."""
    monkeypatch.setattr(file, "PROGRAMS", programs)
    run(33, 34, B=(2, 3), m=normal(*shape, device=device), need="m", device=device)


@pytest.mark.parametrize("L, S", [(1, 1), (1, 40), (40, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("rows, columns", [(True, True), (False, True), (True, False), (False, False)])
def test_sizes(device, L, S, rows, columns):
    """A mask of one row, or of one column, of matrices that have no more; and of empty ones."""
    run(L, S, B=(2, 2), m=normal(1, 2, L if rows else 1, S if columns else 1, device=device), need="qm", device=device)


def test_an_empty_batch(device):
    run(3, 4, B=(0, 2), m=normal(1, 2, 3, 4, device=device), need="m", device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(device, dtype):
    """The mask's gradient is of its dtype, which may be float32 beside half inputs."""
    m = normal(1, 2, 20, 30, dtype=dtype, device=device)
    for mask in (m, m.float()):
        run(20, 30, B=(2, 2), m=mask, dtype=dtype, errors=1 << 16, need="m", device=device)


@pytest.mark.parametrize("shape", [(2, 1, 1, 20, 40), (1, 1, 2, 20, 40), (1, 1, 1, 1, 40)], ids=str)
def test_groups(device, shape):
    """q of a group shares k and v, and its own number of heads the mask."""
    run(20, 40, B=(2, 1, 2), shared=(2, 1, 1), m=normal(*shape, device=device), need="qkvm", device=device)


@pytest.mark.parametrize(
    "B, shape", [((2, 2, 3), (1, 2, 3)), ((2, 2, 2), (1, 2, 1)), ((2, 2, 1, 2, 2), (1, 2, 1, 1, 2)), ((), ())]
)
def test_any_number_of_dimensions(device, B, shape):
    """Neighbours are merged; a mask over every second of four dimensions is expanded."""
    m = normal(*shape, 3, 4, device=device)
    run(3, 4, B=B, m=m, need="m", device=device)
    if len(B) == 3:
        run(3, 4, B=B, m=m > 0, need="qk", device=device)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # of what is hidden
def test_with_everything(device):
    """A window whose tiles are skipped, a cap, slopes, lengths; a mask that lies in memory in another order."""
    m, slopes = normal(1, 2, 70, 70, device=device).mT, normal(2, 2, device=device)
    lengths = torch.tensor([[70], [40]], device=device)
    options = {"slopes": slopes, "lengths": lengths, "window": (20, 3, 1), "cap": 2.0, "dlse": None}
    run(70, 70, B=(2, 2), m=m, need="ms", device=device, **options)
    run(70, 70, B=(1, 2), m=m, window=CAUSAL, need="m", device=device)


def test_expanded_masks(device):
    """Each element of an expanded mask has a gradient of its own."""
    run(20, 40, B=(2, 2), m=normal(1, 1, 20, 40, device=device).expand(2, 2, 20, 40), need="m", device=device)
    run(20, 40, B=(2, 2), m=normal(1, 2, 20, 1, device=device).expand(1, 2, 20, 40), need="m", device=device)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_hides(device):
    """-inf hides keys, in whole rows too; the gradient there is 0. NaN stays in its row, and in its sums."""
    m = normal(1, 1, 33, 40, device=device)
    m[..., 3, :], m[..., 5, 7] = -torch.inf, -torch.inf
    grads = run(33, 40, B=(2, 1), m=m, need="m", device=device, dlse=None)[1]
    assert (grads[3][..., 3, :] == 0).all() and (grads[3][..., 5, 7] == 0).all()
    m[..., 32, 4] = torch.nan
    q, k, v = (normal(1, 1, n, 8, device=device) for n in (33, 40, 40))
    need = [False, False, False, True, *(False,) * 5]
    both_rules(RULE, q, k, v, m, *(None,) * 5, EVERYWHERE, None, 0.0, 0.0, need=need, errors=40)
