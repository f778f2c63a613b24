"""The kernels of attention's second order beside the eager rule, torch's own autograd, and themselves in other modes."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from fused import LAYOUTS, double, each_dtype, near, normal
from torch import Tensor, nn
from torch.autograd.functional import vhp
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import bptoolkit as bp
from bptoolkit.ops import attention_plain as plain
from bptoolkit.ops.attention_rule import double_fast, shared
from bptoolkit.ops.attention_tiles import CAUSAL, EVERYWHERE
from bptoolkit.triton_kernels import attention as first
from bptoolkit.triton_kernels import attention_double as file
from bptoolkit.triton_kernels import attention_layout as layout
from bptoolkit.triton_kernels.operator import REGISTERED as registered

sdpa = bp.functional.scaled_dot_product_attention
BOTTOM = (-1, 0, 1)  # causal, the last query at the last key
GIVEN, ALL = "abc", "olqkv"  # the cotangents that come, and the gradients that are wanted


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 rows and columns; float32 in the form that half precision has, for the sake of exact comparisons."""
    tiles_of(monkeypatch, 16, 32)


def tiles_of(monkeypatch, size, first_size, split=False, part=0):
    monkeypatch.setattr(file, "tile", lambda *_: layout.Tile(size, size, 4, 1))
    monkeypatch.setattr(layout, "tile", lambda *_: layout.Tile(first_size, first_size, 4, 1))
    monkeypatch.setattr(file, "split", lambda *_: split)
    monkeypatch.setattr(file, "part", lambda *_: part)


@pytest.fixture
def ran(monkeypatch):
    """How often each of the kernels' launchers was called."""
    counts = Counter()

    def counted(name, f):
        return lambda *a: (counts.update([name]), f(*a))[1]

    for name, module in (("FORWARD", first), ("BACKWARD", first), ("DOUBLE", file)):
        monkeypatch.setattr(module, name, counted(name.lower(), getattr(module, name)))
    return counts


def run(
    L,
    S,
    E=8,
    EV=None,
    *,
    B=(1,),
    of=None,
    dtype=torch.float32,
    device="cpu",
    given=GIVEN,
    need=ALL,
    errors=40,
    m=None,
    slopes=None,
    lengths=None,
    window=EVERYWHERE,
    scale=None,
    cap=0.0,
    dlse=True,
    lay=lambda t: t,
    laid="qkvdabc",
):
    """The kernels' vjp of backward beside the eager loops' in float64; of: the batch dimensions of k and v."""
    EV = EV or E
    rows, columns = (*B, L), (*(of or B), S)
    shapes = ((*rows, E), (*columns, E), (*columns, EV), (*rows, EV), (*rows, E), (*columns, E), (*columns, EV))
    every = (normal(*s, dtype=dtype, device=device, seed=n) for n, s in enumerate(shapes))
    q, k, v, do, a, b, c = (lay(t) if x in laid else t for x, t in zip("qkvdabc", every))
    f = None if slopes is None else normal(*slopes.shape, dtype=slopes.dtype, device=device, seed=9)
    return run_of(
        q,
        k,
        v,
        do,
        (a, b, c, f),
        given,
        need,
        errors,
        dlse,
        m=m,
        slopes=slopes,
        lengths=lengths,
        window=window,
        scale=scale,
        cap=cap,
    )


def run_of(q, k, v, do, moves, given, need, errors, dlse, *, m, slopes, lengths, window, scale, cap):
    moves = [t if x in given else None for x, t in zip("abcf", moves)]
    slope, options = ([slopes], [list(window), scale, cap, 0.0])
    dlse = normal(*q.shape[:-1], device=str(q.device), seed=8) if dlse else None
    only_v = set(given) == {"c"} and set(need) <= {"o", "v"}
    exact = double([q, k, v, m, *slope])
    o, _, top, l = plain.forward(
        exact[0], shared(exact[1], q), shared(exact[2], q), exact[3], exact[4], lengths, *(None,) * 3, *options
    )
    o, top, l = o.to(q.dtype), top.float(), l.float()
    args = [do, dlse, q, k, v, m, *slope, lengths, *(None,) * 3, o, top, l, *options, "qkvms"]
    if only_v:
        args[4] = args[11] = None
    kept = [t.clone() if isinstance(t, Tensor) else t for t in (*moves, *args)]
    a, b, c, f = moves
    got = file._double(a, b, c, None, f, need, args)
    again = file._double(a, b, c, None, f, need, args) if q.shape[-2] <= 17 else got  # which costs the interpreter time
    a, b, c, f = double(moves)
    want = double_fast(a, b, c, None, f, need, double(args))
    like = (do.dtype, torch.float32, q.dtype, q.dtype, q.dtype, None, None if slopes is None else slopes.dtype)
    for letter, g, w, dtype, same in zip(("do", "dlse", "q", "k", "v", "m", "slopes"), got, want, like, again):
        near(g, w, dtype, errors, f"g_{letter}")
        assert g is None or torch.equal(g.nan_to_num(), same.nan_to_num()), "another run gives other bits"
    for t, old in zip((*moves, *args), kept):
        assert not isinstance(t, Tensor) or torch.equal(t.nan_to_num(), old.nan_to_num()), "an input was written to"
    return got


@pytest.mark.parametrize("window", [EVERYWHERE, CAUSAL, BOTTOM], ids=["full", "causal", "bottom right"])
@pytest.mark.parametrize("L, S", [(1, 20), (16, 16), (17, 15), (33, 32), (16, 33)])
def test_sizes(device, L, S, window):
    """Either side of a tile, fewer and more queries than keys, rows that see nothing."""
    run(L, S, window=window, device=device)


@pytest.mark.parametrize("E, EV", [(16, 16), (1, 17), (40, 33)])
def test_features(device, E, EV):
    run(10, 20, E, EV, window=CAUSAL, device=device)


@each_dtype
def test_dtypes(device, dtype):
    """In half precision what enters a product is rounded, but for bfloat16 in the interpreter."""
    errors = {torch.float32: 40, torch.bfloat16: 1 << 16, torch.float16: 1 << 13}[dtype]
    run(20, 25, 24, window=CAUSAL, dtype=dtype, device=device, errors=errors)


@pytest.mark.parametrize("B, of", [((), None), ((2, 1, 2), None), ((2, 1, 2), (2, 1, 1)), ((1, 3), (1, 1))])
def test_batches(device, B, of):
    """Any number of dimensions; a group of heads shares k and v, b and c, and their gradients are sums over it."""
    run(10, 18, B=B, of=of, window=CAUSAL, device=device)


@pytest.mark.parametrize("of", LAYOUTS)
def test_layouts(device, of):
    run(8, 18, lay=LAYOUTS[of], laid="qva" if of.startswith("one") else "qkvdabc", window=CAUSAL, device=device)


@pytest.mark.parametrize("given", ["a", "b", "c", "ab", "bc", "ac", "abc"])
@pytest.mark.parametrize("need", ["o", "l", "q", "k", "v", "qk", "ov", "olqkv"])
def test_given_and_needed(device, given, need):
    run(17, 18, given=given, need=need, dlse="a" in given, device=device)


FORMS = [(True, 0), (False, 16), (True, 16)]  # launches of their own for g_dO and gV; features at a time


@pytest.mark.parametrize("split, part", FORMS)
def test_forms(device, monkeypatch, split, part):
    tiles_of(monkeypatch, 16, 32, split, part)
    run(20, 18, 24, 17, window=CAUSAL, device=device)
    run(8, 12, 17, given="c", need="okv", device=device)
    run(12, 8, 33, given="a", need="oqv", cap=1.0, device=device)


EMPTY = [(0, 3, 4, 4, 2), (3, 0, 4, 4, 2), (3, 3, 0, 4, 1), (3, 3, 4, 0, 1), (3, 3, 4, 4, 0), (0, 0, 4, 4, 1)]


@pytest.mark.parametrize("L, S, E, EV, B", EMPTY)
def test_zero_sizes(device, L, S, E, EV, B):
    q, k, v, do = (normal(B, 2, n, e, device=device, seed=e) for n, e in ((L, E), (S, E), (S, EV), (L, EV)))
    options = {"m": None, "slopes": None, "lengths": None, "window": EVERYWHERE, "scale": None, "cap": 0.0}
    run_of(q, k, v, do, (q.cos(), k.cos(), v.cos(), None), GIVEN, ALL, 40, True, **options)


@pytest.mark.parametrize(
    "kind, shape", [(torch.bool, (1, 1, 1, 20)), (torch.float32, (2, 1, 10, 20)), (torch.float32, (1, 2, 10, 1))], ids=str
)
def test_masks(device, shape, kind):
    """Constants, broadcast in any dimension; a row of the mask that hides all keys gives 0."""
    m = normal(*shape, device=device)
    m = m > -0.5 if kind == torch.bool else m.to(kind)
    m[0, 0, 0] = False if kind == torch.bool else -math.inf
    run(10, 20, B=(2, 2), m=m, device=device, dlse=False)


@pytest.mark.parametrize("window", [(1, 0, 0), (20, -1, 0), (-1, 10, 1), (9, 9, 1)], ids=str)
def test_windows(device, window):
    run(34, 30, window=window, device=device)


@pytest.mark.parametrize("given, window", [("abcf", BOTTOM), ("af", EVERYWHERE), ("f", BOTTOM), ("c", EVERYWHERE)], ids=str)
def test_lengths_slopes_and_a_cap(device, window, given):
    """Together; a length of 0, one inside a tile, one past the end."""
    slopes, lengths = normal(1, 1, device=device).abs(), torch.tensor([[0], [21], [99]], device=device)
    options = {"slopes": slopes, "lengths": lengths, "cap": 1.5, "scale": 0.7}
    run(17, 23, B=(3, 1), window=window, given=given, need="olqkvs", device=device, dlse=False, **options)


def test_with_a_mask_all_together(device):
    m, slopes = normal(1, 2, 1, 18, 20, device=device), normal(1, 1, 1, device=device)
    options = {"m": m, "slopes": slopes, "window": (12, 3, 1), "cap": 2.0, "given": "abcf", "need": "olqkvs"}
    run(18, 20, B=(1, 2, 2), of=(1, 2, 1), device=device, **options)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # of columns past the end
def test_masks_of_large_numbers(device):
    """A row of the lowest numbers is no hidden row: its keys have equal shares."""
    m = normal(1, 10, 20, device=device)
    m[..., 3:5, :] = torch.finfo(torch.float32).min
    got = run(10, 20, m=m, device=device, dlse=False)
    assert all(g.isfinite().all() for g in got if g is not None)


def test_large_scores(device):
    """Of some hundreds, one rounding of which is some hundred of its exponential: the errors are no larger than the loops'."""
    q, k, v, do, a, b, c = (normal(1, 20, 8, device=device, seed=s) for s in range(7))
    none, options = (None,) * 6, ([-1, -1, 0], None, 0.0, 0.0)
    q, k = 20 * q, 10 * k
    o, _, top, l = plain.forward(*double([q, k, v]), *none, *options)
    args = do, None, q, k, v, *none, o.float(), top.float(), l.float(), *options, "qkv"
    exact = double_fast(*double([a, b, c]), None, None, ALL, double(args))
    theirs, got = double_fast(a, b, c, None, None, ALL, args), file._double(a, b, c, None, None, ALL, args)
    for g, t, e in zip(got[:5], theirs, exact):
        assert (g - e).norm() <= 1.5 * (t - e).norm()


def test_the_shipped_tiles(device, monkeypatch):
    monkeypatch.undo()
    run(70, 40, 64, window=CAUSAL, dtype=torch.float16, errors=1 << 13, device=device)


# ---- through the public function


def math_attention(q, k, v, causal=True):
    """Plain torch, in whole matrices."""
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1) @ v


def leaves(device, dtype=torch.float32, heads=(1, 1), L=18, E=8):
    shapes = ((1, heads[0], L, E), (1, heads[1], L, E), (1, heads[1], L, E))
    return [normal(*s, dtype=dtype, device=device, seed=n) for n, s in enumerate(shapes)]


def loss_of(attend):
    return lambda *qkv: attend(*qkv).sin().sum()


def ours(*qkv):
    return sdpa(*qkv, is_causal=True, backend="triton")


def by_reverse(attend, qkv, moves):
    """A Hessian-vector product, by reverse mode twice."""
    qkv = [t.detach().requires_grad_() for t in qkv]
    grads = torch.autograd.grad(loss_of(attend)(*qkv), qkv, create_graph=True)
    return torch.autograd.grad(grads, qkv, moves)


PRODUCTS = {
    "reverse over reverse": by_reverse,
    "torch.func": lambda attend, qkv, moves: vjp(grad(loss_of(attend), (0, 1, 2)), *qkv)[1](tuple(moves)),
    "vhp": lambda attend, qkv, moves: vhp(loss_of(attend), tuple(qkv), tuple(moves))[1],
    "forward over reverse": lambda attend, qkv, moves: jvp(grad(loss_of(attend), (0, 1, 2)), tuple(qkv), tuple(moves))[1],
}


@pytest.mark.parametrize("how", PRODUCTS)
def test_hessian_vector_products(device, ran, how):
    """Beside torch's autograd of the plain maths in float64; every pass is a kernel's, and the eager loops' none."""
    qkv = leaves(device)
    moves = [normal(*t.shape, device=device, seed=5 + n) for n, t in enumerate(qkv)]
    want = by_reverse(math_attention, double(qkv), double(moves))
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch)
        got = PRODUCTS[how](ours, qkv, moves)
    for g, w in zip(got, want, strict=True):
        near(g, w, torch.float32, 60, how)
    assert ran["forward"] and ran["backward"] and ran["double"]


def forbid(patch):
    """The eager loops and whole matrices raise."""

    def no(*_):
        raise AssertionError("an eager rule ran")

    from bptoolkit.ops import attention_blocks

    for module in (plain, attention_blocks):
        for name in ("forward", "backward", "double_backward"):
            patch.setattr(module, name, no)


@pytest.mark.parametrize("dual", [False, True], ids=["torch.func", "dual numbers"])
def test_forward_mode(device, ran, dual):
    """Of o and lse, by one pass of the second order, in groups of heads."""
    qkv = leaves(device, heads=(2, 1))
    moves = [normal(*t.shape, device=device, seed=5 + n) for n, t in enumerate(qkv)]
    options = {"is_causal": True, "enable_gqa": True, "return_lse": True}
    want = jvp(lambda *t: sdpa(*t, **options, backend="eager"), tuple(double(qkv)), tuple(double(moves)))[1]
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch)
        if dual:
            with forward_ad.dual_level():
                out = sdpa(*map(forward_ad.make_dual, qkv, moves), **options, backend="triton")
                got = [forward_ad.unpack_dual(t).tangent for t in out]
        else:
            got = jvp(lambda *t: sdpa(*t, **options, backend="triton"), tuple(qkv), tuple(moves))[1]
    for g, w in zip(got, want, strict=True):
        near(g, w, torch.float32, 60)
    assert ran["double"] == 1


class Block(nn.Module):
    """A transformer's, with attention by the given backend."""

    def __init__(self, E=8, H=2):
        super().__init__()
        self.H, self.qkv, self.out = H, nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.mlp = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))
        self.norms = nn.ModuleList(nn.LayerNorm(E) for _ in range(2))
        self.attend = None

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.H, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


def test_a_gradient_penalty_through_a_transformer_block(device, ran):
    """The gradients of ‖∂loss/∂x‖² by all parameters, as of the plain maths."""
    torch.manual_seed(0)
    block, found = Block().to(device), []
    x = normal(1, 17, 8, device=device).requires_grad_()
    for attend in (ours, math_attention):
        block.attend = attend
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), list(block.parameters())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert ran == {"forward": 1, "backward": 2, "double": 1}
    block.attend = ours
    parameters = {n: p.detach() for n, p in block.named_parameters()}
    moves = {n: torch.ones_like(p) for n, p in parameters.items()}

    def penalty(p):
        return functional_call(block, p, (x.detach(),)).square().sum()

    first_order = jvp(penalty, (parameters,), (moves,))[1]
    torch.testing.assert_close(first_order, sum(g.sum() for g in grad(penalty)(parameters).values()), rtol=1e-3, atol=1e-3)


def three_orders(fn, inputs, backend, most=3):
    """The gradients of a value, theirs, and theirs, with the same draws for either backend."""
    torch.manual_seed(0)
    found, grads = [], [fn(*inputs, backend=backend)]
    for order in range(1, most + 1):
        grads = torch.autograd.grad(sum(g.sin().sum() for g in grads), inputs, create_graph=order < most)
        found += [g.detach() for g in grads]
    return found


def alike(found):
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_a_mask_that_needs_a_gradient(device, ran):
    """Whose second order the eager loops do; the third is done in whole matrices."""
    inputs = [t.requires_grad_() for t in (*leaves(device, L=6), normal(1, 1, 6, 6, device=device))]
    alike([three_orders(sdpa, inputs, backend) for backend in ("triton", "eager")])
    assert ran["backward"] and not ran["double"]


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (5, 3), "softcap": 2.0}], ids=str)
def test_dropout(device, ran, options):
    """The same bits in every pass, and in the eager loops; in groups of heads."""
    inputs = [t.requires_grad_() for t in leaves(device, heads=(2, 1), L=18)]

    def dropped(*qkv, backend):
        return sdpa(*qkv, dropout_p=0.3, enable_gqa=True, **options, backend=backend)

    alike([three_orders(dropped, inputs, backend, 2) for backend in ("triton", "eager")])
    assert ran["double"]


def test_dropout_under_vmap(device):
    """Over cotangents, of a call outside of it: each sample has the mask of the call."""
    q, k, v = leaves(device, L=5)
    found = []
    for backend in ("triton", "eager"):
        torch.manual_seed(0)
        pull = vjp(lambda *t, b=backend: sdpa(*t, dropout_p=0.4, backend=b), q, k, v)[1]
        found.append(vmap(pull)(torch.stack([v, -2 * k])))
    alike(found)


PACKED = [{}, {"is_causal": True, "causal_align": "bottom_right"}, {"window": (9, 4), "softcap": 3.0, "dropout_p": 0.2}]


@pytest.mark.parametrize("options", PACKED, ids=str)
def test_packed_sequences(device, ran, options):
    """Of several lengths, one empty, rows before and after them; fewer keys than queries, and more; in groups of heads."""
    cu_q, cu_k = (torch.tensor(cu, device=device) for cu in ([1, 5, 5, 23, 25], [0, 3, 8, 24, 24]))
    inputs = [t.requires_grad_() for t in (normal(26, 2, 8, device=device), *(normal(25, 1, 8, device=device) for _ in "kv"))]

    def packed(*qkv, backend):
        return bp.functional.varlen_attention(*qkv, cu_q, cu_k, enable_gqa=True, **options, backend=backend)

    alike([three_orders(packed, inputs, backend, 2) for backend in ("triton", "eager")])
    assert ran["double"]


BATCHED = {
    "vmap of a product": lambda f, q, k, v: vmap(lambda d: jvp(grad(lambda x: f(x, k, v)), (q,), (d,))[1])(
        torch.stack([q, -k])
    ),
    "vmap of a vjp": lambda f, q, k, v: vmap(vjp(grad(f), q, k, v)[1])(torch.stack([q, -k]))[0],
    "hessian": lambda f, q, k, v: hessian(lambda x: f(x, k, v))(q),
    "jacobian": lambda f, q, k, v: jacrev(grad(lambda x: f(x, k, v)))(q),
    "reverse over forward": lambda f, q, k, v: grad(lambda x: jvp(lambda y: f(y, k, v), (x,), (k,))[1])(q),
}


@pytest.mark.parametrize("how", BATCHED)
def test_batched_and_mixed(device, how):
    """Transforms over the second order run what can run, and are right; with a mask, which the kernels do not take batched."""
    q, k, v = (t[:1, :1, :3, :2] for t in leaves(device))
    m = normal(1, 1, 3, 3, device=device)
    for options in ({"is_causal": True}, {"attn_mask": m}):
        losses = (lambda *t, given={**options, "backend": b}: sdpa(*t, **given).sin().sum() for b in ("auto", "eager"))
        got, want = (BATCHED[how](loss, q, k, v) for loss in losses)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_batched_by_autograd(device):
    q, k, v = (t[:, :, :4].requires_grad_() for t in leaves(device))
    found = []
    for backend in ("triton", "eager"):
        (dq,) = torch.autograd.grad(sdpa(q, k, v, backend=backend).sin().sum(), q, create_graph=True)
        cots = normal(2, *dq.shape, device=device)
        found.append(torch.autograd.grad(dq, (q, k, v), cots, is_grads_batched=True))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiled(device):
    """Transforms in a compiled function; the choice there is the eager rule's."""
    torch._dynamo.reset()
    qkv = [t[:, :, :4] for t in leaves(device)]

    def product(*qkv):
        return grad(lambda *t: grad(lambda *t: sdpa(*t, is_causal=True).sin().sum())(*t).cos().sum(), (0, 1, 2))(*qkv)

    for a, b in zip(torch.compile(product, fullgraph=True, backend="aot_eager")(*qkv), product(*qkv)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_memory_is_linear(device, monkeypatch):
    """Of all that the kernels allocate, and of all that torch's operations return, nothing is as large as a matrix L × S."""
    L, E, sizes = 128, 8, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    class Spy:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, **kw):
            out = torch.empty(*shape, **kw)
            sizes.append(out.numel())
            return out.fill_(torch.nan)

    monkeypatch.setattr(first, "torch", Spy())
    monkeypatch.setattr(file, "torch", Spy())
    tiles_of(monkeypatch, 64, 64)
    qkv = [normal(1, 1, L, E, device=device, seed=s) for s in range(3)]
    with Watch():
        PRODUCTS["reverse over reverse"](ours, qkv, qkv)
        PRODUCTS["forward over reverse"](ours, qkv, qkv)
    assert len(sizes) > 50 and max(sizes) <= L * E < L * L / 8


def test_operators(device):
    """Schema, fake kernels and tracing of the operator, and of the node that calls it."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "DOUBLE", (lambda op: lambda *a: (seen.append((op, a)), op(*a))[1])(file.DOUBLE))
        run(10, 12, given="abcf", need="olqkvs", slopes=normal(1, device=device), device=device)
        run(10, 12, given="c", need="ov", device=device)
        run(10, 12, B=(1, 2), of=(1, 1), given="ab", need="qk", device=device)
    with pytest.MonkeyPatch.context() as patch:
        node = file.AGAIN
        patch.setattr(node, "run", lambda *a: (seen.append((node.op, a)), node.op(*a))[1])
        by_reverse(ours, leaves(device, L=6), leaves(device, L=6))
    assert {op for op, _ in seen} == {registered["triton_attention_double"], file.AGAIN.op}
    for op, args in seen:
        args = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, args)
        opcheck(
            op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        )


def test_errors_beside_torchs(device):
    """Against float64: at most twice the error of torch's own math path in float16."""
    qkv = leaves(device, torch.float16)
    moves = [normal(*t.shape, dtype=torch.float16, device=device, seed=5 + n) for n, t in enumerate(qkv)]
    exact = by_reverse(math_attention, double(qkv), double(moves))
    theirs = by_reverse(math_attention, qkv, moves)
    for o, t, e in zip(by_reverse(ours, qkv, moves), theirs, exact):
        assert (o.double() - e).norm() <= 2 * (t.double() - e).norm()


def test_without_torchs_kernel(device):
    """Torch's fused attention cannot be differentiated twice in a fused form; ours agrees with its math path."""
    qkv = leaves(device)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = by_reverse(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), qkv, qkv)
    for a, b in zip(by_reverse(ours, qkv, qkv), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
