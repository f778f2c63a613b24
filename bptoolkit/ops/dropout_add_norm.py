"""Dropout, the residual sum and the normalization after it, in one node: only the sum and a seed are kept.

Maths     s = k ∘ x/(1 − p) + a        y = layer_norm(s), or rms_norm(s)
          da = ds + (the gradient of the normalization by s)        dx = k ∘ da/(1 − p)        dw, db as there
Letters   x and a (the residual) of shape *B N, y and s too; k the mask, 1 with probability 1 − p, else 0, a function of the
          seed z, 2 numbers; p the share dropped; m and r residual outputs, hidden by the public functions
Numerics  the mask is not kept: it is a hash of z and the element's index, computed again in backward (`bptoolkit.randomness`);
          s is computed in float32 and rounded once, to x's dtype, before it is normalized; p = 1 is a mask of zeros
Source    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, §5.4; Zhang & Sennrich, arXiv 1910.07467
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bptoolkit import randomness
from bptoolkit.blocks import by_elements
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32_CUDA, Op
from bptoolkit.ops import add_norm, dropout, layer_norm, rms_norm
from bptoolkit.ops.add_norm import check_residual
from bptoolkit.ops.layer_norm import check_normalized
from bptoolkit.precision import wide


def summed(x, a, z, p):
    """S."""
    scale, _, _ = dropout.affine(p, False)

    def rule(x, a, k):
        return (wide(x) * (k.to(wide(x).dtype) * scale) + wide(a)).to(x.dtype)

    return by_elements(rule, x, a, randomness.keep(z, x.shape, p))


def forward(x, a, w, b, z, p, D, eps):
    s = summed(x, a, z, p)
    y, m, r = layer_norm.forward(s, w, b, D, eps)
    return y, s, m, r


def backward(dy, ds, dm, dr, s, w, b, m, r, z, p, D, need):
    inner = add_norm.RULE.Need(x=need.x, a=need.a, w=need.w, b=need.b)
    da, _, dw, db = add_norm.backward(dy, ds, dm, dr, s, w, b, m, r, D, inner)
    return through_mask(da, z, p, need), da if need.a else None, dw, db, None


def rms_forward(x, a, w, z, p, D, eps):
    s = summed(x, a, z, p)
    y, r = rms_norm.forward(s, w, D, eps)
    return y, s, r


def rms_backward(dy, ds, dr, s, w, r, z, p, D, need):
    inner = add_norm.RMS_RULE.Need(x=need.x, a=need.a, w=need.w)
    da, _, dw = add_norm.rms_backward(dy, ds, dr, s, w, r, D, inner)
    return through_mask(da, z, p, need), da if need.a else None, dw, None


def through_mask(da, z, p, need):
    """Dx."""
    return None if da is None or not need.x else dropout.backward(da, z, p, da.dim(), False)[0]


def kernel():
    from bptoolkit.triton_kernels.dropout_add_norm import LAYER

    return LAYER


def rms_kernel():
    from bptoolkit.triton_kernels.dropout_add_norm import RMS

    return RMS


KEPT = "s w m r"
RULE = Rule(
    "dropout_add_layer_norm",
    forward,
    backward,
    inputs="x a w b z",
    outputs="y s m r",
    uses={"x": KEPT + " z", "a": KEPT, "w": KEPT, "b": "b"},
    kernel=kernel,
)
RMS_RULE = Rule(
    "dropout_add_rms_norm",
    rms_forward,
    rms_backward,
    inputs="x a w z",
    outputs="y s r",
    uses={"x": "s w r z", "a": "s w r", "w": "s w r"},
    kernel=rms_kernel,
)


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Layer normalization of dropout(input, p) + residual, and that sum. `torch.manual_seed` governs the mask.

    Args:
        input: (*B, *normalized_shape), floating point.
        residual: of input's shape and dtype.
        normalized_shape: the sizes of the dimensions to normalize over, one or more.
        weight: of normalized_shape, or None; of input's dtype, or float32 for a half input.
        bias: as weight.
        p: the probability of an element of input to be dropped, in [0, 1]; the others are divided by 1 − p.
        training: if not, nothing is dropped.
        eps: added to the variance.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        layer_norm(dropout(input) + residual) and dropout(input) + residual, each of input's shape and dtype.

    Raises:
        ValueError: shapes or devices disagree, p is outside [0, 1], or the named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
        RuntimeError: vmap with randomness="error".
    """
    input, residual, weight, bias = OP.cast(input, residual, weight, bias)
    D = check_normalized("dropout_add_layer_norm", input, normalized_shape, weight, bias)
    check_residual("dropout_add_layer_norm", input, residual)
    dropout.check_share("dropout_add_layer_norm", p)
    if not training or p == 0 or input.numel() == 0:
        plain = (input, residual, weight, bias, D, eps)
        return add_norm.RULE(*plain, backend=OP.pick(add_norm.RULE, backend, *plain))[:2]
    args = (input, residual, weight, bias, randomness.draw_seed(input), float(p), D, eps)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[:2]


def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    eps: float | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of dropout(input, p) + residual, and that sum; arguments and errors as `dropout_add_layer_norm`.

    Eps None is the machine epsilon, of float32 for half inputs.
    """
    D = check_normalized("dropout_add_rms_norm", input, normalized_shape, weight)
    check_residual("dropout_add_rms_norm", input, residual)
    dropout.check_share("dropout_add_rms_norm", p)
    eps = rms_norm.epsilon(input, eps)
    if not training or p == 0 or input.numel() == 0:
        plain = (input, residual, weight, D, eps)
        return add_norm.RMS_RULE(*plain, backend=RMS_OP.pick(add_norm.RMS_RULE, backend, *plain))[:2]
    args = (input, residual, weight, randomness.draw_seed(input), float(p), D, eps)
    return RMS_RULE(*args, backend=RMS_OP.pick(RMS_RULE, backend, *args))[:2]


def reference(input, residual, normalized_shape, weight=None, bias=None, p=0.5, training=True, eps=1e-5):
    """In plain torch, with the mask that the same state of torch's generator gives."""
    s = dropout.DROPOUT.reference(input, p, training) + residual
    return layer_norm.reference(s, normalized_shape, weight, bias, eps), s


def rms_reference(input, residual, normalized_shape, weight=None, p=0.5, training=True, eps=None):
    """The same."""
    s = dropout.DROPOUT.reference(input, p, training) + residual
    return rms_norm.reference(s, normalized_shape, weight, eps), s


def peer(input, residual, normalized_shape, weight=None, bias=None, p=0.5, training=True, eps=1e-5):
    s = F.dropout(input, p, training) + residual
    return F.layer_norm(s, normalized_shape, weight, bias, eps), s


def rms_peer(input, residual, normalized_shape, weight=None, p=0.5, training=True, eps=None):
    s = F.dropout(input, p, training) + residual
    return F.rms_norm(s, normalized_shape, weight, eps), s


def _with_dropout(draw: Draw, case: Case, p: float) -> Case:
    x, *rest = case.args
    return Case((x, draw.tensor(*x.shape), *rest), {**case.kwargs, "p": p})


def _op(call: Any, reference: Any, peer: Any, rules: tuple[Rule, ...], of: Any, shapes: str, **kw: Any) -> Op:
    return Op(
        name=rules[0].name,
        call=call,
        reference=reference,
        peer=peer,
        rules=rules,
        shapes=shapes,
        source="Vaswani et al. 2017, §5.4; " + of.OP.source,
        case=lambda draw: _with_dropout(draw, of.case(draw), draw.choice((0.5, 0.3, 0.1, 0.9))),
        bench={"4096 × 1024": lambda draw: _with_dropout(draw, of.bench(draw), 0.1)},
        random=True,
        **kw,
    )


OP = _op(
    dropout_add_layer_norm,
    reference,
    peer,
    (RULE, add_norm.RULE),
    layer_norm,
    "input: *B N, residual: *B N, weight: N, bias: N -> *B N, *B N",
    autocast=FLOAT32_CUDA,
)
RMS_OP = _op(
    dropout_add_rms_norm,
    rms_reference,
    rms_peer,
    (RMS_RULE, add_norm.RMS_RULE),
    rms_norm,
    "input: *B N, residual: *B N, weight: N -> *B N, *B N",
)
OPS = (OP, RMS_OP)
