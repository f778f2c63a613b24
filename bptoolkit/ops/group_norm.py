"""Group normalization: each sample's channels in groups, each group over its channels and positions.

Maths     m = mean(x)    r = 1/√(mean((x − m)²) + eps)    x̂ = (x − m) r    y = x̂ w + b
          with g = dy w:    dx = r (g − mean(g) − x̂ mean(g x̂)) + dm/M − dr r² x̂/M
          dw = Σ dy x̂       db = Σ dy
Letters   x, y of shape N C *I; mean() over one sample's C/G channels of a group and all positions, M elements; the sums over
          samples and positions; w, b of shape C; m and r residual outputs of shape N G, hidden by the public function; dt is
          the gradient of the loss by t, in t's shape
Numerics  half inputs are normalized in float32, and m and r are float32; y has x's dtype
Source    Wu & He, "Group Normalization", arXiv 1803.08494, eq. 1-7
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32_CUDA, Op
from bptoolkit.ops import channel_norm
from bptoolkit.ops.channel_norm import check_input, check_per_channel, in_one_dtype
from bptoolkit.precision import wide


def forward(x, w, b, G, eps):
    if x.numel() == 0:  # torch's kernel gives a mean of NaN
        m = wide(x.new_zeros(x.shape[0], G))
        return torch.empty_like(x), m, m.clone()
    sizes = x.shape[0], x.shape[1], prod(x.shape[2:]), G, eps
    dense = x.dim() == 4 and unwatched(x) and x.is_contiguous(memory_format=torch.channels_last)  # vmap cannot be asked
    args = (x if dense else x.contiguous(), w, b)
    if in_one_dtype(x, w, b):
        return torch.native_group_norm(*args, *sizes)  # N C *I, N G, N G
    y, m, r = torch.native_group_norm(*(t if t is None else wide(t) for t in args), *sizes)
    return y.to(x.dtype), m, r


def backward(dy, dm, dr, x, w, b, m, r, G, need):
    pool = channel_norm.Group(x, G) if x is not None else None
    return channel_norm.backward(dy, dm, dr, x, w, b, m, r, pool, False, need)


def kernel():
    from bptoolkit.triton_kernels.group_norm import KERNEL

    return KERNEL


RULE = Rule(
    "group_norm",
    forward,
    backward,
    inputs="x w b",
    outputs="y m r",
    uses={"x": "x w m r", "w": "x w m r", "b": "b"},
    kernel=kernel,
)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias per sample and group, as `torch.nn.functional.group_norm`.

    Args:
        input: (N, C, *I), floating point.
        num_groups: how many groups of consecutive channels; divides C.
        weight: (C,) or None; of input's dtype, or float32 for a half input.
        bias: as weight.
        eps: added to the variance.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        input's shape and dtype.

    Raises:
        ValueError: shapes or devices disagree, num_groups does not divide C, a batch has one value in all per group, or the
            named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
    """
    input, weight, bias = OP.cast(input, weight, bias)
    check_input("group_norm", input)
    N, C = input.shape[:2]
    check_per_channel("group_norm", input, C, weight=weight, bias=bias)
    if num_groups < 1 or C % num_groups:
        raise ValueError(
            f"group_norm: num_groups={num_groups} does not divide the {C} channels of input {tuple(input.shape)} into groups"
        )
    if N * C // num_groups * prod(input.shape[2:]) == 1:
        raise ValueError(
            f"group_norm: input {tuple(input.shape)} has one value per group of num_groups={num_groups}; it needs more"
        )
    args = (input, weight, bias, num_groups, eps)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, backend=self.backend)


def reference(input, num_groups, weight=None, bias=None, eps=1e-5):
    """In plain torch."""
    N, C = input.shape[:2]
    x = wide(input).reshape(N, num_groups, C // num_groups * prod(input.shape[2:]))
    x = x - x.mean(2, keepdim=True)
    y = (x / (x.square().mean(2, keepdim=True) + eps).sqrt()).reshape(input.shape)
    shape = (1, C, *(1,) * (input.dim() - 2))
    y = y if weight is None else y * weight.reshape(shape)
    return (y if bias is None else y + bias.reshape(shape)).to(input.dtype)


def case(draw: Draw) -> Case:
    inner = tuple(draw.size() for _ in range(draw.choice((0, 1, 1, 2))))
    N, C = draw.size(), draw.size()
    G = draw.choice([g for g in range(1, C + 1) if C % g == 0] or [1])
    if N * C // G * prod(inner) == 1:
        N += 1
    w, b = (draw.tensor(C) if draw.random.random() < 0.75 else None for _ in range(2))
    return Case((draw.tensor(N, C, *inner), G, w, b), {"eps": draw.choice((1e-5, 0.1))})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(16, 64, 64, 64), 32, draw.tensor(64), draw.tensor(64)), {})


OP = Op(
    name="group_norm",
    call=group_norm,
    reference=reference,
    peer=F.group_norm,
    rules=(RULE,),
    module=(GroupNorm,),
    replaces=(nn.GroupNorm,),
    shapes="input: *X, weight: C, bias: C -> *X",
    source="Wu & He 2018, eq. 1-7",
    autocast=FLOAT32_CUDA,
    case=case,
    bench={"16 × 64 × 64 × 64, 32 groups": bench},
)
OPS = (OP,)
