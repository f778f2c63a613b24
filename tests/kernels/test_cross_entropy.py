"""cross_entropy's kernel beside its eager rule."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, each_dtype, near, normal

import bptoolkit as bp
from bptoolkit.ops.cross_entropy import RULE
from bptoolkit.triton_kernels import cross_entropy as file

IGNORE = 2
OPTIONS = (0.0, 0.0, None)  # label_smoothing, z_loss, softcap
EVERY = (0.3, 0.1, 2.0)


def target(C, *shape, device):
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(C + sum(shape))).to(device)


def run(x, k=None, w=None, reduction="mean", options=OPTIONS, ignore=IGNORE, errors=8, **cotangents):
    """dw is not the kernel's, but by eager pieces: it is compared where a test asks for it."""
    k = target(x.shape[1], x.shape[0], *x.shape[2:], device=x.device) if k is None else k
    need = (True, cotangents.pop("by_weight", False), False)
    return both_rules(RULE, x, w, k, ignore, reduction, *options, need=need, cotangents=cotangents, errors=errors)


def weights(C, device, dtype=torch.float32):
    return normal(C, dtype=dtype, device=device, seed=3).abs() + 0.1


@pytest.fixture
def short(monkeypatch):
    """Tiles of 64 elements at most: several to a line without long lines."""
    for name, value in (("PASSING", 64), ("TILE", 64), ("ALONG", 4)):
        monkeypatch.setattr(file, name, value)


@pytest.mark.parametrize(
    "N, C, I",
    [
        *product((1, 3, 31, 33), (33, 64), (1,)),
        (2049, 1, 1),
        (127, 2, 1),
        (129, 3, 1),
        (5, 1025, 1),
        *product((1, 2), (3, 65), (2, 33)),
        (1, 5, 1030),
    ],
)
def test_sizes(device, N, C, I):
    run(normal(*((N, C) if I == 1 else (N, C, I)), device=device))


@pytest.mark.parametrize("options", [OPTIONS, EVERY], ids=["plain", "every option"])
@pytest.mark.parametrize("N, C, I", [(3, 65, 1), (2, 128, 1), (2, 129, 1), (2, 17, 4), (2, 33, 5), (1, 300, 3)])
def test_lines_of_several_tiles(device, short, N, C, I, options):
    run(normal(*((N, C) if I == 1 else (N, C, I)), device=device), w=weights(C, device), options=options)


@pytest.mark.parametrize("C", [4096, 4097, 1 << 18])
def test_vocabularies(device, C):
    run(normal(1, C, device=device), torch.tensor([C - 1], device=device))


@each_dtype
@pytest.mark.parametrize("options", [OPTIONS, EVERY], ids=["plain", "every option"])
def test_dtypes(device, dtype, options):
    for shape in ((9, 40), (2, 40, 3)):
        x, w = normal(*shape, dtype=dtype, device=device) * 3, weights(40, device, dtype)
        run(x, w=w, reduction="none", options=options)
        run(x, w=w, options=options, errors=16)  # the least float16 are half of 6e-8 apart


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [(0.3, 0, None), (0, 0.1, None), (0, 0, 2.0), (1.0, 0.1, None), EVERY], ids=str)
def test_options(device, reduction, weighted, options):
    """Ignored samples are among them; by the weights too."""
    x = normal(7, 5, 2, device=device)
    run(x, w=weights(5, device) if weighted else None, reduction=reduction, options=options, by_weight=weighted)


def test_cotangent_that_is_expanded(device):
    run(normal(6, 9, 2, device=device), reduction="none", dl=normal(1, 1, device=device).expand(6, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    k = LAYOUTS["rows three apart"](target(20, 9, 1, device=device))[:, 0]
    run(
        LAYOUTS[layout](normal(9, 20, device=device)),
        k,
        LAYOUTS["columns two apart"](weights(20, device)[None])[0],
        options=EVERY,
    )
    x = normal(2, 5, 3, 4, device=device)
    for t in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x.transpose(0, 1)):
        run(t)


@pytest.mark.parametrize("shape", [(0, 4), (3, 4, 0), (0, 4, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_zero_sizes(device, shape, reduction):
    run(normal(*shape, device=device), reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", [OPTIONS, EVERY], ids=["plain", "every option"])
def test_everything_ignored(device, reduction, options):
    """The mean over nothing is NaN."""
    k = torch.full((3,), IGNORE, device=device)
    (l, _, _), (dx, _, _) = run(normal(3, 5, device=device), k, reduction=reduction, options=options)
    assert l.isnan().all() if reduction == "mean" else not l.any() and not dx.any()


def test_ignored_index_that_is_no_class(device):
    k = torch.tensor([1, -100, 4, -100], device=device)
    run(normal(4, 5, device=device), k, weights(5, device), ignore=-100, by_weight=True)


@pytest.mark.parametrize("options", [OPTIONS, (0.3, 0.1, None), EVERY], ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_infinities(device, request, several, options):
    """−∞ among others has probability 0; a line of it alone, with +∞ or NaN is NaN, ignored or not, as in the eager rule."""
    if several:
        request.getfixturevalue("short")
    inf, x = torch.inf, normal(11, 130, device=device)
    x[0, ::2] = -inf
    x[1, 3:] = -inf
    x[2, :129] = -inf
    x[3, :] = -inf
    x[4, 100] = inf
    x[5, 70] = torch.nan
    x[6, 5], x[7] = inf, torch.nan
    x[8, 5], x[9, 6] = -inf, torch.nan
    k = torch.full((11,), 5, device=device)
    k[[2, 4, 8]] = torch.tensor([129, 100, IGNORE], device=device)
    k[[3, 9]] = IGNORE
    run(x, k, weights(130, device), "none", options)


@pytest.mark.parametrize("options", [OPTIONS, (0.3, 0.1, None)], ids=str)
def test_large_logits(device, short, options):
    """Nothing overflows; logits far from 0 lose no digits of the loss and the gradient."""
    ramp = torch.linspace(-30, 30, 200, device=device)
    x = torch.stack([100 * ramp, 100 * ramp.flip(0), ramp, ramp / 10 + 1e4])
    smoothing, z_loss, _ = options
    run(x, torch.tensor([3, 4, 199, 150], device=device), None, "none", (smoothing, z_loss / 1e6, None))


@pytest.mark.parametrize("gap", [3.0, 8.0, 15.0, 20.0, 60.0])
@pytest.mark.parametrize("softcap", [None, 100.0])
def test_a_class_that_is_almost_sure(device, short, gap, softcap):
    """The loss and the entry p − 1 have all their digits, where p itself rounds to 1; in float64 the eager rule has less."""
    x, k = torch.zeros(1, 100, device=device), torch.tensor([17], device=device)
    x[0, 17] = gap
    args = (-100, "sum", 0.0, 0.0, softcap)
    l, m, s = file.KERNEL.forward(x, None, k, *args)
    dx, _, _ = file.KERNEL.backward(torch.ones_like(l), x, None, k, l, m, s, *args, RULE.Need(True, False, False))
    exact = x[0].double().requires_grad_()
    a = exact if softcap is None else softcap * (exact / softcap).tanh()
    truth = ((a[:17] - a[17]).exp().sum() + (a[18:] - a[17]).exp().sum()).log1p()
    (want,) = torch.autograd.grad(truth, exact)
    errors = 8 if softcap is None else 100  # tanh's roundings, of the logits' size
    near(l, truth.detach(), torch.float32, errors)
    near(dx[0, 17], want[17], torch.float32, errors)


def test_a_class_that_is_none(device):
    """On a GPU nobody looks at the values of the target: the loss is NaN, and nothing is read outside the logits."""
    x = normal(3, 4, device=device)
    for wrong in (4, -1, 1 << 40):
        k = torch.tensor([0, wrong, 1], device=device)
        l, m, s = file.KERNEL.forward(x, weights(4, device), k, -100, "none", *OPTIONS)
        assert l.isnan().tolist() == [False, True, False]
        dx, _, _ = file.backward(l.cos(), x, None, k, l, m, s, -100, "sum", *OPTIONS, RULE.Need(True, False, False))
        assert dx.isnan().any(1).tolist() == [False, True, False]


def test_the_public_function(device):
    """Twice differentiated, by weights too; a single sample; the module; bytes."""
    x, w = normal(6, 5, 2, device=device).requires_grad_(), weights(5, device).requires_grad_()
    k = target(5, 6, 2, device=device)
    results = []
    for backend in ("triton", "eager"):
        options = {"ignore_index": IGNORE, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "backend": backend}
        l = bp.functional.cross_entropy(x, k, w, **options)
        g = torch.autograd.grad(l.sin(), (x, w), create_graph=True)
        results.append((l, *g, *torch.autograd.grad(sum(t.cos().sum() for t in g), (x, w))))
    torch.testing.assert_close(*results)
    module = bp.nn.CrossEntropyLoss(reduction="none")
    module.backend = "triton"
    torch.testing.assert_close(module(x[0, :, 0], k[0, 0]), F.cross_entropy(x[0, :, 0], k[0, 0], reduction="none"))
    torch.testing.assert_close(module(x, k.byte()), F.cross_entropy(x, k, reduction="none"))


def test_the_logits_are_what_is_kept(device):
    from bptoolkit.bench import saved_bytes

    x, k = normal(8, 20, device=device).requires_grad_(), target(20, 8, device=device)
    assert saved_bytes(lambda: bp.functional.cross_entropy(x, k, backend="triton")) == 4 * 8 * 20 + 8 * 8 + 2 * 4 * 8


def test_what_the_kernel_cannot_take(device):
    x, k = normal(3, 4, device=device), target(4, 3, device=device)
    for reason, args in (("computes in float32, not float64", (x.double(), k)), ("no fused kernel", (x, x.softmax(1)))):
        with pytest.raises(ValueError, match=f"cross_entropy: backend='triton' cannot run here: .*{reason}"):
            bp.functional.cross_entropy(*args, backend="triton")
        torch.testing.assert_close(bp.functional.cross_entropy(*args), F.cross_entropy(*args))
