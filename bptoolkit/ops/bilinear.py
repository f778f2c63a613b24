"""Bilinear form.

Maths     y_o = Σ_ij x1_i W_oij x2_j + b_o
          dx1_i = Σ_oj dy_o W_oij x2_j        dx2_j = Σ_oi dy_o W_oij x1_i        dW_oij = Σ_m dy_mo x1_mi x2_mj
          db_o = Σ_m dy_mo
          as matrix products:  [dy x2] = dy ⊗ x2, M (O J), and [dy x1] = dy ⊗ x1, M (O I):
          dx1 = [dy x2] W_(OJ)I               dx2 = [dy x1] W_(OI)J               dW_(OI)J = [dy x1]ᵀ x2
Letters   x1 *B I; x2 *B J; W weight O I J; b bias O; y, dy *B O; M rows, one per element of *B, m runs over them
Numerics  half tensors are multiplied in their own dtype, as torch's matrix products do; sums in float32 inside them
Source    Tenenbaum & Freeman, "Separating style and content with bilinear models", 2000, eq. 1
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op


def rows(t):
    """M, N: the leading dimensions as one; not reshape(-1, N), which is ambiguous when N is 0."""
    return t.reshape(prod(t.shape[:-1]), t.shape[-1])


def outer(a, b):
    """A ⊗ b, row by row: M A, M B -> M (A B)."""
    return (a.unsqueeze(2) * b.unsqueeze(1)).reshape(a.shape[0], a.shape[1] * b.shape[1])


def forward(x1, x2, W, b):
    O, I, J = W.shape
    r1, r2 = rows(x1), rows(x2)
    t = (r1 @ W.transpose(0, 1).reshape(I, O * J)).reshape(r1.shape[0], O, J)  # M O J
    y = torch.bmm(t, r2.unsqueeze(2)).squeeze(2)  # M O
    y = y if b is None else y + b
    return y.reshape(*x1.shape[:-1], O)


def backward(dy, x1, x2, W, b, need):
    O, I, J = W.shape
    d, r1, r2 = rows(dy), rows(x1), rows(x2)
    dx1 = dx2 = dW = None
    if need.x1:
        dx1 = (outer(d, r2) @ W.transpose(1, 2).reshape(O * J, I)).reshape(x1.shape)
    if need.x2 or need.W:
        dyx1 = outer(d, r1)  # M (O I)
        dx2 = (dyx1 @ W.reshape(O * I, J)).reshape(x2.shape) if need.x2 else None
        dW = (dyx1.mT @ r2).reshape(W.shape) if need.W else None
    return dx1, dx2, dW, d.sum(0) if need.b else None


RULE = Rule(
    "bilinear",
    forward,
    backward,
    inputs="x1 x2 W b",
    outputs="y",
)


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y_o = x1ᵀ W_o x2 + b_o, as `torch.nn.functional.bilinear`.

    Args:
        input1: (*B, I), floating point.
        input2: (*B, J).
        weight: (O, I, J).
        bias: (O,), or None.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, O), of the inputs' dtype.

    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    input1, input2, weight, bias = promoted(input1, input2, weight, bias)
    OP.check(input1, input2, weight, bias)
    if input1.shape[:-1] != input2.shape[:-1]:
        raise ValueError(
            f"bilinear: input1 has shape {tuple(input1.shape)} but input2 {tuple(input2.shape)}; "
            "all dimensions but the last must be equal"
        )
    args = (input1, input2, weight, bias)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))


def promoted(*tensors: Any) -> tuple[Any, ...]:
    """Under CUDA's autocast: all of the widest dtype among them, as torch has it for this op."""
    first = tensors[0]
    if not (torch._C._is_any_autocast_enabled() and isinstance(first, Tensor) and first.is_cuda):
        return tensors
    if not torch.is_autocast_enabled("cuda"):
        return tensors
    dtype = torch.get_autocast_dtype("cuda")
    for t in tensors:
        if t is not None and t.is_floating_point():
            dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


class Bilinear(nn.Bilinear):
    """`torch.nn.Bilinear` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return bilinear(input1, input2, self.weight, self.bias, backend=self.backend)


def reference(input1, input2, weight, bias=None):
    """As one einsum."""
    y = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return y if bias is None else y + bias


def case(draw: Draw) -> Case:
    B, I, J, O = draw.batch(), draw.size(), draw.size(), draw.size()
    W = draw.tensor(O, I, J, scale=max(I * J, 1) ** -0.5)
    return Case((draw.tensor(*B, I), draw.tensor(*B, J), W, draw.tensor(O) if draw.flag() else None), {})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(512, 64), draw.tensor(512, 64), draw.tensor(32, 64, 64, scale=0.02), draw.tensor(32)), {})


OP = Op(
    name="bilinear",
    call=bilinear,
    reference=reference,
    peer=F.bilinear,
    rules=(RULE,),
    module=(Bilinear,),
    replaces=(nn.Bilinear,),
    shapes="input1: *B I, input2: *B J, weight: O I J, bias: O -> *B O",
    source="Tenenbaum & Freeman 2000, eq. 1",
    case=case,
    bench=bench,
)
OPS = (OP,)
