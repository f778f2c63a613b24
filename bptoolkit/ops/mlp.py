"""Two linear layers with an activation between them, in one node that keeps x and the pre-activation alone.

Maths     u = x W₁ᵀ + b₁        h = f(u)        y = h W₂ᵀ + b₂
          dh = dy W₂            du = dh f'(u) plus what flows into the residual output u
          dx = du W₁            dW₁ = Σₙ duₙᵀ xₙ        db₁ = Σₙ duₙ        dW₂ = Σₙ dyₙᵀ hₙ        db₂ = Σₙ dyₙ
Letters   x (*B, I); u, h (*B, H); y (*B, O); n runs over all of *B; W₁ (H, I), b₁ (H), W₂ (O, H), b₂ (O); f an activation, see
          activation.py; u is a residual output, hidden by the public function; dt is the gradient of the loss by t
Numerics  h is made again in backward, where autograd keeps it besides u; half tensors: products as `linear` has them, h and du
          computed in float32 and rounded once, db₁ the sum of du before it is rounded; a relu that is off blocks any cotangent
Source    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, eq. 2; Hendrycks & Gimpel, arXiv 1606.08415
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bptoolkit.blocks import by_elements
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops.bias_activation import chain, check_activation
from bptoolkit.ops.gated_mlp import GATES, plus
from bptoolkit.ops.linear import rows
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating


def forward(x, w1, b1, w2, b2, activation):
    u = F.linear(x, w1, b1)  # *B H
    return F.linear(GATES[activation](u), w2, b2), u


def backward(dy, du, x, w1, w2, u, activation, need):
    return gradients(elementwise, dy, du, x, w1, w2, u, activation, need)


def gradients(elementwise, dy, du, x, w1, w2, u, activation, need):
    """The products around the elementwise part, which is given."""
    wanted = need.x or need.w1, need.w2 and dy is not None, need.b1
    dh = dy @ w2 if dy is not None and (wanted[0] or wanted[2]) else None  # *B H
    du, h, db1 = elementwise(dh, du, u, activation, wanted)  # *B H, *B H, H
    dx = du @ w1 if need.x and du is not None else None  # *B I
    dw1 = rows(du).mT @ rows(x) if need.w1 and du is not None else None  # H I
    dw2 = rows(dy).mT @ rows(h) if wanted[1] else None  # O H
    return dx, dw1, db1, dw2, rows(dy).sum(0) if need.b2 and dy is not None else None


def elementwise(dh, cu, u, activation, wanted):
    """Du, h and db₁, those that are wanted; cu is what flows into u, which without a dh is all there is."""
    if not any(wanted):
        return None, None, None  # u has not been kept
    du, h, db1 = cu, None, None
    if dh is not None and (wanted[0] or wanted[2]):

        def by_pre_activation(u, dh, *c):
            return plus(chain(wide(dh), wide(u), activation), *c)

        du = by_elements(by_pre_activation, u, dh, *(() if cu is None else (cu,)))
    if wanted[2] and du is not None:
        db1 = rows(wide(du)).sum(0).to(u.dtype)  # H
    if wanted[1]:
        h = GATES[activation](u)
    return None if du is None else du.to(u.dtype), h, db1


def kernel():
    from bptoolkit.triton_kernels.mlp import KERNEL

    return KERNEL


RULE = Rule(
    "mlp",
    forward,
    backward,
    inputs="x w1 b1 w2 b2",
    outputs="y u",
    uses={"x": "w1 w2 u", "w1": "x w2 u", "b1": "w2 u", "w2": "u", "b2": ""},
    kernel=kernel,
)


def mlp(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    *,
    backend: str = "auto",
) -> Tensor:
    """y = f(x W₁ᵀ + b₁) W₂ᵀ + b₂, keeping x and the pre-activation for backward.

    Args:
        input: (*B, I), floating point.
        w1: (H, I), of the input's dtype.
        b1: (H,), likewise, or None.
        w2: (O, H), likewise.
        b2: (O,), likewise, or None.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`. The products are torch's in any case.

    Returns:
        (*B, O), of the input's dtype.

    Raises:
        TypeError: the tensors are not of one floating-point dtype.
        ValueError: shapes or devices disagree, the activation is not known, or the named backend cannot run the call.
    """
    input, w1, b1, w2, b2 = OP.cast(input, w1, b1, w2, b2)
    for name, t in (("w1", w1), ("w2", w2)):
        check_floating("mlp", name, t)
    OP.check(input, w1, b1, w2, b2)
    check_activation("mlp", activation, GATES)
    args = (input, w1, b1, w2, b2, activation)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


def reference(input, w1, b1, w2, b2, activation="gelu"):
    u = F.linear(input, w1, b1)
    f = F.gelu(u, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(u)
    return F.linear(f, w2, b2)


def case(draw: Draw) -> Case:
    I, H, O = draw.size(), draw.size(), draw.size()
    x, w1 = draw.tensor(*draw.batch(), I), draw.tensor(H, I, scale=max(I, 1) ** -0.5)
    b1, b2 = (draw.tensor(n) if draw.random.random() < 0.75 else None for n in (H, O))
    kwargs = {"activation": draw.choice(tuple(GATES))} if draw.flag() else {}
    return Case((x, w1, b1, draw.tensor(O, H, scale=max(H, 1) ** -0.5), b2), kwargs)


def bench(draw: Draw) -> Case:
    w1, w2 = draw.tensor(1024, 256, scale=1 / 16), draw.tensor(256, 1024, scale=1 / 32)
    return Case((draw.tensor(16, 128, 256), w1, draw.tensor(1024), w2, draw.tensor(256)), {})


OP = Op(
    name="mlp",
    call=mlp,
    reference=reference,
    rules=(RULE,),
    shapes="input: *B I, w1: H I, b1: H, w2: O H, b2: O -> *B O",
    source="Vaswani et al. 2017, eq. 2",
    autocast=LOW,
    case=case,
    bench=bench,
)
OPS = (OP,)
