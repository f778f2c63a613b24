"""What is special to the losses: torch's corner cases, modules, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import bptoolkit as bp

close = torch.testing.assert_close
REDUCTIONS = ("none", "mean", "sum")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 5), (3,)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_every_option_of_cross_entropy_together(reduction, shape, weighted, smoothing):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.rand(3, dtype=torch.float64) if weighted else None
    k = torch.randint(0, 3, shape[:1] + shape[2:] if len(shape) > 1 else ())
    for ignore in (-100, 1):
        results = []
        for fn in (bp.functional.cross_entropy, F.cross_entropy):
            y = fn(x, k, w, ignore_index=ignore, reduction=reduction, label_smoothing=smoothing)
            results.append((y, torch.autograd.grad(y, x, torch.ones_like(y).mul(0.7))))
        close(*results, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_ignored(reduction):
    """The mean over nothing is NaN, the sum is 0, as in torch; no row contributes a gradient to the sum."""
    x, k = torch.randn(3, 4, requires_grad=True), torch.full((3,), -100)
    ours, theirs = (f(x, k, reduction=reduction) for f in (bp.functional.cross_entropy, F.cross_entropy))
    close(ours, theirs, equal_nan=True)
    if reduction == "sum":
        assert not torch.autograd.grad(ours, x)[0].any()


def test_no_rows():
    x, k = torch.randn(0, 4, requires_grad=True), torch.empty(0, dtype=torch.int64)
    assert bp.functional.cross_entropy(x, k).isnan()
    assert bp.functional.cross_entropy(x, k, reduction="sum") == 0


def test_masked_logits():
    """Logits of -inf have probability and gradient 0, in small and in chunked calls."""
    for N, C in ((3, 5), (700, 900)):
        x = torch.randn(N, C, dtype=torch.float64)
        x[:, 1] = -torch.inf
        x.requires_grad_()
        k = torch.zeros(N, dtype=torch.int64)
        results = []
        for fn in (bp.functional.cross_entropy, F.cross_entropy):
            y = fn(x, k)
            results.append((y, torch.autograd.grad(y, x)))
        close(*results)


def test_infinite_logits():
    """A logit of +inf makes its row NaN, as in torch; so does a row of -inf alone."""
    x = torch.tensor([[torch.inf, 0.0, 1.0], [-torch.inf] * 3, [0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([1, 1, 1])
    results = []
    for fn in (bp.functional.cross_entropy, F.cross_entropy):
        y = fn(x, k, reduction="none")
        results.append((y, torch.autograd.grad(y.sum(), x)))
    close(*results, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4)])
def test_weights_are_differentiable(reduction, smoothing, shape):
    """By class weights, with indices too, which torch refuses: against the definition in plain torch, twice."""

    def definition(x, w, k):
        logp, counts = x.log_softmax(1), k != 1
        r = (1 - smoothing) * F.one_hot(k, 3).movedim(-1, 1) + smoothing / 3
        l = -(w.reshape(-1, *(1,) * (x.dim() - 2)) * r * logp).sum(1) * counts
        return l if reduction == "none" else l.sum() if reduction == "sum" else l.sum() / (w[k] * counts).sum()

    def ours(x, w, k):
        return bp.functional.cross_entropy(x, k, w, ignore_index=1, reduction=reduction, label_smoothing=smoothing)

    torch.manual_seed(0)
    x, w = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.rand(3, dtype=torch.float64, requires_grad=True)
    k = torch.randint(0, 3, shape[:1] + shape[2:])
    results = []
    for fn in (ours, definition):
        y = fn(x, w, k)
        g = torch.autograd.grad(y.sin().sum(), (x, w), create_graph=True)
        results.append((y, g, torch.autograd.grad(sum(t.cos().sum() for t in g), (x, w))))
    close(*results)
    assert torch.autograd.gradcheck(lambda x, w: ours(x, w, k), (x, w), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("z_loss, softcap", [(0.2, None), (0.0, 1.5), (0.2, 1.5)])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4), (3,)])
def test_z_loss_and_softcap(reduction, smoothing, z_loss, softcap, shape):
    """Against the definition, twice: z² goes with the weight of the class, as ℓ does; an ignored sample has none."""

    def definition(x, w, k):
        x = x if softcap is None else softcap * (x / softcap).tanh()
        x, k = (x[None], k[None]) if x.dim() == 1 else (x, k)
        z, counts = x.logsumexp(1), k != 1
        r = (1 - smoothing) * F.one_hot(k, 3).double().movedim(-1, 1) + smoothing / 3
        l = (w.reshape(-1, *(1,) * (x.dim() - 2)) * r * (z.unsqueeze(1) - x)).sum(1) + z_loss * w[k] * z.square()
        l = l * counts
        if reduction == "none":
            return l.reshape(shape[:1] + shape[2:] if len(shape) > 1 else ())
        return l.sum() if reduction == "sum" else l.sum() / (w[k] * counts).sum()

    def ours(x, w, k):
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
        return bp.functional.cross_entropy(x, k, w, ignore_index=1, reduction=reduction, **options)

    torch.manual_seed(0)
    x, w = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.rand(3, dtype=torch.float64, requires_grad=True)
    k = torch.randint(0, 3, shape[:1] + shape[2:]) if len(shape) > 1 else torch.tensor(2)
    results = []
    for fn in (ours, definition):
        y = fn(x, w, k)
        g = torch.autograd.grad(y.sin().sum(), (x, w), create_graph=True)
        results.append((y, g, torch.autograd.grad(sum(t.cos().sum() for t in g), (x, w))))
    close(*results)
    assert torch.autograd.gradcheck(lambda x, w: ours(x, w, k), (x, w), check_forward_ad=True, check_batched_grad=True)


def test_a_class_that_is_almost_sure():
    """p − 1 of a class with p near 1, which is the gradient, is not a difference of near equals."""
    x = torch.tensor([[3.0, -3.0, -4.0]]) * 2
    x.requires_grad_()
    (dx,) = torch.autograd.grad(bp.functional.cross_entropy(x, torch.tensor([0])), x)
    (exact,) = torch.autograd.grad(F.cross_entropy(y := x.detach().double().requires_grad_(), torch.tensor([0])), y)
    close(dx.double(), exact, rtol=1e-2, atol=0)  # what is left is the rounding of 1 + Σ in the logarithm


def test_layout_of_the_gradient():
    """Pixels: the gradient has the layout that torch gives it, no transposed one."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
        k = torch.randint(3, (2, 4, 5))
        ours, theirs = (torch.autograd.grad(fn(x, k), x)[0] for fn in (bp.functional.cross_entropy, F.cross_entropy))
        assert ours.stride() == theirs.stride()


def test_indices_of_one_byte():
    x, k = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    close(bp.functional.cross_entropy(x, k.byte()), F.cross_entropy(x, k.byte()))


def test_large_logits_do_not_overflow():
    x = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    y = bp.functional.cross_entropy(x, torch.tensor([1]))
    assert y == 2e4
    close(torch.autograd.grad(y, x)[0], torch.tensor([[1.0, -1.0, 0.0]]))


def test_chunked_path_equals_the_plain_rule():
    """More than one chunk: the in-place path against the same rule with grad mode on."""
    torch.manual_seed(0)
    for smoothing, weighted in itertools.product((0.0, 0.2), (False, True)):
        x = torch.randn(1100, 300, dtype=torch.float64, requires_grad=True)
        k, w = torch.randint(0, 300, (1100,)), torch.rand(300, dtype=torch.float64) if weighted else None
        y = bp.functional.cross_entropy(x, k, w, ignore_index=7, label_smoothing=smoothing)
        (fast,) = torch.autograd.grad(y, x, retain_graph=True)
        (plain,) = torch.autograd.grad(y, x, create_graph=True)
        close(fast, plain.detach())
        close(fast, torch.autograd.grad(F.cross_entropy(x, k, w, ignore_index=7, label_smoothing=smoothing), x)[0])


def test_the_logits_are_what_is_kept():
    from bptoolkit.bench import saved_bytes

    x, k = torch.randn(64, 1000, requires_grad=True), torch.randint(0, 1000, (64,))
    assert saved_bytes(lambda: bp.functional.cross_entropy(x, k)) == 64 * 1000 * 4 + 64 * 8 + 2 * 64 * 4  # x, k, m, s


def test_modules():
    w = torch.rand(5)
    ours = bp.nn.CrossEntropyLoss(w, ignore_index=1, reduction="sum", label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(w, ignore_index=1, reduction="sum", label_smoothing=0.1)
    x, k = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    close(ours(x, k), theirs(x, k))
    ours.z_loss, ours.softcap = 0.1, 2.0
    close(ours(x, k), bp.functional.cross_entropy(x, k, w, None, 1, None, "sum", 0.1, z_loss=0.1, softcap=2.0))
    assert ours.state_dict().keys() == theirs.state_dict().keys() and repr(ours) == repr(theirs)
    x, t = torch.randn(4, 5), torch.randn(4, 5)
    close(bp.nn.MSELoss(reduction="sum")(x, t), torch.nn.MSELoss(reduction="sum")(x, t))
    assert repr(bp.nn.MSELoss()) == repr(torch.nn.MSELoss())


def test_deprecated_arguments():
    x, k = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    with pytest.warns(UserWarning, match="deprecated"):
        y = bp.functional.cross_entropy(x, k, size_average=False)
    close(y, F.cross_entropy(x, k, reduction="sum"))


def test_mse_broadcasts_with_a_warning():
    x, t = torch.randn(4, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    with pytest.warns(UserWarning, match="broadcast"):
        ours = bp.functional.mse_loss(x, t)
    with pytest.warns(UserWarning):
        theirs = F.mse_loss(x, t)
    close(torch.autograd.grad(ours, (x, t)), torch.autograd.grad(theirs, (x, t)))
    w, t = torch.rand(4, 5, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    for reduction in REDUCTIONS:  # the weights are those of the input, before broadcasting
        with pytest.warns(UserWarning):
            ours, theirs = (f(x, t, weight=w, reduction=reduction) for f in (bp.functional.mse_loss, F.mse_loss))
        close(ours, theirs)
        close(*(torch.autograd.grad(y.sin().sum(), (x, t, w)) for y in (ours, theirs)))


def test_mse_under_autocast():
    x, t, w = (torch.rand(4, 5).bfloat16() for _ in range(3))
    for kw in ({}, {"weight": w}):
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = bp.functional.mse_loss(x, t, **kw), F.mse_loss(x, t, **kw)
        assert ours.dtype == theirs.dtype


X, K = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda f: f.cross_entropy(X, torch.tensor([0, 1, 2, 9])), ValueError, r"target holds 9.*0\.\.4"),
        (lambda f: f.cross_entropy(X, torch.tensor([0, 1, 2, -3])), ValueError, "target holds -3"),
        (lambda f: f.cross_entropy(X, K[:3]), ValueError, r"\(3,\).*\(4, 5\)"),
        (lambda f: f.cross_entropy(X, K.int()), TypeError, "int32"),
        (lambda f: f.cross_entropy(X, X[:, :4]), ValueError, r"\(4, 4\)"),
        (lambda f: f.cross_entropy(X, X.double()), TypeError, "float64"),
        (lambda f: f.cross_entropy(X.long(), K), TypeError, "input is torch.int64"),
        (lambda f: f.cross_entropy(X, K, torch.rand(4)), ValueError, r"weight has shape \(4,\).*C=5"),
        (lambda f: f.cross_entropy(X, K, label_smoothing=1.5), ValueError, "1.5"),
        (lambda f: f.cross_entropy(X, K, z_loss=-0.1), ValueError, "z_loss=-0.1"),
        (lambda f: f.cross_entropy(X, K, softcap=0.0), ValueError, "softcap=0.0"),
        (lambda f: f.cross_entropy(X, X.softmax(1), z_loss=0.1), ValueError, "go with class indices"),
        (lambda f: f.cross_entropy(X, X.softmax(1), softcap=1.0), ValueError, "go with class indices"),
        (lambda f: f.cross_entropy(X, X.softmax(1), ignore_index=2), ValueError, "ignore_index=2"),
        (lambda f: f.cross_entropy(X[:, :0], K), ValueError, r"\(4, 0\), which has no classes"),
        (lambda f: f.cross_entropy(X, K, reduction="avg"), ValueError, "'avg'.*'mean'"),
        (lambda f: f.cross_entropy(X, K, backend="cuda"), ValueError, "'cuda'.*'triton'"),
        (lambda f: f.cross_entropy(X, K, backend="triton"), ValueError, "needs every tensor on the GPU"),
        (lambda f: f.cross_entropy(X, X.softmax(1), backend="triton"), ValueError, "no fused kernel"),
        (lambda f: f.mse_loss(X, X[:3]), ValueError, r"\(3, 5\).*\(4, 5\)"),
        (lambda f: f.mse_loss(X, X.double()), TypeError, "target is torch.float64"),
        (lambda f: f.mse_loss(X, X, weight=X[0]), ValueError, r"weight has shape \(5,\)"),
        (lambda f: f.mse_loss(X, 3.0), TypeError, "target must be a tensor"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(bp.functional)
