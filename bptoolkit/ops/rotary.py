"""Rotary position embedding, and the biases of ALiBi.

Maths     each pair (a, b) of x is turned by its angle θ:   a′ = a cos θ − b sin θ,   b′ = b cos θ + a sin θ
          so dx is dy turned by −θ:                         da = da′ cos θ + db′ sin θ,   db = db′ cos θ − da′ sin θ
          dcos = da′ a + db′ b,  dsin = db′ a − da′ b, summed over what cos and sin were broadcast over
Letters   x, y *B E; cos, sin *C R/2, broadcast over *B; the pairs are (x_k, x_(k + R/2)), or with interleaved (x_2k, x_(2k+1));
          the elements from R on stay
Numerics  half tensors are turned in float32; x is kept only if cos or sin needs a gradient
Source    Su et al., "RoFormer", 2021, eq. 34; biases: Press et al., "Train short, test long", 2022, section 3
"""

from __future__ import annotations

from collections.abc import Callable
from math import log2

import torch
from torch import Tensor

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating


def split(x, R, interleaved):
    """The pairs' two halves, in the precision to compute in, and what stays."""
    t, rest = wide(x.narrow(-1, 0, R)), x.narrow(-1, R, x.shape[-1] - R)
    a, b = (t[..., ::2], t[..., 1::2]) if interleaved else (t.narrow(-1, 0, R // 2), t.narrow(-1, R // 2, R // 2))
    return a, b, rest


def join(a, b, rest, interleaved):
    t = torch.stack((a, b), -1).reshape(*a.shape[:-1], 2 * a.shape[-1]) if interleaved else torch.cat((a, b), -1)
    t = t.to(rest.dtype)
    return torch.cat((t, rest), -1) if rest.shape[-1] else t


def rotate(x, c, s, interleaved):
    a, b, rest = split(x, 2 * c.shape[-1], interleaved)
    return join(a * c - b * s, b * c + a * s, rest, interleaved)


def forward(x, c, s, interleaved):
    return rotate(x, wide(c), wide(s), interleaved)


def backward(dy, x, c, s, interleaved, need):
    dx = rotate(dy, wide(c), -wide(s), interleaved) if need.x else None
    dc = ds = None
    if need.c or need.s:
        R = 2 * c.shape[-1]
        (a, b, _), (da, db, _) = split(x, R, interleaved), split(dy, R, interleaved)
        dc = (da * a + db * b).sum_to_size(c.shape).to(c.dtype) if need.c else None
        ds = (db * a - da * b).sum_to_size(s.shape).to(s.dtype) if need.s else None
    return dx, dc, ds


def kernel():
    from bptoolkit.triton_kernels.rotary import KERNEL

    return KERNEL


RULE = Rule(
    "rotary_embedding",
    forward,
    backward,
    inputs="x c s",
    outputs="y",
    uses={"x": "c s", "c": "x c s", "s": "x c s"},
    kernel=kernel,
)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, backend: str = "auto") -> Tensor:
    """Turn each pair of elements by an angle: rotary position embedding.

    Args:
        x: (*B, E), floating point; of queries or keys (N, H, L, E).
        cos: (*C, R/2), broadcastable over *B, with R ≤ E; usually (L, R/2). Of x's dtype, or float32. See `rotary_angles`.
        sin: of cos's shape and dtype.
        interleaved: pairs are neighbours (GPT-J) and not the two halves of the first R elements (GPT-NeoX, Llama).
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        x's shape and dtype; elements from R on are x's.

    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
    """
    name = "rotary_embedding"
    for what, t in (("x", x), ("cos", cos), ("sin", sin)):
        check_floating(name, what, t)
        if t.device != x.device:
            raise ValueError(f"{name}: {what} is on {t.device} but x is on {x.device}; they must be on one device")
    if cos.dtype != sin.dtype or cos.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name}: cos is {cos.dtype}, sin {sin.dtype} and x {x.dtype}; both must be as x, or torch.float32")
    if cos.shape != sin.shape or not cos.dim():
        raise ValueError(f"{name}: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; they must be equal, (*C R/2)")
    if not x.dim() or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)} and cos {tuple(cos.shape)}; twice cos's last size must fit x's")
    lead, over = x.shape[:-1], cos.shape[:-1]
    if len(over) > len(lead) or any(n != 1 and n != m for n, m in zip(reversed(over), reversed(lead))):
        raise ValueError(f"{name}: cos has shape {tuple(cos.shape)}; it cannot be broadcast over x {tuple(x.shape)}")
    return RULE(x, cos, sin, interleaved, backend=OP.pick(RULE, backend, x, cos, sin, interleaved))


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`rotary_embedding` of queries and keys; arguments and errors as `rotary_embedding`."""
    return (
        rotary_embedding(q, cos, sin, interleaved, backend=backend),
        rotary_embedding(k, cos, sin, interleaved, backend=backend),
    )


def rotary_angles(
    length: int, size: int, base: float = 10000.0, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of positions 0 … length − 1, for R = size elements: two tensors (length, size/2).

    θ_mk = m base^(−2k/size), computed in float64.

    Raises:
        ValueError: size is odd.
    """
    if size % 2:
        raise ValueError(f"rotary_angles: size={size} is odd; elements are turned in pairs")
    rates = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size) if size else torch.empty(0, dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rates)
    dtype = dtype or torch.get_default_dtype()
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def alibi_slopes(heads: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slope of each head: 2^(−8/n), 2^(−16/n) … for n heads, a power of two.

    Otherwise those of the next smaller power of two, and then every other one of the next larger, as the authors do.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads={heads}; there must be at least one")
    n = 1 << int(log2(heads))
    slopes = [2 ** (-8 * (k + 1) / n) for k in range(n)]
    slopes += [2 ** (-8 * (2 * k + 1) / (2 * n)) for k in range(heads - n)]
    return torch.tensor(slopes, dtype=dtype or torch.get_default_dtype(), device=device)


def alibi_bias(
    heads: int, Lq: int, Lk: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """ALiBi's bias, to be added to attention scores (an `attn_mask`): −slope · |distance|.

    The last query stands at the last key. A causal mask has to be added to it where one is wanted.

    Args:
        heads: how many.
        Lq: queries.
        Lk: keys.
        dtype: of the result.
        device: of the result.

    Returns:
        (heads, Lq, Lk).
    """
    slopes = alibi_slopes(heads, dtype=dtype, device=device)
    distance = torch.arange(Lk, device=device) - torch.arange(Lk - Lq, Lk, device=device).unsqueeze(1)
    return -slopes.reshape(heads, 1, 1) * distance.abs().to(slopes.dtype)


def reference(x, cos, sin, interleaved=False):
    """x ∘ cos + turned ∘ sin, turned being x by a quarter of a circle."""
    R = 2 * cos.shape[-1]
    t, c, s = wide(x[..., :R]), wide(cos), wide(sin)
    if interleaved:
        cc, ss = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
        turned = torch.stack((-t[..., 1::2], t[..., ::2]), -1).reshape(t.shape)
    else:
        cc, ss = torch.cat((c, c), -1), torch.cat((s, s), -1)
        turned = torch.cat((-t[..., R // 2 :], t[..., : R // 2]), -1)
    return torch.cat(((t * cc + turned * ss).to(x.dtype), x[..., R:]), -1)


def case(draw: Draw) -> Case:
    B, L, half, rest = draw.batch(), draw.size(), draw.size(most=8), draw.choice((0, 0, 1, 3))
    over = draw.choice(((L,), (1,), (*B, L), ()))
    angle, learned = draw.tensor(*over, half, grad=False), draw.flag()
    cos, sin = (t.detach().requires_grad_(learned) for t in (angle.cos(), angle.sin()))
    return Case((draw.tensor(*B, L, 2 * half + rest), cos, sin), {"interleaved": draw.flag()})


def _bench(interleaved: bool) -> Callable[[Draw], Case]:
    def bench(draw: Draw) -> Case:
        angle = draw.tensor(512, 32, grad=False)
        return Case((draw.tensor(8, 16, 512, 64), angle.cos(), angle.sin()), {"interleaved": interleaved})

    return bench


OP = Op(
    name="rotary_embedding",
    call=rotary_embedding,
    reference=reference,
    rules=(RULE,),
    shapes="x: *B E, cos: *C R, sin: *C R -> *B E",
    source="Su et al. 2021, eq. 34",
    case=case,
    bench={"halves": _bench(False), "interleaved": _bench(True)},
)
OPS = (OP,)
