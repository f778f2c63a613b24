"""What is special to the losses of regression, probabilities and margins, and to linear_cross_entropy."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import bptoolkit as bp

close = torch.testing.assert_close
f = bp.functional
REDUCTIONS = ("none", "mean", "sum")


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def both(ours, theirs, *leaves):
    """The value and the gradients of two functions, compared."""
    results = []
    for fn in (ours, theirs):
        y = fn()
        results.append((y, torch.autograd.grad(y.sum(), leaves, allow_unused=True)))
    close(*results, equal_nan=True)


@pytest.mark.parametrize("name", ["l1_loss", "smooth_l1_loss", "huber_loss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kinks_are_torchs(name, reduction):
    e = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 0.5], dtype=torch.float64)
    x, t = e.requires_grad_(), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    both(*(lambda fn=fn: fn(x, t, reduction=reduction) for fn in (getattr(f, name), getattr(F, name))), x, t)


@pytest.mark.parametrize("name", ["l1_loss", "huber_loss"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_with_broadcasting(name, reduction):
    x, t, w = double(4, 5), double(3, 4, 5), double(4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both(*(lambda fn=fn: fn(x, t, weight=w, reduction=reduction) for fn in (getattr(f, name), getattr(F, name))), x, t, w)


def test_the_clamp_of_the_variance_passes_gradients():
    x, t, v = double(6), double(6), torch.tensor([0.0, 1e-9, 0.1, 0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    both(*(lambda fn=fn: fn(x, t, v, eps=0.3, full=True) for fn in (f.gaussian_nll_loss, F.gaussian_nll_loss)), x, t, v)


def test_counts():
    """Integer counts, and the gradient by a count of 0, where torch's is NaN."""
    x, k = double(5), torch.arange(5)
    both(*(lambda fn=fn: fn(x, k, full=True) for fn in (f.poisson_nll_loss, F.poisson_nll_loss)), x)
    t = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = f.poisson_nll_loss(torch.zeros(3, dtype=torch.float64), t, full=True, reduction="sum")
    (g,) = torch.autograd.grad(y, t)
    close(g, torch.tensor([0.0, 0.0, torch.tensor(3.0).double().log() + 1 / 6], dtype=torch.float64))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_by_its_weights(reduction):
    """Which torch refuses: against the definition, ignored classes and all; and nothing of N C is kept."""
    x, w, k = double(6, 3, 2), double(3), torch.randint(3, (6, 2))

    def definition():
        l = -(w[k] * (k != 1)) * x.gather(1, k.unsqueeze(1)).squeeze(1)
        return l if reduction == "none" else l.sum() / (1 if reduction == "sum" else (w[k] * (k != 1)).sum())

    both(lambda: f.nll_loss(x, k, w, ignore_index=1, reduction=reduction), definition, x, w)
    from bptoolkit.bench import saved_bytes

    x, k = torch.randn(64, 1000, requires_grad=True), torch.randint(1000, (64,))
    assert saved_bytes(lambda: f.nll_loss(x, k)) == 64 * 8


def test_certain_probabilities():
    """At 0 and 1 the logs are clamped, and so is the denominator of the gradient."""
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-30], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    for reduction in REDUCTIONS:
        args = {"reduction": reduction, "weight": torch.rand(5, dtype=torch.float64)}
        both(*(lambda m=m, kw=args: m.binary_cross_entropy(x, t, **kw) for m in (f, F)), x)
    (g,) = torch.autograd.grad(f.binary_cross_entropy(x, t, reduction="sum"), t)
    close(g[:4], torch.tensor([100.0, -100.0, 100.0, -100.0], dtype=torch.float64))  # torch's are infinite
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        f.binary_cross_entropy(x + 1, t)


def test_large_logits():
    x = torch.tensor([1e4, -1e4, torch.inf, -torch.inf], dtype=torch.float64, requires_grad=True)
    t, fns = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64), (f, F)
    both(*(lambda m=m: m.binary_cross_entropy_with_logits(x, t, reduction="none") for m in fns), x)
    y = f.soft_margin_loss(x[:2], torch.tensor([-1, 1]), reduction="none")  # torch's is inf
    close(y, torch.tensor([1e4, 1e4], dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div(reduction, log_target):
    x, t = double(4, 5), torch.randn(4, 5, dtype=torch.float64).softmax(1)
    t = (t.log() if log_target else t).requires_grad_()
    kw = {"reduction": reduction, "log_target": log_target}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both(*(lambda m=m: m.kl_div(x, t, **kw) for m in (f, F)), x, t)
    if not log_target:  # no mass at a class: no loss, no gradient by the input
        y = f.kl_div(x, torch.zeros(4, 5, dtype=torch.float64), reduction="sum")
        assert y == 0 and not torch.autograd.grad(y, x)[0].any()


def test_mean_of_kl_div_warns():
    with pytest.warns(UserWarning, match="batchmean"):
        f.kl_div(torch.zeros(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_margins_at_their_kinks(reduction):
    a, y = torch.zeros(3, dtype=torch.float64, requires_grad=True), torch.tensor([1, -1, 1])
    both(*(lambda m=m: m.margin_ranking_loss(a, a * 2, y, reduction=reduction) for m in (f, F)), a)
    both(*(lambda m=m: m.hinge_embedding_loss(a + 1, y * 2 - 1, reduction=reduction) for m in (f, F)), a)
    k, x = torch.tensor([0, 2]), torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    for p in (1, 2):
        both(*(lambda m=m, p=p: m.multi_margin_loss(x, k, p=p, reduction=reduction) for m in (f, F)), x)
    k = torch.tensor([[1, 1, -1], [-1, 2, 0]])  # a label twice; none at all
    both(*(lambda m=m: m.multilabel_margin_loss(x, k, reduction=reduction) for m in (f, F)), x)
    both(*(lambda m=m: m.cosine_embedding_loss(x, 2 * x, y[:2], reduction=reduction) for m in (f, F)), x)


@pytest.mark.parametrize("p", [1, 2, 3.5, float("inf")])
@pytest.mark.parametrize("swap", [False, True])
def test_triplets(p, swap):
    a, b, c = double(7, 4), double(7, 4), double(7, 4)
    both(*(lambda m=m: m.triplet_margin_loss(a, b, c, p=p, swap=swap, reduction="none") for m in (f, F)), a, b, c)
    both(lambda: f.triplet_margin_loss(a, a, b, eps=0.0, p=p), lambda: F.triplet_margin_loss(a, a, b, eps=0.0, p=p), a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_in_chunks(monkeypatch, reduction, smoothing, weighted):
    """Several chunks, the last one shorter: against the two ops that hold all logits."""
    monkeypatch.setattr("bptoolkit.ops.linear_cross_entropy.CHUNK", 40)
    monkeypatch.setattr("bptoolkit.ops.linear_cross_entropy.LEAST", 3)
    x, w, b, k = double(20, 4), double(11, 4), double(11), torch.randint(11, (20,))
    v = torch.rand(11, dtype=torch.float64) if weighted else None
    kw = {"reduction": reduction, "label_smoothing": smoothing, "weight": v}
    both(
        lambda: f.linear_cross_entropy(x, w, k, linear_bias=b, ignore_index=3, **kw),
        lambda: F.cross_entropy(F.linear(x, w, b), k, ignore_index=3, **kw),
        *(x, w, b),
    )
    y = f.linear_cross_entropy(x, w, k, linear_bias=b, **kw).sum()
    fast = torch.autograd.grad(y, (x, w, b), retain_graph=True)
    close(fast, torch.autograd.grad(y, (x, w, b), create_graph=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("z_loss, softcap", [(0.3, None), (0.0, 1.5), (0.3, 1.5)])
def test_z_loss_and_softcap_in_chunks(monkeypatch, reduction, z_loss, softcap):
    """The maths written out, by class weights too, to second order; chunks as above."""
    monkeypatch.setattr("bptoolkit.ops.linear_cross_entropy.CHUNK", 20)
    monkeypatch.setattr("bptoolkit.ops.linear_cross_entropy.LEAST", 3)
    x, w, b, v, k = double(8, 3), double(5, 3), double(5), torch.rand(5).double() + 0.5, torch.tensor([0, 1, 4, 2, 1, 3, 0, 1])
    kw = {"linear_bias": b, "ignore_index": 1, "reduction": reduction, "label_smoothing": 0.2}

    def ours(x, v):
        return f.linear_cross_entropy(x, w, k, weight=v, z_loss=z_loss, softcap=softcap, **kw)

    def plain(x, v):
        t = F.linear(x, w, b)
        t = t if softcap is None else softcap * torch.tanh(t / softcap)
        share = 0.8 * F.one_hot(k, 5).double() + 0.2 / 5
        l = (k != 1) * (z_loss * v[k] * t.logsumexp(1) ** 2 - (share * v * t.log_softmax(1)).sum(1))
        return l if reduction == "none" else l.sum() / (1 if reduction == "sum" else (v[k] * (k != 1)).sum())

    for fn in (torch.func.jacrev, torch.func.jacfwd, lambda g, at: torch.func.jacrev(torch.func.jacrev(g, at), at)):
        close(fn(ours, (0, 1))(x, v), fn(plain, (0, 1))(x, v), rtol=1e-9, atol=1e-11)
    y = ours(x, v).sum()
    close(torch.autograd.grad(y, (x, w, b)), torch.autograd.grad(plain(x, v).sum(), (x, w, b)))  # in place


def test_z_loss_and_softcap_say_what_is_wrong():
    x, w, k = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for kw, words in (
        ({"z_loss": -1.0}, "z_loss=-1.0 is not at least 0"),
        ({"softcap": 0.0}, "softcap=0.0 is not above 0"),
        ({"softcap": float("nan")}, "softcap=nan is not above 0"),
    ):
        with pytest.raises(ValueError, match=f"linear_cross_entropy: {words}"):
            f.linear_cross_entropy(x, w, k, **kw)
    with pytest.raises(ValueError, match=r"z_loss=0.1 and softcap=None go with class indices .*not with class probabilities"):
        f.linear_cross_entropy(x, w, torch.rand(3, 5), z_loss=0.1)
    with pytest.raises(ValueError, match=r"softcap=2.0 go with class indices .*not with a loss of 1 more dimensions"):
        f.linear_cross_entropy(x, torch.randn(5, 2, 4), torch.zeros(3, 2, dtype=torch.long), softcap=2.0)


def test_linear_cross_entropy_keeps_its_inputs():
    from bptoolkit.bench import saved_bytes

    x, w, k = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True), torch.randint(1000, (64,))
    assert saved_bytes(lambda: f.linear_cross_entropy(x, w, k)) == 4 * (64 * 8 + 1000 * 8) + 64 * 8


def test_linear_cross_entropy_of_several_dimensions_and_of_probabilities():
    x, w = double(6, 4), double(3, 2, 4)
    k, a = torch.randint(3, (6, 2)), lambda: F.linear(x, w.reshape(6, 4)).reshape(6, 3, 2)
    both(lambda: f.linear_cross_entropy(x, w, k), lambda: F.cross_entropy(a(), k), x, w)
    q = torch.rand(6, 3, 2, dtype=torch.float64)
    both(lambda: f.linear_cross_entropy(x, w, q), lambda: F.cross_entropy(a(), q), x, w)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has the module from 2.13 on")
def test_module_of_linear_cross_entropy():
    ours, theirs = (m.LinearCrossEntropyLoss(4, 5, bias=True, label_smoothing=0.1) for m in (bp.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    x, k = torch.randn(6, 4), torch.randint(5, (6,))
    close(ours(x, k), theirs(x, k))


def test_modules():
    x, t, y, k, w = torch.randn(4, 5), torch.rand(4, 5), torch.ones(4), torch.tensor([0, 1, 2, 3]), torch.rand(5)
    for make, args in (
        (lambda m: m.L1Loss(reduction="sum"), (x, t)),
        (lambda m: m.SmoothL1Loss(beta=0.3), (x, t)),
        (lambda m: m.HuberLoss(delta=0.3), (x, t)),
        (lambda m: m.PoissonNLLLoss(full=True), (x, t)),
        (lambda m: m.GaussianNLLLoss(eps=0.1), (x, t, t)),
        (lambda m: m.NLLLoss(w, ignore_index=2), (x, k)),
        (lambda m: m.KLDivLoss(reduction="batchmean", log_target=True), (x, t)),
        (lambda m: m.BCELoss(w), (t, t)),
        (lambda m: m.BCEWithLogitsLoss(w, pos_weight=w), (x, t)),
        (lambda m: m.MarginRankingLoss(0.3), (x[:, 0], x[:, 1], y)),
        (lambda m: m.HingeEmbeddingLoss(0.3), (x, t.round() * 2 - 1)),
        (lambda m: m.SoftMarginLoss(), (x, t)),
        (lambda m: m.MultiLabelSoftMarginLoss(w), (x, t)),
        (lambda m: m.MultiMarginLoss(2, 0.3, w), (x, k)),
        (lambda m: m.MultiLabelMarginLoss(), (x, k.repeat(5).reshape(4, 5) - 1)),
        (lambda m: m.CosineEmbeddingLoss(0.3), (x, t, y)),
        (lambda m: m.TripletMarginLoss(0.3, 1.0, swap=True), (x, t, -x)),
    ):
        ours, theirs = make(bp.nn), make(torch.nn)
        close(ours(*args), theirs(*args))
        assert ours.state_dict().keys() == theirs.state_dict().keys() and repr(ours) == repr(theirs)


X, K = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: f.l1_loss(X, X[:3]), ValueError, r"l1_loss: target has shape \(3, 5\).*\(4, 5\)"),
        (lambda: f.l1_loss(X, X, weight=X[0]), ValueError, r"weight has shape \(5,\)"),
        (lambda: f.smooth_l1_loss(X, X, beta=-1.0), ValueError, "beta=-1.0"),
        (lambda: f.huber_loss(X, X, delta=0.0), ValueError, "delta=0.0"),
        (lambda: f.huber_loss(X, X, reduction="avg"), ValueError, "'avg'.*'mean'"),
        (lambda: f.poisson_nll_loss(X, X.double()), TypeError, "target is torch.float64"),
        (lambda: f.gaussian_nll_loss(X, X, -X.abs()), ValueError, "negative entry"),
        (lambda: f.gaussian_nll_loss(X, X, torch.ones(4, 4)), ValueError, r"var has shape \(4, 4\)"),
        (lambda: f.nll_loss(X, K + 2), ValueError, "nll_loss: target holds 5"),
        (lambda: f.nll_loss(X, X), TypeError, "must be int64 or uint8"),
        (lambda: f.kl_div(X, X, reduction="avg"), ValueError, "'batchmean'"),
        (lambda: f.binary_cross_entropy(X, X[0]), ValueError, r"\(5,\) but input \(4, 5\)"),
        (lambda: f.binary_cross_entropy_with_logits(X, X, pos_weight=X[:, 0]), ValueError, r"pos_weight has shape \(4,\)"),
        (lambda: f.margin_ranking_loss(X, X, X[0]), ValueError, r"target \(5,\)"),
        (lambda: f.multi_margin_loss(X, K, p=3), ValueError, "p=3"),
        (lambda: f.multilabel_margin_loss(X, torch.full((4, 5), 5)), ValueError, "5; they must be −1"),
        (lambda: f.cosine_embedding_loss(X, X, X), ValueError, r"\(N, D\)"),
        (lambda: f.triplet_margin_loss(X, X, X, margin=0.0), ValueError, "margin=0.0"),
        (lambda: f.linear_cross_entropy(X, X[:, :3], K), ValueError, "I is 5 in input.*3 in linear_weight"),
        (lambda: f.linear_cross_entropy(X, X, K + 2), ValueError, "target holds 4|target holds 5"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_linear_cross_entropy_by_its_weights(monkeypatch, reduction, smoothing):
    """torch cannot differentiate by class weights; here is the sum written out, to second order and in forward mode."""
    monkeypatch.setattr("bptoolkit.ops.linear_cross_entropy.CHUNK", 40)
    monkeypatch.setattr("bptoolkit.ops.linear_cross_entropy.LEAST", 3)
    torch.manual_seed(0)
    x, w, v = (torch.randn(s, dtype=torch.float64) for s in ((8, 3), (5, 3), (5,)))
    v, k = v.abs() + 0.5, torch.tensor([0, 1, 4, 2, 1, 3, 0, 1])

    def ours(x, v):
        return f.linear_cross_entropy(x, w, k, weight=v, ignore_index=1, reduction=reduction, label_smoothing=smoothing)

    def plain(x, v):
        logp, counts = torch.log_softmax(x @ w.T, 1), (k != 1).double()
        share = (1 - smoothing) * F.one_hot(k, 5).double() + smoothing / 5
        l = -(share * v * logp).sum(1) * counts
        return l if reduction == "none" else l.sum() / (1 if reduction == "sum" else (v[k] * counts).sum())

    for fn in (torch.func.jacrev, torch.func.jacfwd, lambda g, at: torch.func.jacrev(torch.func.jacrev(g, at), at)):
        torch.testing.assert_close(fn(ours, (0, 1))(x, v), fn(plain, (0, 1))(x, v), rtol=1e-9, atol=1e-11)
