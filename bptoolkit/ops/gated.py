"""Gated linear units: glu, which splits its input, and swiglu, geglu, reglu of two tensors.

Maths     glu     y = a σ(b)          da = dy σ(b)              db = dy a σ(b) (1 − σ(b))
          swiglu  y = b silu(a)       da = dy b silu'(a)        db = dy silu(a)        silu'(a) = σ(a) (1 + a (1 − σ(a)))
          geglu   y = b gelu(a)       da = dy b gelu'(a)        db = dy gelu(a)        gelu' is Φ(a) + a φ(a), see activation.py
          reglu   y = b relu(a)       da = dy b [a > 0]         db = dy relu(a)
Letters   glu: x of any shape, whose dimension `dim` is a followed by b; the others: a the gate and b what it lets through, of
          one shape (*B); σ(x) = 1 / (1 + e⁻ˣ); dt is the gradient of the loss by t
Numerics  the inputs are kept, the activation of the gate is computed again; half tensors are computed in float32 and y is
          rounded once; reglu lets NaN through, and blocks any cotangent where the gate is off, infinite ones too
Source    Dauphin et al., arXiv 1612.08083, eq. 1 (glu); Shazeer, arXiv 2002.05202, eq. 6 (reglu, geglu, swiglu)
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_elements, by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.ops.activation import gelu_slope, gelu_tanh_slope, silu_slope
from bptoolkit.ops.elementwise import either, holds
from bptoolkit.precision import wide


def glu_forward(x, dim):
    return F.glu(x, dim)


def glu_backward(dy, x, dim):
    def rule(x, dy, dim):
        a, b = wide(x).chunk(2, dim)
        da = wide(dy) * b.sigmoid()
        return torch.cat((da, da * a * torch.sigmoid(-b)), dim).to(dy.dtype)

    d = dim % x.dim()
    if d == 0:
        return rule(x, dy, 0)
    R = prod(x.shape[:d])  # what stands before dim is rows that may be taken block by block
    rows = (t.reshape(R, *t.shape[d:]) for t in (x, dy))
    return by_rows(lambda x, dy: rule(x, dy, 1), *rows).reshape(x.shape)


def gated_forward(activation, a, b):
    """y = b activation(a), rounded once."""
    if wide(a) is a and unwatched(a, b):
        return activation(a).mul_(b)
    return by_elements(lambda a, b: (activation(wide(a)) * wide(b)).to(a.dtype), a, b)


def gated_backward(activation, slope, dy, a, b, need):
    da = db = None
    if need.a:
        da = by_elements(lambda a, b, dy: (wide(dy) * wide(b) * slope(wide(a))).to(dy.dtype), a, b, dy)
    if need.b:
        db = by_elements(lambda a, dy: (wide(dy) * activation(wide(a))).to(dy.dtype), a, dy)
    return da, db


def swiglu_forward(a, b):
    return gated_forward(F.silu, a, b)


def swiglu_backward(dy, a, b, need):
    return gated_backward(F.silu, silu_slope, dy, a, b, need)


def geglu_forward(a, b, approximate):
    return gated_forward(lambda a: F.gelu(a, approximate=approximate), a, b)


def geglu_backward(dy, a, b, approximate, need):
    slope = gelu_tanh_slope if approximate == "tanh" else gelu_slope
    return gated_backward(lambda a: F.gelu(a, approximate=approximate), slope, dy, a, b, need)


def reglu_forward(a, b):
    return gated_forward(torch.relu, a, b)


def reglu_backward(dy, a, b, need):
    da = db = None
    if need.a:
        da = by_elements(lambda a, b, dy: either(holds(torch.le, a, 0, b, dy), 0.0, dy * b), a, b, dy)
    if need.b:
        db = by_elements(lambda a, dy: dy * torch.relu(a), a, dy)
    return da, db


def glu_kernel():
    from bptoolkit.triton_kernels.gated import GLU

    return GLU


def swiglu_kernel():
    from bptoolkit.triton_kernels.gated import SWIGLU

    return SWIGLU


def geglu_kernel():
    from bptoolkit.triton_kernels.gated import GEGLU

    return GEGLU


def reglu_kernel():
    from bptoolkit.triton_kernels.gated import REGLU

    return REGLU


KEPT: dict[str, Any] = {"inputs": "a b", "outputs": "y", "uses": {"a": "a b", "b": "a"}}
GLU_RULE = Rule("glu", glu_forward, glu_backward, inputs="x", outputs="y", kernel=glu_kernel)
SWIGLU_RULE = Rule("swiglu", swiglu_forward, swiglu_backward, **KEPT, kernel=swiglu_kernel)
GEGLU_RULE = Rule("geglu", geglu_forward, geglu_backward, **KEPT, kernel=geglu_kernel)
REGLU_RULE = Rule("reglu", reglu_forward, reglu_backward, **KEPT, kernel=reglu_kernel)


def glu(input: Tensor, dim: int = -1, *, backend: str = "auto") -> Tensor:
    """y = a σ(b) for the two halves a, b of the input along a dimension, as `torch.nn.functional.glu`.

    Args:
        input: (*, 2N, *), floating point.
        dim: the dimension of 2N.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*, N, *), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point, or `dim` is not an int.
        ValueError: the input has no dimensions, `dim` is out of range, its size is odd, or the named backend cannot run the
            call.
    """
    GLU_OP.check(input)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"glu: dim={dim!r} is not an int")
    n = input.dim()
    if not -n <= dim < n:
        raise ValueError(f"glu: dim={dim} is not a dimension of input, whose shape is {tuple(input.shape)}")
    if input.shape[dim] % 2:
        raise ValueError(f"glu: dimension {dim} of input {tuple(input.shape)} has size {input.shape[dim]}; it must be even")
    return GLU_RULE(input, dim, backend=GLU_OP.pick(GLU_RULE, backend, input, dim))


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """y = silu(gate) · up. For one tensor h that holds both: `swiglu(*h.chunk(2, dim=-1))`.

    Args:
        gate: (*B), floating point.
        up: (*B), of the gate's dtype.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the gate's dtype.

    Raises:
        TypeError: the two are not tensors of one floating-point dtype.
        ValueError: shapes or devices differ, or the named backend cannot run the call.
    """
    return _gated(SWIGLU, SWIGLU_RULE, gate, up, backend)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none", *, backend: str = "auto") -> Tensor:
    """y = gelu(gate) · up; `approximate` as in `gelu`, the other arguments and errors as `swiglu`."""
    if approximate != "none" and approximate != "tanh":
        raise ValueError(f"geglu: approximate={approximate!r} is not known; choose 'none' or 'tanh'")
    return _gated(GEGLU, GEGLU_RULE, gate, up, backend, approximate)


def reglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """y = relu(gate) · up; arguments and errors as `swiglu`."""
    return _gated(REGLU, REGLU_RULE, gate, up, backend)


def _gated(op: Op, rule: Rule, gate: Tensor, up: Tensor, backend: str, *options: Any) -> Tensor:
    op.check(gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"{op.name}: gate has shape {tuple(gate.shape)} but up {tuple(up.shape)}; they must be equal")
    return rule(gate, up, *options, backend=op.pick(rule, backend, gate, up, *options))


class GLU(nn.GLU):
    """`torch.nn.GLU` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return glu(input, self.dim, backend=self.backend)


def swiglu_reference(gate, up):
    return F.silu(gate) * up


def geglu_reference(gate, up, approximate="none"):
    return F.gelu(gate, approximate=approximate) * up


def reglu_reference(gate, up):
    return F.relu(gate) * up


def glu_case(draw: Draw) -> Case:
    before, N, after = draw.batch(1), draw.size(), draw.batch(1)
    dim = draw.choice((len(before), -1 - len(after)))
    return Case((draw.tensor(*before, 2 * N, *after, scale=2.0),), {"dim": dim} if after or draw.flag() else {})


def gated_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    return Case((draw.tensor(*shape, scale=2.0), draw.tensor(*shape)), {})


def geglu_case(draw: Draw) -> Case:
    return Case(gated_case(draw).args, draw.choice(({}, {"approximate": "tanh"})))


def glu_bench(draw: Draw) -> Case:
    return Case((draw.tensor(64, 128, 1024),), {})


def gated_bench(draw: Draw) -> Case:
    return Case((draw.tensor(64, 128, 512), draw.tensor(64, 128, 512)), {})


GLU_OP = Op(
    name="glu",
    call=glu,
    reference=F.glu,
    rules=(GLU_RULE,),
    module=(GLU,),
    replaces=(nn.GLU,),
    shapes="input: *B -> *C",
    source="Dauphin et al. 2017, eq. 1",
    case=glu_case,
    bench=glu_bench,
)


def _op(call: Callable[..., Tensor], reference: Callable[..., Tensor], rule: Rule, case: Callable[[Draw], Case]) -> Op:
    return Op(
        name=rule.name,
        call=call,
        reference=reference,
        rules=(rule,),
        shapes="gate: *B, up: *B -> *B",
        source="Shazeer 2020, eq. 6",
        case=case,
        bench=gated_bench,
    )


SWIGLU = _op(swiglu, swiglu_reference, SWIGLU_RULE, gated_case)
GEGLU = _op(geglu, geglu_reference, GEGLU_RULE, geglu_case)
REGLU = _op(reglu, reglu_reference, REGLU_RULE, gated_case)
OPS = (GLU_OP, SWIGLU, GEGLU, REGLU)
