"""Cross entropy of logits, against class indices or class probabilities.

Maths     ℓ = − Σ_c r_c log p_c,  p = softmax(x),  r the target in shares of weighted classes:
          probabilities  r_c = w_c ((1 − ε) q_c + ε/C)
          indices        r_c = w_c ((1 − ε) [c = k] + ε/C); where the index is the ignored one, r = 0

          dx_c = dℓ (p_c Σ_c r_c − r_c),  dq_c = − dℓ w_c (1 − ε) log p_c,  dw_c = − Σ_n dℓ_n (r_nc / w_c) log p_nc
          The sum has dℓ_n = dl. The mean l = Σ_n ℓ_n / W has dℓ_n = dl / W, W = N for probabilities; for indices it is
          W = Σ_n w_{k_n} over what is not ignored, whence dw_c also has − dl (l / W) Σ_n [c = k_n].
Letters   l the reduced loss; n runs over N samples and the positions *D of each, c over C classes
          x logits N C *D; k class indices N *D, or q probabilities N C *D; w class weights C; ε smoothing
Numerics  half tensors are computed in float32; the N C log-probabilities are not kept, x is; the mean over nothing is NaN,
          as in torch
Source    Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990, eq. 12;
          label smoothing: Szegedy et al., "Rethinking the Inception architecture", 2016, section 7
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32, Op
from bptoolkit.ops.reduction import REDUCTIONS, reduce, resolve
from bptoolkit.precision import wide
from bptoolkit.shapes import check_alike, check_floating


def cotangent(dl, shape, W, reduction):
    """The cotangent of each ℓ, N *D: dl itself, or its share."""
    dl = wide(dl)
    return (dl / W if reduction == "mean" else dl).expand(shape)


def along_classes(w, x):
    """The class weights, to go with N C *D."""
    return wide(w).reshape(-1, *(1,) * (x.dim() - 2))


def sum_to_classes(t):
    return t.sum((0, *range(2, t.dim())))  # N C *D -> C


def at_index(x, w, k, ignore):
    """The index, 0 where it is the ignored one; where it is not; the weight of its class, 0 where it is. N *D each."""
    counts = k != ignore
    k = torch.where(counts, k, 0)
    wk = wide(counts.to(x.dtype)) if w is None else torch.where(counts, wide(w)[k], 0)
    return k, counts, wk


def forward(x, w, k, ignore, reduction, smoothing):
    k, counts, wk = at_index(x, w, k, ignore)

    def rule(x, k, wk):
        logp = torch.log_softmax(wide(x), 1)  # N C *D
        l = (smoothing - 1) * wk * logp.gather(1, k.unsqueeze(1)).squeeze(1)  # N *D
        if smoothing:
            l = l - (smoothing / x.shape[1]) * (logp if w is None else along_classes(w, x) * logp).sum(1)
        return l

    l = torch.where(counts, by_rows(rule, x, k, wk), 0)  # N *D
    return reduce(l, wk.sum(), reduction).to(x.dtype)


def backward(dl, x, w, k, l, ignore, reduction, smoothing, need):
    k, counts, wk = at_index(x, w, k, ignore)
    W, C = wk.sum(), x.shape[1]
    d = torch.where(counts, cotangent(dl, k.shape, W, reduction), 0)  # N *D: dℓ
    hit = (1 - smoothing) * d * wk  # N *D: dℓ r's part at the index
    flat = (smoothing / C) * d if smoothing else None  # N *D: and its part in every class, without w
    dx = dw = None
    if need.x:
        row = hit if flat is None else hit + flat * (C if w is None else wide(w).sum())  # N *D: dℓ Σ_c r_c

        def rule(x, k, row, hit, flat):
            dx = row.unsqueeze(1) * torch.softmax(wide(x), 1)  # N C *D
            dx = dx.scatter_add_(1, k.unsqueeze(1), -hit.unsqueeze(1))  # dx is new: nothing else has seen it
            if flat is not None:
                dx = dx - (flat.unsqueeze(1) if w is None else flat.unsqueeze(1) * along_classes(w, x))
            return dx.to(x.dtype)

        dx = by_rows(rule, x, k, row, hit, flat)
    if need.w:
        logp = torch.log_softmax(wide(x), 1)  # N C *D
        at = (smoothing - 1) * d * logp.gather(1, k.unsqueeze(1)).squeeze(1)  # N *D
        if reduction == "mean":
            at = at - torch.where(counts, wide(dl) * l / W, 0)
        dw = torch.zeros_like(wide(w)).index_add(0, k.reshape(-1), at.reshape(-1))  # C
        dw = (dw if flat is None else dw - sum_to_classes(flat.unsqueeze(1) * logp)).to(w.dtype)
    return dx, dw, None


def smoothed(q, smoothing):
    return (1 - smoothing) * wide(q) + smoothing / q.shape[1] if smoothing else wide(q)  # N C *D


def target_of(x, q, w, smoothing):
    return smoothed(q, smoothing) if w is None else along_classes(w, x) * smoothed(q, smoothing)  # r: N C *D


def forward_probabilities(x, q, w, reduction, smoothing):
    def rule(x, q):
        return -(target_of(x, q, w, smoothing) * torch.log_softmax(wide(x), 1)).sum(1)  # N *D

    l = by_rows(rule, x, q)
    return reduce(l, l.numel(), reduction).to(x.dtype)


def backward_probabilities(dl, x, q, w, reduction, smoothing, need):
    shape = (x.shape[0], *x.shape[2:])
    d = cotangent(dl, shape, prod(shape), reduction)  # N *D: dℓ
    dx = dq = dw = None
    if need.x:

        def rule(x, q, d):
            r = target_of(x, q, w, smoothing)
            return (d.unsqueeze(1) * (r.sum(1, keepdim=True) * torch.softmax(wide(x), 1) - r)).to(x.dtype)

        dx = by_rows(rule, x, q, d)
    if need.q or need.w:
        dr = -d.unsqueeze(1) * torch.log_softmax(wide(x), 1)  # N C *D
        if need.q:
            dq = ((1 - smoothing) * (dr if w is None else along_classes(w, x) * dr)).to(x.dtype)
        if need.w:
            dw = sum_to_classes(dr * smoothed(q, smoothing)).to(w.dtype)
    return dx, dq, dw


RULE = Rule("cross_entropy", forward, backward, inputs="x w k", outputs="l", uses={"x": "x w k", "w": "x w k l"})
PROBABILITIES = Rule(
    "cross_entropy_probabilities",
    forward_probabilities,
    backward_probabilities,
    inputs="x q w",
    outputs="l",
    uses={"q": "x w", "w": "x w q"},
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy between logits and classes, as `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (C,), (N, C) or (N, C, *D), floating point.
        target: class indices (), (N,) or (N, *D), int64 or uint8; or class probabilities of input's shape and dtype.
        weight: (C,), per class.
        size_average: deprecated, see reduction.
        ignore_index: the index that contributes nothing; with indices only.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        label_smoothing: the share of the target spread over all classes, in [0, 1].
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        A scalar, or target's shape (without the classes) for "none". Differentiable by input, by probabilities, by weight.

    Raises:
        ValueError: shapes that disagree, an index out of range (checked on the CPU, outside transforms), a label_smoothing
            outside [0, 1], an ignore_index with probabilities, no classes, or a reduction that does not exist.
        TypeError: a target that is neither int64, uint8 nor of input's dtype, or tensors of several dtypes.
    """
    reduction = resolve("cross_entropy", reduction, size_average, reduce)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing={label_smoothing} is outside [0, 1]")
    input, target, weight = OP.cast(input, target, weight)
    indices = check_classes("cross_entropy", input, target, weight, ignore_index)
    if indices and target.dtype == torch.uint8:
        target = target.long()
    x, t = (input.unsqueeze(0), target.unsqueeze(0)) if input.dim() == 1 else (input, target)
    if indices:
        l = RULE(x, weight, t, ignore_index, reduction, label_smoothing, backend=OP.pick(RULE, backend, x, weight))
    else:
        l = PROBABILITIES(x, t, weight, reduction, label_smoothing, backend=OP.pick(PROBABILITIES, backend, x, t, weight))
    return l.squeeze(0) if reduction == "none" and input.dim() == 1 else l


def check_classes(op: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None) -> bool:
    """Raise for arguments that disagree; whether the target is of class indices."""
    check_floating(op, "input", input)
    if input.dim() == 0:
        raise ValueError(f"{op}: input has no dimensions; it needs (C), (N C) or (N C *D)")
    C = input.shape[0 if input.dim() == 1 else 1]
    if C == 0:
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}, which has no classes")
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, not {type(target).__name__}")
    if target.device != input.device:
        raise ValueError(f"{op}: target is on {target.device} but input is on {input.device}")
    if weight is not None:
        check_floating(op, "weight", weight)
        check_alike(op, "input", input, "weight", weight)
        if weight.shape != (C,):
            raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; input {tuple(input.shape)} has C={C} classes")
    if target.dtype.is_floating_point:
        check_alike(op, "input", input, "target", target)
        if target.shape != input.shape:
            raise ValueError(
                f"{op}: target of class probabilities has shape {tuple(target.shape)} but input {tuple(input.shape)}"
            )
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError(f"{op}: ignore_index={ignore_index} goes with class indices, not with probabilities")
        return False
    if target.dtype != torch.int64 and target.dtype != torch.uint8:
        raise TypeError(f"{op}: target is {target.dtype}; class indices must be int64 or uint8, probabilities {input.dtype}")
    wanted = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    if target.shape != wanted:
        raise ValueError(
            f"{op}: target of class indices has shape {tuple(target.shape)}; input {tuple(input.shape)} needs {tuple(wanted)}"
        )
    if type(target) is Tensor and target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        _check_range(op, target, C, ignore_index)
    return True


def _check_range(op: str, target: Tensor, C: int, ignore_index: int | None) -> None:
    """Raise for an index that is no class; looks at values, so only where nothing transforms or traces."""
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return
    low, high = (int(v) for v in torch.aminmax(target))
    if low >= 0 and high < C:
        return
    wrong = target[((target < 0) | (target >= C)) & (target != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"{op}: target holds {int(wrong.flatten()[0])}, which is no class of 0..{C - 1} and not ignore_index={ignore_index}"
        )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with the backward above; same buffer and arguments."""

    backend = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )


def case(draw: Draw) -> Case:
    N, C = draw.size(), draw.size(least=1)
    D = draw.batch(most=1) if draw.flag() else ()
    shape = (C,) if draw.random.random() < 0.15 else (N, C, *D)
    x = draw.tensor(*shape)
    kwargs: dict[str, object] = {"reduction": draw.choice(REDUCTIONS)}
    weight = draw.tensor(C).detach().abs() + 0.1 if draw.flag() else None
    if draw.flag():
        kwargs["label_smoothing"] = draw.choice((0.1, 0.5))
    if draw.flag():
        q = draw.tensor(*shape).detach().softmax(0 if len(shape) == 1 else 1)
        return Case((x, q.requires_grad_(), weight if weight is None else weight.requires_grad_()), kwargs)
    k = draw.integers(0, C, *(() if len(shape) == 1 else (N, *D)))
    if draw.flag() and k.device.type != "meta" and bool((k != 0).any()):  # not all ignored: that mean has no derivative
        kwargs["ignore_index"] = 0
    return Case((x, k, weight), kwargs)  # by its weight, torch's cannot be differentiated with indices


def bench_vocabulary(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 8192), draw.integers(0, 8192, 2048)), {})


def bench_classes(draw: Draw) -> Case:
    return Case((draw.tensor(8192, 1000), draw.integers(0, 1000, 8192)), {"label_smoothing": 0.1})


def bench_pixels(draw: Draw) -> Case:
    return Case((draw.tensor(8, 21, 128, 128), draw.integers(0, 21, 8, 128, 128)), {})


def bench_probabilities(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1000), draw.tensor(2048, 1000, grad=False).softmax(1)), {})


OP = Op(
    name="cross_entropy",
    call=cross_entropy,
    reference=F.cross_entropy,
    rules=(RULE, PROBABILITIES),
    module=(CrossEntropyLoss,),
    replaces=(nn.CrossEntropyLoss,),
    shapes="input: N C, target: N -> N",
    source="Bridle 1990, eq. 12",
    autocast=FLOAT32,
    case=case,
    bench={
        "8192 classes": bench_vocabulary,
        "1000 classes, smoothed": bench_classes,
        "pixels": bench_pixels,
        "probabilities": bench_probabilities,
    },
)
OPS = (OP,)
