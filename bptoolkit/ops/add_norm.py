"""The residual sum and the normalization after it, in one node: s = x + a is kept once, as an output.

Maths     s = x + a        y = layer_norm(s), or rms_norm(s)
          dx = da = ds + (the gradient of the normalization by s)        dw, db as there
Letters   x and a (the residual) of shape *B N, y and s too; m and r residual outputs, hidden by the public functions
Numerics  s is rounded to x's dtype before it is normalized, as it is in two separate ops
Source    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, §3.1; Zhang & Sennrich, arXiv 1910.07467
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32_CUDA, Op
from bptoolkit.ops import layer_norm, rms_norm
from bptoolkit.ops.layer_norm import check_normalized
from bptoolkit.shapes import check_alike, check_floating


def forward(x, a, w, b, D, eps):
    s = x + a
    y, m, r = layer_norm.forward(s, w, b, D, eps)
    return y, s, m, r


def backward(dy, ds, dm, dr, s, w, b, m, r, D, need):
    summand = need.x or need.a
    dsum = dw = db = None
    if dy is not None or dm is not None or dr is not None:
        inner = layer_norm.RULE.Need(x=summand, w=need.w, b=need.b)
        dsum, dw, db = layer_norm.backward(dy, dm, dr, s, w, b, m, r, D, inner)
    dsum = total(dsum, ds) if summand else None
    return dsum, dsum, dw, db


def rms_forward(x, a, w, D, eps):
    s = x + a
    y, r = rms_norm.forward(s, w, D, eps)
    return y, s, r


def rms_backward(dy, ds, dr, s, w, r, D, need):
    summand = need.x or need.a
    dsum = dw = None
    if dy is not None or dr is not None:
        dsum, dw = rms_norm.backward(dy, dr, s, w, r, D, rms_norm.RULE.Need(x=summand, w=need.w))
    dsum = total(dsum, ds) if summand else None
    return dsum, dsum, dw


def total(t, u):
    return u if t is None else t if u is None else t + u


def kernel():
    from bptoolkit.triton_kernels.add_norm import LAYER

    return LAYER


def rms_kernel():
    from bptoolkit.triton_kernels.add_norm import RMS

    return RMS


KEPT = "s w m r"
RULE = Rule(
    "add_layer_norm",
    forward,
    backward,
    inputs="x a w b",
    outputs="y s m r",
    uses={"x": KEPT, "a": KEPT, "w": KEPT, "b": "b"},
    kernel=kernel,
)
RMS_RULE = Rule("add_rms_norm", rms_forward, rms_backward, inputs="x a w", outputs="y s r", kernel=rms_kernel)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Layer normalization of input + residual, and that sum.

    Args:
        input: (*B, *normalized_shape), floating point.
        residual: of input's shape and dtype.
        normalized_shape: the sizes of the dimensions to normalize over, one or more.
        weight: of normalized_shape, or None; of input's dtype, or float32 for a half input.
        bias: as weight.
        eps: added to the variance.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        layer_norm(input + residual) and input + residual, each of input's shape and dtype.

    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
    """
    input, residual, weight, bias = OP.cast(input, residual, weight, bias)
    D = check_normalized("add_layer_norm", input, normalized_shape, weight, bias)
    check_residual("add_layer_norm", input, residual)
    args = (input, residual, weight, bias, D, eps)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[:2]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Root-mean-square normalization of input + residual, and that sum; arguments and errors as `add_layer_norm`."""
    D = check_normalized("add_rms_norm", input, normalized_shape, weight)
    check_residual("add_rms_norm", input, residual)
    eps = rms_norm.epsilon(input, eps)
    args = (input, residual, weight, D, eps)
    return RMS_RULE(*args, backend=RMS_OP.pick(RMS_RULE, backend, *args))[:2]


def check_residual(op: str, x: Tensor, a: Any) -> None:
    check_floating(op, "residual", a)
    check_alike(op, "input", x, "residual", a)
    if a.shape != x.shape:
        raise ValueError(f"{op}: residual has shape {tuple(a.shape)} but input {tuple(x.shape)}; they must be equal")


def reference(input, residual, normalized_shape, weight=None, bias=None, eps=1e-5):
    s = input + residual
    return layer_norm.reference(s, normalized_shape, weight, bias, eps), s


def rms_reference(input, residual, normalized_shape, weight=None, eps=None):
    s = input + residual
    return rms_norm.reference(s, normalized_shape, weight, eps), s


def peer(input, residual, normalized_shape, weight=None, bias=None, eps=1e-5):
    s = input + residual
    return F.layer_norm(s, normalized_shape, weight, bias, eps), s


def rms_peer(input, residual, normalized_shape, weight=None, eps=None):
    s = input + residual
    return F.rms_norm(s, normalized_shape, weight, eps), s


def _with_residual(draw: Draw, case: Case) -> Case:
    x, *rest = case.args
    return Case((x, draw.tensor(*x.shape), *rest), case.kwargs)


def _op(call: Any, reference: Any, peer: Any, rule: Rule, of: Any, shapes: str, **kw: Any) -> Op:
    return Op(
        name=rule.name,
        call=call,
        reference=reference,
        peer=peer,
        rules=(rule,),
        shapes=shapes,
        source=of.OP.source,
        case=lambda draw: _with_residual(draw, of.case(draw)),
        bench={"4096 × 1024": lambda draw: _with_residual(draw, of.bench(draw))},
        **kw,
    )


OP = _op(
    add_layer_norm,
    reference,
    peer,
    RULE,
    layer_norm,
    "input: *B N, residual: *B N, weight: N, bias: N -> *B N, *B N",
    autocast=FLOAT32_CUDA,
)
RMS_OP = _op(add_rms_norm, rms_reference, rms_peer, RMS_RULE, rms_norm, "input: *B N, residual: *B N, weight: N -> *B N, *B N")
OPS = (OP, RMS_OP)
