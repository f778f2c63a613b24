"""Cross entropy of logits, against class indices or class probabilities.

Maths     ℓ = − Σ_c r_c log p_c,  p = softmax(x),  r the target in shares of weighted classes:
          probabilities  r_c = w_c ((1 − ε) q_c + ε/C)
          indices        r_c = w_c ((1 − ε) [c = k] + ε/C); where the index is the ignored one, r = 0

          dx_c = dℓ (p_c Σ_c r_c − r_c),  dq_c = − dℓ w_c (1 − ε) log p_c,  dw_c = − Σ_n dℓ_n (r_nc / w_c) log p_nc
          The sum has dℓ_n = dl. The mean l = Σ_n ℓ_n / W has dℓ_n = dl / W, W = N for probabilities; for indices it is
          W = Σ_n w_{k_n} over what is not ignored, whence dw_c also has − dl (l / W) Σ_n [c = k_n].

          With indices there may be, before the reduction, ζ w_k z² in each ℓ, nothing where the index is ignored, with
          z = log Σ_c e^x_c: dx_c has dℓ 2 ζ w_k z p_c besides, dw_c has Σ_n [c = k_n] dℓ_n ζ z_n²; and before all of it
          x = κ tanh(y / κ), of the logits y: dy = dx (1 − tanh²(y / κ)).
Letters   l the reduced loss; n runs over N samples and the positions *D of each, c over C classes
          x logits N C *D; k class indices N *D, or q probabilities N C *D; w class weights C; ε smoothing
          ζ z_loss; κ softcap; m the largest x of a sample and s = log Σ_c e^(x_c − m), so that z = m + s: residual outputs
          N *D, hidden by the public function. They spare a first-order backward the sums over C; what is differentiated
          again takes all of it from x, so that nothing flows into them
Numerics  half tensors are computed in float32; the N C log-probabilities are not kept, x is; log p = (x − m) − s, and not
          x − z, which is rounded to the size of the logits; p_k − 1 is expm1(log p_k); the mean over nothing is NaN, as in
          torch
Source    Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990, eq. 12;
          label smoothing: Szegedy et al., "Rethinking the Inception architecture", 2016, section 7; z_loss: Chowdhery et al.,
          "PaLM", 2022, section 5; softcap: Gemma Team, "Gemma 2", 2024, section 2
"""

from __future__ import annotations

from math import inf, prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32, Op
from bptoolkit.ops.class_indices import at_index as at_index
from bptoolkit.ops.class_indices import check_classes as check_classes
from bptoolkit.ops.reduction import REDUCTIONS, reduce, resolve
from bptoolkit.precision import wide


def cotangent(dl, shape, W, reduction):
    """The cotangent of each ℓ, N *D: dl itself, or its share."""
    dl = wide(dl)
    return (dl / W if reduction == "mean" else dl).expand(shape)


def along_classes(w, x):
    """The class weights, to go with N C *D."""
    return wide(w).reshape(-1, *(1,) * (x.dim() - 2))


def sum_to_classes(t):
    return t.sum((0, *range(2, t.dim())))  # N C *D -> C


def capped(x, softcap):
    """The logits that the classes compete with, in what is computed in; dense, as torch's softmax is."""
    x = wide(x).contiguous()
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def forward(x, w, k, ignore, reduction, smoothing, z_loss, softcap):
    k, counts, wk = at_index(x, w, k, ignore)

    def rule(x, k, wk):
        a = capped(x, softcap)  # N C *D
        m = a.amax(1)  # N *D
        a = a - m.unsqueeze(1)
        s = a.exp().sum(1).log()  # N *D
        l = (smoothing - 1) * wk * (a.gather(1, k.unsqueeze(1)).squeeze(1) - s)  # N *D
        if smoothing and w is None:
            l = l - (smoothing / x.shape[1]) * (a.sum(1) - x.shape[1] * s)
        elif smoothing:
            l = l - (smoothing / x.shape[1]) * ((along_classes(w, x) * a).sum(1) - wide(w).sum() * s)
        if z_loss:
            l = l + z_loss * wk * (m + s).square()
        return torch.stack((l, m, s), 1)  # N 3 *D

    l, m, s = by_rows(rule, x, k, wk).unbind(1)  # N *D
    l = reduce(torch.where(counts, l, 0), wk.sum(), reduction)
    return l.to(x.dtype), m.clone(), s.clone()


def backward(dl, x, w, k, l, m, s, ignore, reduction, smoothing, z_loss, softcap, need):
    dw = by_weight(dl, x, w, k, l, ignore, reduction, smoothing, z_loss, softcap) if need.w else None
    if not need.x:
        return None, dw, None
    k, counts, wk = at_index(x, w, k, ignore)
    d = torch.where(counts, cotangent(dl, k.shape, wk.sum(), reduction), 0)  # N *D: dℓ
    hit = (1 - smoothing) * d * wk  # N *D: dℓ r's part at the index
    flat = (smoothing / x.shape[1]) * d if smoothing else None  # N *D: and its part in every class, without w
    all_ = x.shape[1] if w is None else wide(w).sum()
    rest = torch.zeros_like(hit) if flat is None else flat * all_  # N *D: p's factor but for hit
    alone = unwatched(dl, x, w)
    if z_loss:
        z = m + s if alone else torch.logsumexp(capped(x, softcap), 1)  # N *D
        rest = rest + 2 * z_loss * d * wk * z

    def rule(x, k, m, s, rest, hit, flat):
        a = capped(x, softcap)
        if alone:
            at = a.gather(1, k.unsqueeze(1)) - m.unsqueeze(1) - s.unsqueeze(1)  # N 1 *D: log p there
        else:
            at = torch.log_softmax(a, 1).gather(1, k.unsqueeze(1))
        at = hit.unsqueeze(1) * torch.expm1(at) + rest.unsqueeze(1) * at.exp()
        dx = (hit + rest).unsqueeze(1) * torch.softmax(a, 1)  # N C *D
        dx = (dx.scatter_ if alone else dx.scatter)(1, k.unsqueeze(1), at)  # dx is new: nothing else has seen it
        if flat is not None:
            dx = dx - (flat.unsqueeze(1) if w is None else flat.unsqueeze(1) * along_classes(w, x))
        return (dx if softcap is None else dx * (1 - (a / softcap).square())).to(x.dtype)

    return by_rows(rule, x, k, m, s, rest, hit, flat), dw, None


def by_weight(dl, x, w, k, l, ignore, reduction, smoothing, z_loss, softcap):
    """dw."""
    k, counts, wk = at_index(x, w, k, ignore)
    W, a = wk.sum(), capped(x, softcap)
    d = torch.where(counts, cotangent(dl, k.shape, W, reduction), 0)  # N *D
    logp = torch.log_softmax(a, 1)  # N C *D
    at = (smoothing - 1) * d * logp.gather(1, k.unsqueeze(1)).squeeze(1)  # N *D
    if z_loss:
        at = at + z_loss * d * torch.logsumexp(a, 1).square()
    if reduction == "mean":
        at = at - torch.where(counts, wide(dl) * l / W, 0)
    dw = torch.zeros_like(wide(w)).index_add(0, k.reshape(-1), at.reshape(-1))  # C
    return (dw - (smoothing / x.shape[1]) * sum_to_classes(d.unsqueeze(1) * logp) if smoothing else dw).to(w.dtype)


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


def kernel():
    from bptoolkit.triton_kernels.cross_entropy import KERNEL

    return KERNEL


RULE = Rule(
    "cross_entropy",
    forward,
    backward,
    inputs="x w k",
    outputs="l m s",
    constants="m s",
    uses={"x": "x w k m s", "w": "x w k l"},
    kernel=kernel,
)
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
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy between logits and classes, as `torch.nn.functional.cross_entropy`.

    With `z_loss` every sample's loss has z_loss · z² besides, z = log Σ e^x, which keeps the logits from drifting: times the
    weight of its class, as the loss itself is, so that the mean divides it by the same sum; nothing for an ignored sample.

    Args:
        input: logits (C,), (N, C) or (N, C, *D), floating point.
        target: class indices (), (N,) or (N, *D), int64 or uint8; or class probabilities of input's shape and dtype.
        weight: (C,), per class.
        size_average: deprecated, see reduction.
        ignore_index: the index that contributes nothing; with indices only.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        label_smoothing: the share of the target spread over all classes, in [0, 1].
        z_loss: the factor of z², not negative; with indices only.
        softcap: c, positive: the logits are c · tanh(input / c), z's too; with indices only.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        A scalar, or target's shape (without the classes) for "none". Differentiable by input, by probabilities, by weight.

    Raises:
        ValueError: shapes that disagree, an index out of range (checked on the CPU, outside transforms), a label_smoothing
            outside [0, 1], a negative z_loss, a softcap that is not positive, one of these two or an ignore_index with
            probabilities, no classes, or a reduction that does not exist.
        TypeError: a target that is neither int64, uint8 nor of input's dtype, or tensors of several dtypes.
    """
    reduction = resolve("cross_entropy", reduction, size_average, reduce)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing={label_smoothing} is outside [0, 1]")
    if not 0 <= z_loss < inf:
        raise ValueError(f"cross_entropy: z_loss={z_loss} is not a finite number >= 0")
    if softcap is not None and not 0 < softcap < inf:
        raise ValueError(f"cross_entropy: softcap={softcap} is not a finite number > 0")
    input, target, weight = OP.cast(input, target, weight)
    indices = check_classes("cross_entropy", input, target, weight, ignore_index)
    if indices and target.dtype == torch.uint8:
        target = target.long()
    x, t = (input.unsqueeze(0), target.unsqueeze(0)) if input.dim() == 1 else (input, target)
    if indices:
        args = (x, weight, t, ignore_index, reduction, label_smoothing, z_loss, softcap)
        l = RULE(*args, backend=OP.pick(RULE, backend, *args))[0]
    elif z_loss or softcap is not None:
        raise ValueError(f"cross_entropy: z_loss={z_loss} and softcap={softcap} go with class indices, not with probabilities")
    else:
        l = PROBABILITIES(x, t, weight, reduction, label_smoothing, backend=OP.pick(PROBABILITIES, backend, x, t, weight))
    return l.squeeze(0) if reduction == "none" and input.dim() == 1 else l


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` with the backward above; same buffer and arguments.

    What torch's lacks is an attribute, as `backend` is: an instance may set its own `z_loss` and `softcap`.
    """

    backend = "auto"
    z_loss: float = 0.0
    softcap: float | None = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            backend=self.backend,
        )


def reference(input, target, weight=None, *args, z_loss=0.0, softcap=None, ignore_index=-100, reduction="mean", **kwargs):
    x = input if softcap is None else softcap * torch.tanh(input / softcap)
    l = F.cross_entropy(x, target, weight, *args, ignore_index=ignore_index, reduction=reduction, **kwargs)
    if not z_loss:
        return l
    counts = target != ignore_index
    v = x.new_ones(target.shape) if weight is None else weight[torch.where(counts, target, 0)]
    v = torch.where(counts, v, 0)
    return l + reduce(z_loss * v * torch.logsumexp(x, 0 if x.dim() == 1 else 1).square(), v.sum(), reduction)


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
    if draw.flag():
        kwargs["z_loss"] = draw.choice((0.01, 0.3))
    if draw.flag():
        kwargs["softcap"] = draw.choice((2.0, 30.0))
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
    reference=reference,
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
