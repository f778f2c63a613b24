"""The gated linear recurrence, or linear scan: hₜ = aₜ hₜ₋₁ + bₜ, elementwise, along one dimension.

Maths     hₜ = aₜ hₜ₋₁ + bₜ                             t = 1 … T, from h₀
          gₜ, the whole gradient of hₜ: its own cotangent dhₜ, and what step t+1 sends back:
          gₜ = dhₜ + aₜ₊₁ gₜ₊₁                          the same recurrence, in reverse, with a a step later
          daₜ = hₜ₋₁ gₜ
          dbₜ = gₜ
          dh₀ = a₁ g₁
          a gradient of these is a scan again: `scan` with `shift` takes aₜ of the step before, and its vjp is `scan` without
Letters   T steps, B batch, N all other elements; *V the dimensions that vmap adds; a, b, h: T B N; h₀: B N
Ragged    past a row's length a is 1 and b is 0, so that its state stays what it was: a reverse direction carries h₀ to the
          row's own end. Nothing there is read, and h is zero there
Saving    a and h (and h₀), never b
Numerics  half tensors are scanned in float32. Few elements a step and many steps: about √T steps at once (`in_blocks`), whose
          products of a can overflow where no h does; a result that is not finite is therefore computed again step by step
Source    Blelloch 1990, §1.4 (the operator); Martin & Cundy, arXiv 1709.04057 (the reverse scan of its backward)
"""

from __future__ import annotations

from math import isfinite, isqrt

import torch
from torch import Tensor

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.opaque import Opaque
from bptoolkit.ops.recurrent import before, check_lengths, order, valid, within
from bptoolkit.precision import wide
from bptoolkit.shapes import check_alike, check_floating

FEW, MANY = 512, 32  # up to so many elements a step, and from so many steps on, blocks are faster than steps
SEGMENT = 1 << 18  # elements that `in_blocks` works on at a time: 1 MiB of float32

# --- the scan -------------------------------------------------------------------------------------------------------------


def loop(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, shift: bool) -> Tensor:
    """hₜ = aₜ hₜ₋₁ + bₜ: *V T B N; with `shift`, hₜ = aₜ₋₁ hₜ₋₁ + bₜ. Without h0 the first h is b."""
    T, h = b.shape[-3], h0
    off = (1 if reverse else -1) if shift else 0
    As, Bs, hs = a.unbind(-3), b.unbind(-3), [b] * T
    for t in order(T, reverse):
        hs[t] = h = Bs[t] if h is None else torch.addcmul(Bs[t], As[t + off], h)
    return torch.stack(hs, -3) if T else b.clone()


def loop_fast(a, b, h0, reverse, shift):
    """`loop`, step by step or in blocks, whichever takes fewer calls of torch for what they do."""
    y = b.new_empty(b.shape)
    A, B, Y = (t.movedim(-3, 0) for t in (a, b, y))
    T, off, h, steps = B.shape[0], (1 if reverse else -1) if shift else 0, h0, order(B.shape[0], reverse)
    if not b.numel():
        return y
    if h is None:
        h, steps = Y[steps[0]].copy_(B[steps[0]]), steps[1:]
    size = B[0].numel()
    blocks = size <= FEW and T >= MANY
    most = max(SEGMENT // size, MANY) if blocks else 1024
    for k in range(0, len(steps), most):
        ts = steps[k : k + most]
        at = slice(min(ts), max(ts) + 1)
        run = in_blocks if blocks and len(ts) >= MANY else in_steps
        h = run(A[at.start + off : at.stop + off], B[at], h, Y[at], reverse)
    return y


def in_steps(a: Tensor, b: Tensor, h: Tensor, y: Tensor, reverse: bool) -> Tensor:
    """One step after the other, into y. Returns the last h."""
    As, Bs, Ys = a.unbind(0), b.unbind(0), y.unbind(0)
    for t in order(len(Bs), reverse):
        h = torch.addcmul(Bs[t], As[t], h, out=Ys[t])
    return h


def in_blocks(a: Tensor, b: Tensor, h: Tensor, y: Tensor, reverse: bool) -> Tensor:
    """K blocks of S steps, all blocks at once, each from zero; then the blocks' last states; then what each started from."""
    T, n = b.shape[0], b[0].numel()
    S = isqrt(T)
    K = -(-T // S)

    def blocked(t: Tensor) -> Tensor:  # S K n, and zeros after the last step
        t = t.reshape(T, n)
        out = t.new_zeros(S, K, n) if K * S > T else t.new_empty(S, K, n)
        by_block = out.transpose(0, 1)
        t = t.flip(0) if reverse else t
        full = T // S
        by_block[:full] = t[: full * S].unflatten(0, (full, S))
        if full < K:
            by_block[full, : T - full * S] = t[full * S :]
        return out

    p, x = blocked(a), blocked(b)  # the product of a since the block began, and h from zero
    ps, xs = p.unbind(0), x.unbind(0)
    for s in range(1, S):
        xs[s].addcmul_(ps[s], xs[s - 1])
        ps[s].mul_(ps[s - 1])
    starts = x.new_empty(K, n)
    at, ends, products = starts.unbind(0), xs[-1].unbind(0), ps[-1].unbind(0)
    at[0].copy_(h.reshape(n))
    for k in range(K - 1):
        torch.addcmul(ends[k], products[k], at[k], out=at[k + 1])
    x.addcmul_(p, starts)
    out = x.transpose(0, 1).reshape(K * S, n)[:T]
    if out.device.type == "cpu" and not all(isfinite(m) for m in out.aminmax()):
        return in_steps(a, b, h, y, reverse)
    y.copy_((out.flip(0) if reverse else out).view(b.shape))
    return y[0 if reverse else -1]


def loop_fake(a, b, h0, reverse, shift):
    return b.new_empty(b.shape)


def loop_vjp(cotangents, need, a, b, h0, reverse, shift):
    (dh,) = cotangents
    g = scan(a, dh, None, not reverse, not shift)
    zero = torch.zeros_like(g[..., 0, :, :]) if g.shape[-3] else g.new_zeros(*g.shape[:-3], *g.shape[-2:])
    start, da, dh0 = zero if h0 is None else h0, None, None
    if need[0]:
        h = scan(a, b, h0, reverse, shift)
        da = h * before(zero, g, None, not reverse) if shift else before(start, h, None, reverse) * g
    if need[2]:
        dh0 = _first(a, reverse, zero) * _first(g, reverse, zero) if g.shape[-3] else zero
    return da, g, dh0


def loop_jvp(tangents, a, b, h0, reverse, shift):
    da, db, dh0 = tangents
    d = torch.zeros_like(b) if db is None else db
    if da is not None:
        h = scan(a, b, h0, reverse, shift)
        zero = torch.zeros_like(h[..., :1, :, :]).squeeze(-3)
        if shift:  # what step t+1 takes of step t: h_t da_t
            d = d + before(zero, da * h, None, reverse)
        else:
            d = d + da * before(zero if h0 is None else h0, h, None, reverse)
    return scan(a, d, dh0, reverse, shift)


def _first(t: Tensor, reverse: bool, empty: Tensor) -> Tensor:
    """The first step's, in the order of the recurrence."""
    return t.select(-3, t.shape[-3] - 1 if reverse else 0) if t.shape[-3] else empty


scan = Opaque("linear_scan", loop, loop_fake, vmap="leading", vjp=loop_vjp, jvp=loop_jvp, fast=loop_fast)

# --- the rule -------------------------------------------------------------------------------------------------------------


def forward(a, b, h0, lengths, reverse):
    h = scan(wide(_standing(a, lengths)), wide(within(b, lengths)), wide(h0), reverse, False)
    return within(h, lengths).to(b.dtype)


def backward(dh, a, h0, lengths, reverse, h, need):
    A = wide(_standing(a, lengths))
    g = scan(A, wide(within(dh, lengths)), None, not reverse, True)
    da = db = dh0 = None
    if need.a:
        da = within(times_before(h0, h, g, lengths, reverse), lengths).to(a.dtype)
    if need.h0:
        dh0 = (_first(A, reverse, h0) * _first(g, reverse, torch.zeros_like(h0))).to(h0.dtype)
    if need.b:
        db = within(g, lengths).to(dh.dtype)
    return da, db, dh0, None


def times_before(h0: Tensor, h: Tensor, g: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """hₜ₋₁ gₜ: T B N."""
    if lengths is not None or not unwatched(h0, h, g) or not h.shape[0]:
        return wide(before(h0, h, lengths, reverse)) * g
    out = torch.empty_like(g)
    now, then = (slice(0, -1), slice(1, None)) if reverse else (slice(1, None), slice(0, -1))
    torch.mul(h[then], g[now], out=out[now])
    end = -1 if reverse else 0
    torch.mul(h0, g[end], out=out[end])
    return out


def _standing(a: Tensor, lengths: Tensor | None) -> Tensor:
    """A, and 1 past the lengths: there the state stays what it was."""
    return a if lengths is None else torch.where(valid(a.shape[-3], lengths), a, 1)


def kernel():
    from bptoolkit.triton_kernels.linear_recurrence import KERNEL

    return KERNEL


RULE = Rule(
    "linear_recurrence",
    forward,
    backward,
    inputs="a b h0 lengths",
    outputs="h",
    uses={"a": "a h0 lengths h", "b": "a lengths", "h0": "a h0 lengths"},
    kernel=kernel,
)

# --- the public function --------------------------------------------------------------------------------------------------


def linear_recurrence(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    dim: int = 0,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """All h of hₜ = aₜ hₜ₋₁ + bₜ, elementwise, t along `dim`.

    Args:
        a: the decays; of b's shape, or broadcast to it.
        b: what is added, of any shape with at least one dimension; T is its size along dim.
        h0: the state before the first step, of b's shape without dim; None for zeros.
        dim: the dimension of time. With (T, B, ...) it is 0, with (B, T, ...) 1.
        reverse: go from the last step to the first.
        lengths: int64, one per row of b's first dimension other than dim, between 0 and T: rows end there, h past it is zero,
            and a reverse direction starts there.
        resets: bool, of b's shape or of its first dimensions: where True, a counts as 0, so that the step starts from zero.
            What has overflowed before it stays so: 0 times infinity is NaN.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        h, of b's shape. The last state is its last step; of a row with a length, the step at that length - 1.

    Raises:
        ValueError: shapes, lengths or devices disagree, dim is out of range, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or lengths or resets is no such tensor.
    """
    name = "linear_recurrence"
    check_floating(name, "b", b)
    check_floating(name, "a", a)
    check_alike(name, "b", b, "a", a)
    if not -b.dim() <= dim < b.dim():
        raise ValueError(f"{name}: dim={dim} is out of range for b {tuple(b.shape)}")
    dim %= b.dim()
    if a.dim() > b.dim() or any(n != m and n != 1 for n, m in zip(a.shape[::-1], b.shape[::-1])):
        raise ValueError(f"{name}: a has shape {tuple(a.shape)}, which does not broadcast to that of b, {tuple(b.shape)}")
    rest = (*b.shape[:dim], *b.shape[dim + 1 :])
    if h0 is not None:
        check_floating(name, "h0", h0)
        check_alike(name, "b", b, "h0", h0)
        if tuple(h0.shape) != rest:
            raise ValueError(f"{name}: h0 has shape {tuple(h0.shape)}; with b {tuple(b.shape)} and dim={dim} it needs {rest}")
    if resets is not None:
        a = a.expand(b.shape).masked_fill(_mask(resets, b), 0)
    T, B, N = b.shape[dim], rest[0] if rest else 1, _prod(rest[1:])
    x = b.movedim(dim, 0).reshape(T, B, N)
    if lengths is not None:
        lengths = check_lengths(name, lengths, x, bool(rest)).to(b.device)
    start = x.new_zeros(B, N) if h0 is None else h0.reshape(B, N)
    args = (a.expand(b.shape).movedim(dim, 0).reshape(T, B, N), x, start, lengths, reverse)
    h = RULE(*args, backend=OP.pick(RULE, backend, *args))
    return h.reshape(T, *rest).movedim(0, dim)


def _prod(sizes):
    n = 1
    for s in sizes:
        n = n * s
    return n


def _mask(resets: Tensor, b: Tensor) -> Tensor:
    """The resets, with b's number of dimensions."""
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"linear_recurrence: resets must be a bool tensor, not {got}")
    if tuple(resets.shape) != tuple(b.shape[: resets.dim()]):
        raise ValueError(
            f"linear_recurrence: resets has shape {tuple(resets.shape)}; it needs that of b, {tuple(b.shape)}, "
            "or of its first dimensions"
        )
    return resets.to(b.device).reshape(*resets.shape, *(1,) * (b.dim() - resets.dim()))


def reference(a, b, h0=None, *, dim=0, reverse=False, lengths=None, resets=None):
    """The same in plain torch, a step at a time."""
    a, b = a.expand(b.shape).movedim(dim, 0), b.movedim(dim, 0)
    if resets is not None:
        whole = resets.reshape(*resets.shape, *(1,) * (b.dim() - resets.dim())).expand(b.movedim(0, dim).shape)
        a = torch.where(whole.movedim(dim, 0), 0, a)
    h = torch.zeros_like(b[0]) if h0 is None and len(b) else h0
    hs, As, Bs = [b] * len(b), a.unbind(0), b.unbind(0)
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        new = As[t] * h + Bs[t]
        if lengths is None:
            hs[t] = h = new
        else:
            on = (t < lengths).reshape(-1, *(1,) * (new.dim() - 1))
            h = torch.where(on, new, h)
            hs[t] = torch.where(on, h, 0)
    return (torch.stack(hs) if hs else b.clone()).movedim(0, dim)


def case(draw: Draw) -> Case:
    shape = [*draw.batch(), draw.size()]
    dim = draw.choice(range(len(shape)))
    rest = shape[:dim] + shape[dim + 1 :]
    narrow = draw.random.random() < 0.2
    a = draw.tensor(*shape[-1:]) if narrow else draw.tensor(*shape)
    kwargs: dict = {"dim": dim, "reverse": draw.flag()}
    h0 = draw.tensor(*rest) if draw.flag() else None
    if rest and draw.random.random() < 0.4:
        kwargs["lengths"] = draw.integers(0, shape[dim] + 1, rest[0])
        kwargs["lengths"][:1] = shape[dim]  # or nothing might depend on anything
    if draw.random.random() < 0.3:
        kwargs["resets"] = draw.booleans(*shape[: draw.choice(range(1, len(shape) + 1))], share=0.3)
    return Case((a, draw.tensor(*shape), h0), kwargs)


def bench(T: int, B: int, N: int):
    return lambda draw: Case((draw.tensor(T, B, N, scale=0.5), draw.tensor(T, B, N)), {})


OP = Op(
    name="linear_recurrence",
    call=linear_recurrence,
    reference=reference,
    rules=(RULE,),
    shapes="a: *B, b: *B -> *B",
    source="Martin & Cundy 2017",
    case=case,
    bench={"T=1024 B=32 N=256": bench(1024, 32, 256), "T=4096 B=1 N=64": bench(4096, 1, 64)},
)
OPS = (OP,)
