"""Cross entropy of a linear layer's logits, which are never held whole.

Maths     a = x Wᵀ + b,  t = s tanh(a / s) or a itself,  p = softmax(t),  z = log Σ eᵗ in each row
          ℓ = − Σ_c r_c log p_c + λ v_k z²,  r_c = (1 − ε) v_k [c = k] + (ε/C) v_c;  ℓ = 0 where k is the ignored index
          da_c = dℓ (p_c (Σ_c r_c + 2 λ v_k z) − r_c) (1 − (t_c / s)²)        dx = da W        dW = daᵀ x        db = Σ_n da
          dv_c = Σ_n dℓ_n ([c = k_n] λ z_n² − ((1 − ε) [c = k_n] + ε/C) log p_nc), and for the mean
          − (dl l / Σ_n v_k) Σ_n [c = k_n] besides
Letters   x input N I; W weight C I, w in the code; b bias C; k class indices N; v class weights C
          ε smoothing; λ z_loss; s softcap; gx gw gb the gradients of Σ_n ℓ_n
Numerics  rows are taken R at a time: R C logits are held, never N C; p from t − max t, not from t − z, which is rounded to the
          size of the logits; half tensors: products in their dtype as `linear` has them, the rest and the sums over rows in
          float32
Source    Wijmans et al., "Cut your losses in large-vocabulary language models", 2024, section 4; Bridle 1990, eq. 12;
          z: Chowdhery et al., "PaLM", 2022, section 5; s: Gemma Team, "Gemma 2", 2024, section 2

There are two rules. RULE keeps its inputs alone, and backward makes the logits again: four matrix products. FUSED, for a loss
that is one number, makes the gradients in forward: three products, and backward has only to multiply. It runs where the kernel
does and a gradient will be wanted. gx, gw and gb are of the sum, not of the mean, whose 1/N is too small for float16; they are
constants: a backward that is itself differentiated is RULE's, which reads the inputs.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import LOW, Op
from bptoolkit.ops.cross_entropy import at_index, check_classes, cross_entropy
from bptoolkit.ops.linear import linear
from bptoolkit.ops.reduction import REDUCTIONS, check_reduction, reduce, share
from bptoolkit.precision import wide
from bptoolkit.shapes import Shapes

CHUNK, LEAST, MOST = 1 << 22, 256, 16  # logits in a chunk; rows in one at least; chunks at most in a graph


def rows_of(N, C, alone):
    """R: how many rows are taken at a time."""
    R = max(CHUNK // C, LEAST)
    return max(R if alone else max(R, -(-N // MOST)), 1)


def capped(a, softcap):
    return a if softcap is None else softcap * torch.tanh(a / softcap)  # t


def cap_slope(a, softcap):
    """1 − tanh²(a / s), without the difference."""
    return 4 * torch.sigmoid(a * (2 / softcap)) * torch.sigmoid(a * (-2 / softcap))


def finish(l, W, x, reduction, full):
    """The reduced loss of the rows' ℓ, in its dtype."""
    return reduce(l, W, reduction).to(torch.promote_types(x.dtype, torch.float32) if full else x.dtype)


def forward(x, w, b, v, k, ignore, reduction, smoothing, full, z_loss, softcap):
    k, counts, vk = at_index(x, v, k, ignore)  # N
    C, ls = w.shape[0], []
    for x1, k1, v1 in zip(*(t.split(rows_of(x.shape[0], C, unwatched(x, w, b))) for t in (x, k, vk))):
        t = capped(wide(F.linear(x1, w, b)), softcap)  # R C
        logp = torch.log_softmax(t, 1)  # R C
        l = (smoothing - 1) * v1 * logp.gather(1, k1.unsqueeze(1)).squeeze(1)  # R
        if smoothing:
            l = l - (smoothing / C) * (logp if v is None else wide(v) * logp).sum(1)
        if z_loss:
            l = l + z_loss * v1 * torch.logsumexp(t, 1) ** 2
        ls.append(l)
    return finish(torch.where(counts, torch.cat(ls), 0), vk.sum(), x, reduction, full)


def backward(dl, x, w, b, v, k, l, ignore, reduction, smoothing, z_loss, softcap, need):
    k, counts, vk = at_index(x, v, k, ignore)  # N
    (N, C), alone = (x.shape[0], w.shape[0]), unwatched(dl, x, w, b, v)
    W = vk.sum()
    d = torch.where(counts, share(dl, W, reduction), 0)  # N: dℓ
    hit, flat, zed = (1 - smoothing) * d * vk, (smoothing / C) * d, (2 * z_loss) * d * vk
    row = hit + flat * (C if v is None else wide(v).sum())  # N: dℓ Σ_c r_c
    dxs, dw, db, dv = [], None, None, torch.zeros_like(wide(v)) if need.v else None
    if need.v and reduction == "mean":  # by W
        dv = dv.index_add(0, k, torch.where(counts, -wide(dl) * wide(l) / W, 0))  # C
    rows = (t.split(rows_of(N, C, alone)) for t in (x, k, row, hit, flat, zed, d))
    for x1, k1, row1, hit1, flat1, zed1, d1 in zip(*rows):
        a = wide(F.linear(x1, w, b))  # R C
        t = capped(a, softcap)  # R C
        z = torch.logsumexp(t, 1) if z_loss else None  # R
        if need.v:
            logp = torch.log_softmax(t, 1)  # R C
            dv = dv.index_add(0, k1, (smoothing - 1) * d1 * logp.gather(1, k1.unsqueeze(1)).squeeze(1))
            dv = dv - (flat1.unsqueeze(1) * logp).sum(0) if smoothing else dv  # C
            dv = dv.index_add(0, k1, z_loss * d1 * z**2) if z_loss else dv
        if not (need.x or need.w or need.b):
            continue
        p = torch.softmax(t, 1)  # R C
        if z_loss:
            row1 = row1 + zed1 * z
        if alone:
            da = p.mul_(row1.unsqueeze(1)).scatter_add_(1, k1.unsqueeze(1), -hit1.unsqueeze(1))
        else:
            da = (p * row1.unsqueeze(1)).scatter_add(1, k1.unsqueeze(1), -hit1.unsqueeze(1))
        if smoothing:
            da = da - (flat1.unsqueeze(1) if v is None else flat1.unsqueeze(1) * wide(v))
        if softcap is not None:
            da = da * cap_slope(a, softcap)
        low = da.to(x.dtype)
        if need.x:
            dxs.append(low @ w)  # R I
        if need.w and alone and dw is not None and dw.dtype == x.dtype:
            dw.addmm_(low.mT, x1)  # C I
        elif need.w:
            part = wide(low.mT @ x1)
            dw = part if dw is None else dw.add_(part) if alone else dw + part
        if need.b:
            part = da.sum(0)  # C
            db = part if db is None else db + part
    dx = torch.cat(dxs) if need.x else None
    return dx, dw.to(w.dtype) if need.w else None, db.to(b.dtype) if need.b else None, dv.to(v.dtype) if need.v else None, None


def forward_fused(x, w, b, v, k, ignore, reduction, smoothing, full, z_loss, softcap, wanted):
    """The plain form: forward, and backward of the sum. `wanted` has the letters of the gradients; others are empty."""
    l = forward(x, w, b, v, k, ignore, reduction, smoothing, full, z_loss, softcap)
    need = RULE.Need(*(letter in wanted for letter in RULE.inputs))
    one = torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    gx, gw, gb, *_ = backward(one, x, w, b, v, k, l, ignore, "sum", smoothing, z_loss, softcap, need)
    return l, *(torch.zeros(0, dtype=x.dtype, device=x.device) if g is None else g for g in (gx, gw, gb))


def backward_fused(dl, x, w, b, v, k, l, gx, gw, gb, ignore, reduction, smoothing, z_loss, softcap, wanted, need):
    letters = [letter for letter, n in zip(RULE.inputs, need) if n]
    if torch.is_grad_enabled() or not set(letters) <= set(wanted):  # it is being differentiated: no constants
        return backward(dl, x, w, b, v, k, l, ignore, reduction, smoothing, z_loss, softcap, need)
    _, counts, vk = at_index(x, v, k, ignore)  # N
    d = share(dl, vk.sum(), reduction)
    d = torch.where(counts, d, 0).unsqueeze(1), *(torch.where(counts.any(), d, 0).reshape(1),) * 2  # N 1; 1
    return *(scaled(g, e, t) if n else None for g, e, t, n in zip((gx, gw, gb), d, (x, w, b), need)), None, None


def scaled(g, d, t):
    """g d, in t's dtype; d has a dimension, so that half tensors are multiplied in float32."""
    if unwatched(g, d):
        return torch.mul(g, d, out=torch.empty(g.shape, dtype=t.dtype, device=g.device))  # nothing besides is allocated
    return (g * d).to(t.dtype)


def _kernel():
    from bptoolkit.triton_kernels.linear_cross_entropy import KERNEL

    return KERNEL


def _kernel_fused():
    from bptoolkit.triton_kernels.linear_cross_entropy import FUSED

    return FUSED


_ALL = "x w b v k"
RULE = Rule(
    "linear_cross_entropy",
    forward,
    backward,
    inputs="x w b v k",
    outputs="l",
    uses={"x": _ALL, "w": _ALL, "b": _ALL, "v": _ALL + " l"},
    kernel=_kernel,
)
FUSED = Rule(
    "linear_cross_entropy_fused",
    forward_fused,
    backward_fused,
    inputs="x w b v k",
    outputs="l gx gw gb",
    constants="gx gw gb",
    uses={"x": _ALL + " gx", "w": _ALL + " gw", "b": _ALL + " gb", "v": _ALL + " l"},
    kernel=_kernel_fused,
)
SHAPES = Shapes("input: N I, linear_weight: C I, linear_bias: C -> N")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`cross_entropy(linear(input, ...), target)` of class indices, as `torch.nn.functional.linear_cross_entropy`.

    With class indices the logits are made and used some rows at a time. Class probabilities and a K-dimensional loss are
    computed by `linear` and `cross_entropy`, logits and all. The kernel makes the gradients of "mean" and "sum" together with
    the loss, unless grad mode is off.

    Args:
        input: (N, I) or (I,), floating point.
        linear_weight: (C, I), or (C, *K, I) for a K-dimensional loss.
        target: class indices (N,), () or (N, *K), int64 or uint8; or class probabilities (N, C, *K).
        linear_bias: (C,) or (C, *K).
        weight: (C,), per class.
        reduction: "none", "mean" or "sum".
        ignore_index: the index that contributes nothing, −100 if None; with indices only.
        label_smoothing: the share of the target spread over all classes, in [0, 1].
        options: torch's options of chunking; taken, and not needed.
        z_loss: the factor of z², z = log Σ eᵗ of a row's logits, in the loss of each row, which the weight of the row's class
            multiplies as it does the rest; with indices only.
        softcap: the logits a become softcap · tanh(a / softcap) first, so that they stay within ±softcap; with indices only.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        A scalar, or target's shape (without the classes) for "none"; differentiable by input,
            linear_weight, linear_bias and weight.

    Raises:
        ValueError: shapes that disagree, an index out of range (checked on the CPU, outside transforms), a label_smoothing
            outside [0, 1], a z_loss below 0, a softcap that is not above 0, any of both or an ignore_index with
            probabilities, or a reduction that does not exist.
        TypeError: tensors of several dtypes, or a target that is neither of indices nor of input's dtype.
    """
    op = "linear_cross_entropy"
    check_reduction(op, reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing={label_smoothing} is outside [0, 1]")
    if not z_loss >= 0:
        raise ValueError(f"{op}: z_loss={z_loss} is not at least 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap={softcap} is not above 0")
    if not isinstance(input, Tensor) or not 1 <= input.dim() <= 2:
        found = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"{op}: input must be (N, I) or (I,), not {found}")
    if not isinstance(linear_weight, Tensor) or linear_weight.dim() < 2:
        found = tuple(linear_weight.shape) if isinstance(linear_weight, Tensor) else type(linear_weight).__name__
        raise ValueError(f"{op}: linear_weight must be (C, I) or (C, *K, I), not {found}")
    C, K, I = linear_weight.shape[0], linear_weight.shape[1:-1], linear_weight.shape[-1]
    if K and input.dim() == 1:
        raise ValueError(f"{op}: linear_weight {tuple(linear_weight.shape)} needs an input (N, I), not {tuple(input.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"{op}: linear_bias has shape {tuple(linear_bias.shape)}; linear_weight {tuple(linear_weight.shape)} needs "
            f"{tuple(linear_weight.shape[:-1])}"
        )
    batched = input if input.dim() == 2 else input.unsqueeze(0)
    flat_bias = linear_bias if linear_bias is None else linear_bias.reshape(-1)
    w = linear_weight if not K else linear_weight.reshape(prod(K) * C, I)
    SHAPES.check(op, batched, w, flat_bias)
    logits_shape = (*input.shape[:-1], C, *K)
    probabilities = isinstance(target, Tensor) and target.shape == logits_shape
    if probabilities and ignore_index is not None:
        raise ValueError(f"{op}: ignore_index={ignore_index} goes with class indices, not with probabilities")
    ignore = -100 if ignore_index is None else ignore_index
    if probabilities or K:
        if z_loss or softcap is not None:
            what = "class probabilities" if probabilities else f"a loss of {len(K)} more dimensions"
            raise ValueError(f"{op}: z_loss={z_loss} and softcap={softcap} go with class indices (N), not with {what}")
        a = linear(input, w, flat_bias, backend=backend).reshape(logits_shape)
        kw: Any = {"ignore_index": ignore, "reduction": reduction, "label_smoothing": label_smoothing}
        return cross_entropy(a, target, weight, **kw, backend=backend)
    check_classes(op, input.new_empty(()).expand(logits_shape), target, weight, ignore)
    x, w, b = OP.cast(batched, w, flat_bias)
    full = bool(x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))
    k = target.long() if input.dim() == 2 else target.long().unsqueeze(0)
    cap = None if softcap is None else float(softcap)
    args = (x, w, b, weight, k, ignore, reduction, float(label_smoothing), full, float(z_loss), cap)
    chosen = OP.pick(RULE, backend, *args)
    wanted = _wanted(x, w, b, weight) if chosen == "triton" and reduction != "none" else ""
    l = FUSED(*args, wanted, backend=chosen)[0] if wanted else RULE(*args, backend=chosen)
    return l.squeeze(0) if reduction == "none" and input.dim() == 1 else l


def _wanted(x: Tensor, w: Tensor, b: Tensor | None, v: Tensor | None) -> str:
    """The letters of the gradients to make in forward: those that will be asked for. None if RULE is to make them."""
    if not torch.is_grad_enabled() or (v is not None and v.requires_grad):
        return ""
    return "".join(letter for letter, t in (("x", x), ("w", w), ("b", b)) if t is not None and t.requires_grad)


_BASE: Any = getattr(nn, "LinearCrossEntropyLoss", nn.Module)  # torch has it from 2.13 on


class LinearCrossEntropyLoss(_BASE):
    """`torch.nn.LinearCrossEntropyLoss` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape, b = (self.num_classes, *self.out_features), self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if b is None else b.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            backend=self.backend,
        )


MODULES: tuple[type[nn.Module], ...] = () if _BASE is nn.Module else (LinearCrossEntropyLoss,)


def reference(input, linear_weight, target, *, linear_bias=None, weight=None, ignore_index=None, options=None, **kw):
    """The definition, in two calls of torch; z_loss in three more."""
    z_loss, softcap, ignore = kw.pop("z_loss", 0.0), kw.pop("softcap", None), -100 if ignore_index is None else ignore_index
    a = F.linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    a = a.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    a = a if softcap is None else softcap * (a / softcap).tanh()
    l = F.cross_entropy(a, target, weight, ignore_index=ignore, **kw)
    if not z_loss:
        return l
    counts = target != ignore
    vk = counts.to(a.dtype) if weight is None else torch.where(counts, weight[torch.where(counts, target, 0)], 0)
    z = z_loss * vk * a.logsumexp(-1).square()
    reduction = kw.get("reduction", "mean")
    return l + (z if reduction == "none" else z.sum() if reduction == "sum" else z.sum() / vk.sum()).to(l.dtype)


def case(draw: Draw) -> Case:
    N, C, I = draw.size(), draw.size(least=1), draw.size()
    rows = () if draw.random.random() < 0.15 else (N,)
    x, w = draw.tensor(*rows, I), draw.tensor(C, I, scale=max(I, 1) ** -0.5)
    kwargs: dict[str, Any] = {"reduction": draw.choice(REDUCTIONS), "label_smoothing": draw.choice((0.0, 0.0, 0.3))}
    k = draw.integers(0, C, *rows)
    if draw.flag():
        kwargs["linear_bias"] = draw.tensor(C)
    if draw.flag():
        kwargs["weight"] = draw.tensor(C).detach().abs() + 0.1
    if draw.flag() and k.device.type != "meta" and bool((k != 0).any()):
        kwargs["ignore_index"] = 0
    if draw.random.random() < 0.3:
        kwargs |= draw.choice(({"z_loss": 0.1}, {"softcap": 2.0}, {"z_loss": 0.1, "softcap": 2.0}))
    return Case((x, w, k), kwargs)


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(1024, 256), draw.tensor(16384, 256, scale=256**-0.5), draw.integers(0, 16384, 1024)), {})


OP = Op(
    name="linear_cross_entropy",
    call=linear_cross_entropy,
    reference=reference,
    rules=(RULE, FUSED),
    module=MODULES,
    replaces=(_BASE,) if MODULES else (),
    shapes="input: N I, linear_weight: C I, target: N -> N",
    source="Wijmans et al. 2024",
    autocast=LOW,
    case=case,
    bench=bench,
)
OPS = (OP,)
