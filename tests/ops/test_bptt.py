"""What lstm, gru and rnn keep for backward, and how far their gradients go back."""

from __future__ import annotations

import functools
import io
import itertools

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jvp, vmap

import bptoolkit as bp
from bptoolkit.bench import saved_bytes
from bptoolkit.ops import bptt_plan

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
DOUBLE = torch.float64
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
each = pytest.mark.parametrize("name", GATES)
SEED = torch.tensor([12345, -678], dtype=torch.int32)
SAVES = ("gates", "outputs", "sparse", "segments", "least", "half")
TRUNCATIONS = (None, 2, (2, 3), (1, 4), (3, 9), "eprop", bp.ARTBP(0.4, SEED))


def draw(*shape, seed=1, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype).requires_grad_()


def call(name, T=7, B=3, I=2, H=3, *, L=1, D=1, P=0, dtype=DOUBLE):
    """The arguments of one call, with initial states."""
    weights, n = [], GATES[name] * H
    for k in range(L * D):
        shapes = [(n, D * (P or H) if k >= D else I), (n, P or H), (n,), (n,), *([(P, H)] if P else [])]
        weights += [draw(*s, seed=10 * k + j, dtype=dtype) for j, s in enumerate(shapes)]
    hx = tuple(draw(L * D, B, s, seed=90 + s, dtype=dtype) for s in ((P or H), H))
    kwargs = {"num_layers": L, "bidirectional": D == 2} | ({"proj_size": P} if P else {})
    return draw(T, B, I, seed=5, dtype=dtype), hx if name == "lstm" else hx[0], weights, kwargs


def leaves(x, hx, weights):
    return [x, *(hx if isinstance(hx, tuple) else (hx,)), *weights]


def flat(out):
    return [t for o in out for t in (o if isinstance(o, tuple) else (o,))]


def cotangents(out, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=DOUBLE).to(o) for o in out]


def pulled(fn, args, order=1, **kwargs):
    """Outputs, gradients, and their gradients by inputs and cotangents."""
    *args, options = args
    out, at = flat(fn(*args, **options, **kwargs)), leaves(*args)
    dys = [c.requires_grad_() for c in cotangents(out)]
    first = torch.autograd.grad(out, at, dys, create_graph=order > 1, allow_unused=True, materialize_grads=True)
    if order == 1:
        return out, first
    again = sum((g * c).sum() for g, c in zip(first, cotangents(first, 4)))
    return out, first, torch.autograd.grad(again, [*at, *dys], allow_unused=True, materialize_grads=True)


def bytes_of(save, name, T=7, B=3, H=3, P=0, dtype=DOUBLE):
    """A mode of saving, or of a share of what all gates take."""
    if save not in ("least", "half"):
        return save
    a, b = bptt_plan.sizes_of(name, B, H, P or H, dtype.itemsize)
    return a + a * -(-b // a) if save == "least" else b * T // 2


@each
@pytest.mark.parametrize("truncate", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_as_the_plain_loop(name, truncate, ragged):
    """Every way of saving gives the gradients, and their gradients, of a loop with `detach`, in both directions."""
    lengths = {"lengths": torch.tensor([4, 0, 5])} if ragged else {}
    args = call(name, T=5, D=2, P=2 * (name == "lstm" and not ragged))
    want = pulled(bp.OPS[name].reference, args, 2, truncate=truncate, **lengths)
    for save in SAVES:
        n = bytes_of(save, name, 5, P=args[3].get("proj_size", 0))
        order = 2 if save in ("sparse", "least") else 1  # the second order does not look at what was kept
        close(pulled(bp.OPS[name].call, args, order, truncate=truncate, save=n, **lengths), want[: order + 1])


@each
@pytest.mark.parametrize("truncate", [2, bp.ARTBP(0.5)], ids=["k", "ARTBP"])
def test_layers_packed_sequences_and_rows_alone(name, truncate):
    """Two layers, packed or with lengths or row by row: truncation counts from each row's own first step."""
    x, hx, weights, kwargs = call(name, T=6, B=2, L=2, D=2)
    lengths = [6, 3]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)

    def run(fn, x, hx=hx, **options):
        torch.manual_seed(1)
        y, _ = fn(x, hx, weights, truncate=truncate, **kwargs, **options)
        y = nn.utils.rnn.pad_packed_sequence(y)[0] if isinstance(y, nn.utils.rnn.PackedSequence) else y
        return y, torch.autograd.grad(y.sin().sum(), weights)

    want = run(bp.OPS[name].reference, x, lengths=torch.tensor(lengths))
    for save in ("gates", "segments"):
        close(run(bp.OPS[name].call, x, lengths=torch.tensor(lengths), save=save), want)
        close(run(bp.OPS[name].call, packed, save=save), want)
    if truncate == 2:
        alone = [
            run(bp.OPS[name].call, x[:n, b], tuple(h[:, b] for h in hx) if name == "lstm" else hx[:, b])[1]
            for b, n in enumerate(lengths)
        ]
        close(want[1], tuple(a + b for a, b in zip(*alone)))


@each
def test_truncation_changes_the_gradient_and_nothing_else(name):
    args = call(name)
    y, full = pulled(bp.OPS[name].call, args)
    for truncate in (2, (2, 3), "eprop", bp.ARTBP(0.4, SEED)):
        z, cut = pulled(bp.OPS[name].call, args, truncate=truncate)
        close(z, y, rtol=0, atol=0)
        assert not torch.allclose(cut[0], full[0])
    for truncate in ((3, 9), 7, 100, bp.ARTBP(0.0)):  # reaches everywhere
        close(pulled(bp.OPS[name].call, args, truncate=truncate), (y, full))


@each
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (2, 5), (1, 2), (4, 6)])
def test_how_far_a_gradient_goes_back(name, reverse, k1, k2):
    """The loss of step t reaches the inputs from the beginning of the window that owns t, and none before."""
    T, H = 9, 2
    x, hx, weights, _ = call(name, T=T, B=1, H=H, D=1 + reverse)
    x = torch.ones_like(x, requires_grad=True)
    y, _ = bp.OPS[name].call(x, hx, weights, bidirectional=reverse, truncate=(k1, k2))
    y = y[..., H:].flip(0) if reverse else y
    for t in range(T):
        (dx,) = torch.autograd.grad(y[t].sum(), x, retain_graph=True)
        reached = (dx.flip(0) if reverse else dx).ne(0).any(-1).flatten().tolist()
        begin = max(0, (t // k1 + 1) * k1 - k2)
        assert reached == [begin <= s <= t for s in range(T)]


def test_eprop_is_eligibility_traces():
    """Bellec et al. 2020, eq. 3-4 and 22: dW = sum of learning signal times a trace that runs forward; no loop goes back."""
    T, I, H = 6, 2, 3
    x, (h0, c0), weights, _ = call("lstm", T=T, B=1, I=I, H=H)
    y, _ = bp.functional.lstm(x, (h0, c0), weights, truncate="eprop")
    L = torch.randn(T, H, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    got = torch.autograd.grad(y[:, 0], weights[:2], L)
    wi, wh, bi, bh = (w.detach() for w in weights)
    h, c, trace, want = h0.detach()[0, 0], c0.detach()[0, 0], torch.zeros(4 * H, I + H, dtype=DOUBLE), 0
    for t in range(T):
        z = torch.cat([x[t, 0].detach(), h])
        i, f, g, o = (torch.cat([wi, wh], 1) @ z + bi + bh).chunk(4)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        into_c = torch.cat([g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), torch.zeros(H, dtype=DOUBLE)])
        c = f * c + i * g
        trace = f.repeat(4)[:, None] * trace + into_c[:, None] * z
        h = o * c.tanh()
        through_c = (L[t] * o * (1 - c.tanh() ** 2)).repeat(4)[:, None] * trace
        through_o = torch.cat([torch.zeros(3 * H, dtype=DOUBLE), L[t] * c.tanh() * o * (1 - o)])[:, None] * z
        want = want + through_c + through_o
    close(torch.cat(got, 1), want)


# --- ARTBP ----------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("reverse", [False, True])
def test_artbp_is_unbiased(name, reverse):
    """20 000 rows that are alike, each with cuts of its own: their mean gradient is the full one, within 5 standard errors."""
    N, T, H = 20_000, 5, 2
    x, hx, weights, _ = call(name, T=T, B=1, H=H, D=1 + reverse)
    hs = hx if isinstance(hx, tuple) else (hx,)

    def gradients(n, truncate):
        rows = x.detach().expand(T, n, -1).clone().requires_grad_()
        h = tuple(t.detach().expand(-1, n, -1).clone().requires_grad_() for t in hs)
        y, _ = bp.OPS[name].call(rows, h if name == "lstm" else h[0], weights, bidirectional=reverse, truncate=truncate)
        return torch.autograd.grad(y[..., -H:][0 if reverse else -1].sum(), [rows, *h])

    for g, full in zip(gradients(N, bp.ARTBP(0.3, SEED)), gradients(1, None)):
        error = (g.mean(1, keepdim=True) - full).abs()
        assert (error <= 5 * g.std(1, keepdim=True) / N**0.5 + 1e-12).all()
        assert g.std(1).max() > 0 and error.norm() < 0.1 * full.norm()


@each
@pytest.mark.parametrize("save", ["gates", "segments"])
def test_artbp_draws_once_in_forward(name, save):
    """Backward twice is the same, the seed is torch's, layers and directions differ, and the generator is left alone."""
    args = call(name, T=12)

    def run(seed):
        torch.manual_seed(seed)
        x, hx, weights, _ = args
        y, _ = bp.OPS[name].call(x, hx, weights, truncate=bp.ARTBP(0.5), save=save)
        state = torch.get_rng_state()
        first, again = (torch.autograd.grad(y.sum(), [x, *weights], retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again)) and torch.equal(torch.get_rng_state(), state)
        return first[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


# --- what is kept ----------------------------------------------------------------------------------------------------------


def kept(name, args, **options):
    x, hx, weights, kwargs = args
    at = [*leaves(x, hx, weights)]
    return saved_bytes(lambda: bp.OPS[name].call(x, hx, weights, **kwargs, **options), at)


@each
@pytest.mark.parametrize("proj", [0, 5])
def test_kept_bytes(name, proj):
    """Each mode keeps what its plan says, beside the bias and the initial state; a budget is kept, for every budget."""
    T, B, I, H = 40, 4, 3, 16
    P = proj if name == "lstm" else 0
    args = call(name, T, B, I, H, P=P, dtype=torch.float32)
    a, b = bptt_plan.sizes_of(name, B, H, P or H, 4)
    other = 4 * GATES[name] * H * (name != "gru") + 2 * B * 4 * H  # the sum of the biases; views and copies of h0, c0
    for save in ("gates", "outputs", "sparse", "segments"):
        plan = bp.bptt_plan(name, T, B, H, save, proj_size=P)
        assert plan.saved <= kept(name, args, save=save) <= plan.saved + other
    assert kept(name, args, save="segments") <= T**0.5 * a * (b / a) ** 0.5 + a + other
    least, seen = a + a * -(-b // a), []
    for budget in (least, least + a, 3 * least, b * T // 4, b * T // 2, b * T - 1, b * T, 10 * b * T):
        plan = bp.bptt_plan(name, T, B, H, budget, proj_size=P)
        got = kept(name, args, save=budget)
        assert plan.saved <= got <= plan.saved + other
        assert plan.saved <= budget and plan.peak <= budget and sum(p.steps for p in plan.pieces) == T
        seen.append(plan.recomputed)
    assert seen == sorted(seen, reverse=True) and seen[0] > T and seen[-1] == seen[-2] == 0
    with pytest.raises(ValueError, match=f"save={least - 1} bytes do not suffice for {T} steps.*the least is {least}$"):
        bp.OPS[name].call(*args[:3], save=least - 1, **args[3])


def test_budget_beside_what_is_saved():
    """With no bias and no initial state the hooks count exactly what the layer makes."""
    x, _, weights, _ = call("lstm", 40, 4, 3, 16, dtype=torch.float32)
    zeros = 2 * 4 * 16 * 4
    for budget in (2048, 5000, 20000, 40000):
        at = [x, *weights]
        assert saved_bytes(lambda n=budget: bp.functional.lstm(x, None, weights[:2], bias=False, save=n), at) <= budget + zeros


def test_sparse_keeps_less_than_outputs_and_segments_not_the_output():
    args = call("lstm", 64, 2, 3, 8)
    outputs, sparse, segments = (kept("lstm", args, save=s) for s in ("outputs", "sparse", "segments"))
    assert segments < 0.3 * outputs and 0.5 * outputs < sparse < 0.65 * outputs
    y, _ = bp.functional.lstm(*args[:3], save="segments")
    seen = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.add(t.untyped_storage().data_ptr()), t)[1], lambda t: t):
        y, _ = bp.functional.lstm(*args[:3], save="segments")
    assert y.untyped_storage().data_ptr() not in seen


@pytest.mark.parametrize(("a", "b"), [(2, 6), (1, 5), (1, 1), (3, 7)])
def test_plans_are_the_best_there_are(a, b):
    """The dynamic programme against the recursion of its docstring, tried out; carrying a plan out costs what it says."""

    @functools.cache
    def best(t, m):
        if r * t <= m:
            return t
        tried = [j + best(t - j, m - 1) + best(j, m) for j in range(1, t) if m > 0]
        tried += [j + best(t - j, m - 1 - r * j) for j in range(1, t) if m > r * j]
        return min(tried, default=float("inf"))

    r = -(-b // a)
    for T in range(1, 9):
        for budget in range(min(b * T, a + a * r), b * T + 2):
            pieces = bptt_plan.pieces_of("plan", T, budget, a, b)
            peak, steps = bptt_plan.cost(pieces, a, b)
            assert peak <= budget
            assert steps == (T if b * T <= budget else best(T, budget // a))


def test_long_plans_are_made_in_blocks():
    a, b = bptt_plan.sizes_of("lstm", 1, 1, 1, 4)
    for T, budget in ((3000, 3000), (3001, 20000), (10**4, 10**4)):
        pieces = bptt_plan.pieces_of("plan", T, budget, a, b)
        peak, steps = bptt_plan.cost(pieces, a, b, True)
        assert peak <= budget and sum(p.steps for p in pieces) == T and T < steps < 4 * T
    K = [p.steps for p in bp.bptt_plan("lstm", 1024, 1, 256).pieces]
    assert max(K) == round((1024 / 3) ** 0.5) and bp.bptt_plan("lstm", 1024, 1, 256).recomputed == 1024


# --- with torch's tools ------------------------------------------------------------------------------------------------------

WITH = [("gates", (1, 3)), ("sparse", None), ("segments", "eprop"), ("segments", bp.ARTBP(0.4, SEED)), (4000, None)]


@each
@pytest.mark.parametrize(("save", "truncate"), WITH, ids=str)
def test_transforms(name, save, truncate):
    """grad, forward mode, vmap of them over samples and over weights, and a Hessian."""
    x, hx, weights, _ = call(name, T=4)
    xs = torch.stack([x.detach(), x.detach().cos()])
    whs = torch.stack([weights[1].detach(), weights[1].detach().sin()])

    def loss(fn, **options):
        def of(x, wh):
            return sum(o.sin().sum() for o in flat(fn(x, hx, [weights[0], wh, *weights[2:]], truncate=truncate, **options)))

        return of

    ours, plain = loss(bp.OPS[name].call, save=save), loss(bp.OPS[name].reference)
    at = (x.detach(), weights[1].detach())
    close(grad(ours, (0, 1))(*at), grad(plain, (0, 1))(*at))
    close(jvp(ours, at, at), jvp(plain, at, at))
    close(vmap(grad(ours, (0, 1)), (0, None))(xs, at[1]), vmap(grad(plain, (0, 1)), (0, None))(xs, at[1]))
    close(vmap(grad(ours, (0, 1)), (None, 0))(at[0], whs), vmap(grad(plain, (0, 1)), (None, 0))(at[0], whs))
    close(hessian(ours)(*at), torch.func.jacrev(torch.func.jacrev(plain))(*at))


@pytest.mark.parametrize(("save", "truncate"), WITH, ids=str)
def test_compile(save, truncate):
    torch._dynamo.reset()
    module = bp.nn.LSTM(2, 3, dtype=DOUBLE)
    module.save, module.truncate = save, truncate
    compiled = torch.compile(lambda x: module(x)[0], fullgraph=True, backend="aot_eager")
    x = draw(6, 2, 2)
    results = [torch.autograd.grad(f(x).sin().sum(), [x, *module.parameters()]) for f in (compiled, lambda x: module(x)[0])]
    close(*results)


@each
@pytest.mark.parametrize("truncate", [None, (2, 3), bp.ARTBP(0.4, SEED)], ids=str)
def test_what_lies_past_a_length_is_never_read(name, truncate):
    lengths = torch.tensor([2, 4, 0])
    past = (torch.arange(5)[:, None] >= lengths)[..., None]
    results = []
    for garbage in (0.0, float("nan")):
        x, hx, weights, kwargs = call(name, T=5, D=2)
        x = x.detach().masked_fill(past, garbage).requires_grad_()
        y, _ = bp.OPS[name].call(x, hx, weights, lengths=lengths, truncate=truncate, save="segments", **kwargs)
        dy = torch.ones_like(y).masked_fill(past, garbage)
        first = torch.autograd.grad(y, [x, *weights], dy, create_graph=True)
        results.append([y, *first, *torch.autograd.grad(sum(t.square().sum() for t in first), [x, *weights])])
    close(*results)
    assert all(t.isfinite().all() for t in results[1])


# --- modules and errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_modules(kind):
    """The attributes have defaults in the class, also after a swap; an instance's own are pickled."""
    model = nn.ModuleDict({"rnn": getattr(nn, kind)(2, 3, dtype=DOUBLE)})
    bp.swap(model)
    module, x = model["rnn"], draw(6, 2, 2)
    assert (module.save, module.truncate) == ("gates", None)
    full = torch.autograd.grad(module(x)[0].sum(), x)
    module.save, module.truncate = "segments", bp.ARTBP(0.5, SEED)
    cut = torch.autograd.grad(module(x)[0].sum(), x)
    assert not torch.allclose(full[0], cut[0])
    torch.save(module, file := io.BytesIO())
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    close(torch.autograd.grad(again(x)[0].sum(), x), cut)
    with torch.no_grad():
        assert not again(x)[0].requires_grad


@each
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"save": "all"}, ValueError, "save='all' is not known"),
        ({"save": 1.5}, ValueError, "save=1.5 is not known"),
        ({"save": True}, ValueError, "save=True is not known"),
        ({"save": 0}, ValueError, "save=0 bytes; a budget is positive"),
        ({"truncate": 0}, ValueError, r"truncate=\(0, 0\); it needs 1 <= k1 <= k2"),
        ({"truncate": (3, 2)}, ValueError, r"truncate=\(3, 2\); it needs 1 <= k1 <= k2"),
        ({"truncate": (1, 2, 3)}, TypeError, r"truncate=\(1, 2, 3\) must be None, k"),
        ({"truncate": 2.0}, TypeError, "truncate=2.0 must be None, k"),
        ({"truncate": "rtrl"}, ValueError, "truncate='rtrl' is not known"),
        ({"truncate": bp.ARTBP(1.0)}, ValueError, r"truncate=ARTBP\(p=1.0\); the probability of a cut lies in \[0, 1\)"),
    ],
    ids=str,
)
def test_errors(name, options, error, match):
    x, hx, weights, _ = call(name)
    with pytest.raises(error, match=f"^{name}: {match}"):
        bp.OPS[name].call(x, hx, weights, **options)


def test_sizes_of_zero_and_one():
    for name, (T, B) in itertools.product(GATES, ((1, 1), (1, 0), (4, 0))):
        for save, truncate in itertools.product(("gates", "sparse", "segments", 10**6), (None, (1, 3), bp.ARTBP(0.5, SEED))):
            args = call(name, T, B)
            close(
                pulled(bp.OPS[name].call, args, save=save, truncate=truncate),
                pulled(bp.OPS[name].reference, args, truncate=truncate),
            )
