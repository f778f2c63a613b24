"""Linear layer.

Maths     y = x Wᵀ + b
          dx = dy W        dW = Σₙ dyₙᵀ xₙ        db = Σₙ dyₙ
Letters   *B leading dimensions, n runs over all of them; I in; O out; dt is the gradient of the loss by t, in t's shape
Numerics  half inputs accumulate in float32 (BLAS); y has x's dtype
Source    Rumelhart, Hinton & Williams, "Learning internal representations by error propagation", 1986, eqs. 4-7
"""

from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op


def forward(x, w, b):
    return F.linear(x, w, b)  # *B O: x @ w.mT + b, as one BLAS call


def backward(dy, x, w, need):
    dx = dy @ w if need.x else None  # *B I
    dy2 = rows(dy)  # N O
    dw = dy2.mT @ rows(x) if need.w else None  # O I
    db = dy2.sum(0) if need.b else None  # O
    return dx, dw, db


def rows(t):
    """All leading dimensions as one, N; not reshape(-1, I), which is ambiguous when I is 0."""
    return t if t.dim() == 2 else t.reshape(prod(t.shape[:-1]), t.shape[-1])  # Size.numel() would fix dynamic sizes


RULE = Rule("linear", forward, backward, inputs="x w b", outputs="y", uses={"x": "w", "w": "x", "b": ""})


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = x Wᵀ + b, as `torch.nn.functional.linear`.

    Args:
        input: (*B, I), floating point.
        weight: (O, I).
        bias: (O,) or None.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, O), of the input's dtype.

    Raises:
        ValueError: the shapes or devices disagree, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    input, weight, bias = OP.cast(input, weight, bias)
    OP.check(input, weight, bias)
    return RULE(input, weight, bias, backend=OP.pick(RULE, backend, input, weight, bias))


class Linear(nn.Linear):
    """`torch.nn.Linear` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, backend=self.backend)


def case(draw: Draw) -> Case:
    B, I, O = draw.batch(), draw.size(), draw.size()
    x, w = draw.tensor(*B, I), draw.tensor(O, I, scale=max(I, 1) ** -0.5)
    return Case((x, w, draw.tensor(O)) if draw.flag() else (x, w), {})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(64, 128, 512), draw.tensor(512, 512, scale=512**-0.5), draw.tensor(512)), {})


OP = Op(
    name="linear",
    call=linear,
    reference=F.linear,
    rules=(RULE,),
    module=(Linear,),
    replaces=(nn.Linear,),
    shapes="input: *B I, weight: O I, bias: O -> *B O",
    source="Rumelhart, Hinton & Williams 1986, eqs. 4-7",
    autocast=LOW,
    case=case,
    bench=bench,
)
OPS = (OP,)
