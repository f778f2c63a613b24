"""Cross entropy of logits, against class indices or class probabilities.

Maths     lse = log Σ_c exp x_c,   p = exp(x − lse)
          indices        ℓ = a lse − (1 − ε) w_k x_k − (ε/C) Σ_c w_c x_c,       a = (1 − ε) w_k + (ε/C) Σ_c w_c
                         dx_c = dℓ (a p_c − (1 − ε) w_c [c = k] − (ε/C) w_c)
          probabilities  ℓ = Σ_c w_c r_c (lse − x_c),   r = (1 − ε) q + ε/C,    a = Σ_c w_c r_c
                         dx_c = dℓ (a p_c − w_c r_c),   dq_c = dℓ (1 − ε) w_c (lse − x_c)
          lse is an output of the rule too, with a cotangent of its own: dx_c += dlse p_c
          sum: dℓ_n = dl.   mean: dℓ_n = dl / W,  W = Σ_n w_{k_n} over what is not ignored (indices), or N (probabilities)
Letters   l the reduced loss
          N rows, C classes; x logits N C; k class indices N, or q probabilities N C; w class weights C (constants); ε smoothing
          a row whose index is the ignored one has ℓ = 0 and dx = 0
Numerics  half logits are computed in float32, and lse is float32;
          kept for backward: x and lse, not the N C log-probabilities; the mean over nothing is NaN, as in torch
Source    Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990, eq. 12;
          label smoothing: Szegedy et al., "Rethinking the Inception architecture", 2016, section 7
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import _reduction as _Reduction
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32, Op
from bptoolkit.ops.mse_loss import REDUCTIONS, check_reduction
from bptoolkit.precision import wide
from bptoolkit.shapes import check_alike, check_floating

CHUNK = 1 << 18  # elements worked on at a time on the CPU, so that a chunk stays in cache between passes


def chunks(x: Tensor) -> list[slice]:
    """Slices of the rows of x, of about CHUNK elements each."""
    step = max(CHUNK // max(x.shape[1], 1), 1)
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def log_sum_exp(x):
    if not unwatched(x) or x.device.type != "cpu" or x.numel() <= CHUNK:
        return wide(x).logsumexp(-1)  # N
    dtype = wide(x[:0]).dtype
    lse = x.new_empty(x.shape[0], dtype=dtype)  # N
    work = x.new_empty(max(CHUNK // x.shape[1], 1), x.shape[1], dtype=dtype)  # a chunk
    for rows in chunks(x):
        y = wide(x[rows])
        m = y.amax(-1)  # rows
        m.masked_fill_(m.isinf(), 0)
        lse[rows] = torch.sub(y, m[:, None], out=work[: len(y)]).exp_().sum(-1).log_().add_(m)
    return lse


def reduce(l, W, reduction):
    return l if reduction == "none" else l.sum() if reduction == "sum" else l.sum() / W


def parts(x, k, w, ignore, smoothing):
    """Per row: the index with 0 for an ignored one, whether it counts, its weight, and the factor a of lse."""
    counts = k != ignore  # N
    k = torch.where(counts, k, 0)  # N
    one = wide(counts.to(x.dtype))  # N; a float times a bool would be float32
    wk = one if w is None else torch.where(counts, wide(w)[k], 0)  # N
    if smoothing == 0:
        return k, counts, wk, wk
    total = x.shape[-1] if w is None else wide(w).sum()
    return k, counts, wk, (1 - smoothing) * wk + (smoothing / x.shape[-1]) * total * one


def forward(x, w, k, ignore, reduction, smoothing):
    k, counts, wk, _ = parts(x, k, w, ignore, smoothing)
    lse = log_sum_exp(x)  # N
    xk = wide(x.gather(-1, k[:, None])[:, 0])  # N
    # the difference lse − x_k first: the product of a weight of 0 with an infinite x_k would be NaN
    l = torch.where(counts, (1 - smoothing) * wk * (lse - xk), 0)  # N
    if smoothing:
        wx = x.sum(-1, dtype=lse.dtype) if w is None else wide(x) @ wide(w)  # N
        total = x.shape[-1] if w is None else wide(w).sum()
        l = l + torch.where(counts, (smoothing / x.shape[-1]) * (total * lse - wx), 0)
    return reduce(l, wk.sum(), reduction).to(x.dtype), lse


def backward(dl, dlse, x, w, k, lse, ignore, reduction, smoothing, need):
    if not need.x:
        return None, None, None
    k, counts, wk, a = parts(x, k, w, ignore, smoothing)
    N, C = x.shape
    d = row_cotangents(dl, N, wk.sum() if reduction == "mean" else None, lse)  # N
    d = torch.where(counts, d, 0)
    row = d * a if dlse is None else d * a + dlse  # N: what multiplies p
    hit = -(1 - smoothing) * d * wk  # N: added at the target
    flat = -(smoothing / C) * d  # N: times w, added everywhere
    if unwatched(dl, dlse, x, w, lse) and x.device.type == "cpu":
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)  # N C
        for rows in chunks(x):
            g = torch.sub(wide(x[rows]), lse[rows, None], out=dx[rows] if x.dtype == lse.dtype else None)
            g.exp_().mul_(row[rows, None])
            if smoothing:
                g.add_(flat[rows, None] if w is None else flat[rows, None] * w)
            g.scatter_add_(1, k[rows, None], hit[rows, None])
            if x.dtype != lse.dtype:
                dx[rows] = g
        return dx, None, None
    p = (wide(x) - lse[:, None]).exp()  # N C
    dx = (row[:, None] * p).scatter_add(1, k[:, None], hit[:, None])  # N C
    if smoothing:
        dx = dx + (flat[:, None] if w is None else flat[:, None] * w)
    return dx.to(x.dtype), None, None


def row_cotangents(dl, N, W, lse):
    """The cotangent of each row's ℓ, N: dl itself, or its share."""
    if dl is None:
        return torch.zeros_like(lse)
    dl = dl.to(lse.dtype)
    return (dl if W is None else dl / W).expand(N)


def forward_probabilities(x, q, w, reduction, smoothing):
    lse = log_sum_exp(x)  # N
    wr = weighted(q, w, smoothing)  # N C
    l = (wr * (lse[:, None] - wide(x))).sum(-1)  # N
    return reduce(l, x.shape[0], reduction).to(x.dtype), lse


def weighted(q, w, smoothing):
    """The targets, smoothed and weighted: w ∘ r."""
    q = wide(q)
    r = (1 - smoothing) * q + smoothing / q.shape[-1] if smoothing else q
    return r if w is None else wide(w) * r  # N C


def backward_probabilities(dl, dlse, x, q, w, lse, reduction, smoothing, need):
    N = x.shape[0]
    d = row_cotangents(dl, N, N if reduction == "mean" else None, lse)  # N
    dx = dq = None
    if need.x:
        wr = weighted(q, w, smoothing)  # N C
        row = d * wr.sum(-1) if dlse is None else d * wr.sum(-1) + dlse  # N
        dx = (row[:, None] * (wide(x) - lse[:, None]).exp() - d[:, None] * wr).to(x.dtype)  # N C
    if need.q:
        dq = (1 - smoothing) * d[:, None] * (lse[:, None] - wide(x))  # N C
        dq = (dq if w is None else w * dq).to(q.dtype)
    return dx, dq, None


RULE = Rule("cross_entropy", forward, backward, inputs="x w k", outputs="l lse")
PROBABILITIES = Rule(
    "cross_entropy_probabilities", forward_probabilities, backward_probabilities, inputs="x q w", outputs="l lse"
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
        target: class indices (), (N,) or (N, *D), int64; or class probabilities of input's shape and dtype, differentiable.
        weight: (C,), per class; a constant.
        size_average: deprecated, see reduction.
        ignore_index: the index that contributes nothing; with indices only.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        label_smoothing: the share of the target spread over all classes, in [0, 1].
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        A scalar, or target's shape (without the classes) for "none".

    Raises:
        ValueError: shapes that disagree, an index out of range (checked on the CPU, outside transforms), a label_smoothing
            outside [0, 1], or a reduction that does not exist.
        TypeError: a target that is neither int64 nor of input's dtype, or tensors of several dtypes.
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    check_reduction("cross_entropy", reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing={label_smoothing} is outside [0, 1]")
    input, target, weight = OP.cast(input, target, weight)
    indices = _check(input, target, weight, ignore_index)
    kept: tuple[int, ...]
    if input.dim() == 1:
        x, k, kept = input[None], target[None], ()
    elif input.dim() == 2:
        x, k, kept = input, target, tuple(input.shape[:1])
    else:  # the classes last, all else as rows
        N, C, D = input.shape[0], input.shape[1], input.shape[2:]
        x, kept = input.movedim(1, -1).reshape(N * prod(D), C), (N, *D)
        k = target.reshape(-1) if indices else target.movedim(1, -1).reshape(N * prod(D), C)
    w = None if weight is None else weight.detach()
    if indices:
        l = RULE(x, w, k, ignore_index, reduction, float(label_smoothing), backend=OP.pick(RULE, backend, x, w))[0]
    else:
        l = PROBABILITIES(x, k, w, reduction, float(label_smoothing), backend=OP.pick(PROBABILITIES, backend, x, k, w))[0]
    return l.reshape(kept) if reduction == "none" else l


def _check(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """Raise for arguments that disagree; whether the target is of class indices."""
    check_floating("cross_entropy", "input", input)
    if input.dim() == 0:
        raise ValueError("cross_entropy: input has no dimensions; it needs (C), (N C) or (N C *D)")
    C = input.shape[0 if input.dim() == 1 else 1]
    if not isinstance(target, Tensor):
        raise TypeError(f"cross_entropy: target must be a tensor, not {type(target).__name__}")
    if target.device != input.device:
        raise ValueError(f"cross_entropy: target is on {target.device} but input is on {input.device}")
    if weight is not None:
        check_floating("cross_entropy", "weight", weight)
        check_alike("cross_entropy", "input", input, "weight", weight)
        if weight.shape != (C,):
            raise ValueError(
                f"cross_entropy: weight has shape {tuple(weight.shape)}; input {tuple(input.shape)} has C={C} classes"
            )
    if target.dtype.is_floating_point:
        check_alike("cross_entropy", "input", input, "target", target)
        if target.shape != input.shape:
            raise ValueError(
                f"cross_entropy: target of class probabilities has shape {tuple(target.shape)} but input {tuple(input.shape)}"
            )
        return False
    if target.dtype != torch.int64:
        raise TypeError(f"cross_entropy: target is {target.dtype}; class indices must be int64, probabilities {input.dtype}")
    wanted = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    if target.shape != wanted:
        raise ValueError(
            f"cross_entropy: target of class indices has shape {tuple(target.shape)}; "
            f"input {tuple(input.shape)} needs {tuple(wanted)}"
        )
    if type(target) is Tensor and target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        _check_range(target, C, ignore_index)
    return True


def _check_range(target: Tensor, C: int, ignore_index: int) -> None:
    """Raise for an index that is no class; looks at values, so only where nothing transforms or traces."""
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return
    low, high = (int(v) for v in torch.aminmax(target))
    if low >= 0 and high < C:
        return
    wrong = target[((target < 0) | (target >= C)) & (target != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"cross_entropy: target holds {int(wrong.flatten()[0])}, which is no class of 0..{C - 1} "
            f"and not ignore_index={ignore_index}"
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
    if draw.flag():
        kwargs["weight"] = draw.tensor(C, grad=False).abs() + 0.1
    if draw.flag():
        kwargs["label_smoothing"] = draw.choice((0.1, 0.5))
    if draw.flag():
        q = draw.tensor(*shape).detach().softmax(0 if len(shape) == 1 else 1)
        return Case((x, q.requires_grad_()), kwargs)
    k = draw.integers(0, C, *(() if len(shape) == 1 else (N, *D)))
    if draw.flag() and k.device.type != "meta" and bool((k != 0).any()):  # not all ignored: that mean has no derivative
        kwargs["ignore_index"] = 0
    return Case((x, k), kwargs)


def bench_vocabulary(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 8192), draw.integers(0, 8192, 2048)), {})


def bench_classes(draw: Draw) -> Case:
    return Case((draw.tensor(8192, 1000), draw.integers(0, 1000, 8192)), {"label_smoothing": 0.1})


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
    bench={"8192 classes": bench_vocabulary, "1000 classes, smoothed": bench_classes},
)
OPS = (OP,)
