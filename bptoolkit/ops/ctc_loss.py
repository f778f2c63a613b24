"""Connectionist temporal classification: ctc_loss.

Maths     labels with a blank before, between and after them: k₀ … k_{L−1}, L = 2S + 1, k_s blank for even s
          from s − 1, s or, unless k_s = k_{s−2}, s − 2 a path comes to s; it starts in 0 or 1 and ends in 2S or 2S − 1
          y_t(s) = x_t(k_s)
          a_t(s) = y_t(s) + p_t(s)      p_t(s) = log Σ_{s' comes to s} exp a_{t−1}(s')      all paths to s, up to t
          b_t(s) = log Σ_{s comes to s'} exp (y_{t+1}(s') + b_{t+1}(s'))                    all paths from s, after t
          ℓ = − log Z      Z = exp a_T(2S) + exp a_T(2S − 1)
          g_t(s) = exp(a_t(s) + b_t(s) − log Z)                  the share of all paths that is in s at t
          ∂ℓ/∂y_t(s) = − g_t(s)      dx_t(c) = − dℓ Σ_{s: k_s = c} g_t(s)
Letters   x log_probs T N C; k targets with blanks N L; n, m the lengths of inputs and targets, N each; l the reduced loss
Numerics  in log space; half tensors are computed in float32. b is a of the sequence reversed: one loop runs both, side by side.
          The least finite number counts as −∞. A row whose target does not fit its input has ℓ = ∞ and, unless
          zero_infinity, a gradient of NaN, as torch has it
Source    Graves et al. 2006, sections 4.1 and 4.2 (eq. 15 is g, by probabilities); Hannun 2017 for the pictures

The gradient is the derivative by log_probs, whatever they are. torch's backward has that by the input of the log_softmax before
them instead, exp(x) more, which the backward of log_softmax takes away again: behind log_softmax the two are the same. If
log_probs are not normalized, torch's is not the derivative of what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.opaque import Opaque
from bptoolkit.ops.reduction import REDUCTIONS, check_reduction, values_readable
from bptoolkit.precision import wide

# --- the loop -----------------------------------------------------------------------------------------------------------------


def loop(y: Tensor, skip: Tensor, start: Tensor) -> Tensor:
    """p from y: *V T N L; skip is 0 where a state is reached from the last but one, start where a path begins, else −∞."""
    L, a, ps = y.shape[-1], start, []
    for yt in y.unbind(-3):
        one, two = (F.pad(a, (k, 0), value=-inf).narrow(-1, 0, L) for k in (1, 2))
        p = log_sum(torch.stack((two + skip, one, a)))  # *V N L
        a = p + yt
        ps.append(p)
    return torch.stack(ps, -3)


def log_sum(a: Tensor) -> Tensor:
    """Log Σ exp a over the first dimension; torch.logsumexp's derivatives are NaN where that is −∞, here they are 0."""
    most = a.detach().amax(0).clamp(min=torch.finfo(a.dtype).min)  # −∞ − −∞ would be NaN
    total = (a - most).exp().sum(0)
    none = total == 0
    return torch.where(none, -inf, torch.where(none, 1.0, total).log() + most)


def loop_fast(y, skip, start):
    """`loop` in place."""
    if y.dim() > 3:  # *V into N
        V, (T, N, L) = y.shape[:-3], y.shape[-3:]
        y = y.reshape(-1, T, N, L).movedim(0, 1).reshape(T, -1, L)
        p = loop_fast(y, skip.reshape(-1, L), start.reshape(-1, L))
        return p.view(T, -1, N, L).movedim(0, 1).reshape(*V, T, N, L)
    T, N, L = y.shape
    a = y.new_full((N, L + 2), -inf)
    a[:, 2:] = start
    three, into = a.as_strided((3, N, L), (1, L + 2, 1)), a[:, 2:]  # two states back, one, none
    mask = y.new_zeros(3, N, L)
    mask[0] = skip
    w, most, ps = torch.empty_like(mask), y.new_empty(N, L), y.new_empty(T, N, L)
    least, low = torch.finfo(y.dtype).min, lowest(y.dtype)
    for p, e in zip(ps.unbind(0), y.unbind(0)):
        torch.add(three, mask, out=w)
        torch.amax(w, 0, out=most).clamp_(min=least)
        torch.sum(w.sub_(most).clamp_(min=low).exp_(), 0, out=p).log_().add_(most)
        torch.add(p, e, out=into)
    return ps.masked_fill_(ps == least, -inf)


def lowest(dtype):
    """An x with an eˣ that is just a normal number: below, exp is ten times slower, and of −∞ too."""
    return int(log(torch.finfo(dtype).tiny))


def exp_in_place(t):
    """Exp t, which is used up, with 0 in place of what is smaller than the smallest normal number."""
    low = lowest(t.dtype)
    none = t <= low
    return t.clamp_(min=low).exp_().masked_fill_(none, 0)


def loop_fake(y, skip, start):
    return y.new_empty(y.shape)


PATHS = Opaque("ctc_paths", loop, loop_fake, vmap="leading", fast=loop_fast)

# --- the rule -----------------------------------------------------------------------------------------------------------------


def allowed(condition, like):
    """0 where the condition holds, else −∞."""
    return torch.where(condition, 0.0, -inf).to(like.dtype)


def skips(k, like):
    L = k.shape[1]
    return F.pad(allowed(k[:, 2:] != k[:, :-2], like), (2, 0), value=-inf)[:, :L]


def emissions(x, k):
    return x.gather(2, k.expand(x.shape[0], *k.shape))  # T N L


def total(p, y, start, n, m):
    """Log Z, per row."""
    L = y.shape[2]
    at = (n - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, L)
    end = torch.where((n == 0).unsqueeze(1), start, p.gather(0, at).squeeze(0) + y.gather(0, at).squeeze(0))  # N L
    blank = end.gather(1, 2 * m.unsqueeze(1)).squeeze(1)
    label = end.gather(1, (2 * m.unsqueeze(1) - 1).clamp(min=0)).squeeze(1)
    return log_sum(torch.stack((blank, torch.where(m == 0, -inf, label))))  # of no labels, the blank alone


def forward(x, k, n, m, reduction, zero_infinity):
    x_, states = wide(x), torch.arange(k.shape[1], device=k.device)
    y, start = emissions(x_, k), allowed(states == 0, x_).expand(k.shape)
    l = -total(PATHS(y, skips(k, y), start), y, start, n, m)  # N
    if zero_infinity:
        l = torch.where(l == inf, 0.0, l)
    if reduction == "mean":
        l = (l / m.clamp(min=1)).mean()
    return (l.sum() if reduction == "sum" else l).to(x.dtype)


def backward(dl, x, k, n, m, reduction, zero_infinity):
    x_ = wide(x)
    y, (T, N, C), L = emissions(x_, k), x.shape, k.shape[1]
    in_time = torch.arange(T, device=k.device).view(-1, 1, 1) < n.unsqueeze(1)  # T N 1
    states = torch.arange(L, device=k.device)
    starts = allowed(states == 0, y).expand(N, L), allowed(states == L - 1 - 2 * m.unsqueeze(1), y)
    reversed_y = torch.where(in_time.flip(0), y.flip(0, 2), starts[1])  # before a row begins, it stays at its start
    both = torch.cat((y, reversed_y), 1), skips(torch.cat((k, k.flip(1))), y), torch.cat(starts)
    p = PATHS(*both)  # T 2N L
    p, b = p.narrow(1, 0, N), p.narrow(1, N, N).flip(0, 2)
    log_z = total(p, y, starts[0], n, m)  # N
    d = wide(dl)
    d = d / (N * m.clamp(min=1)) if reduction == "mean" else d.expand(N)
    if zero_infinity:
        impossible = log_z == -inf
        d, log_z = torch.where(impossible, 0.0, d), torch.where(impossible, 0.0, log_z)
    g = torch.where(in_time, p + y + b - log_z.unsqueeze(1), -inf)
    g = exp_in_place(g) if unwatched(dl, x) else g.exp()  # T N L
    zeros = torch.where(in_time, 0 * log_z.detach().unsqueeze(1), 0.0)  # NaN where there is no path
    dx = zeros.expand(T, N, C).scatter_add(2, k.expand(T, N, L), -d.unsqueeze(1) * g)
    return dx.to(x.dtype), None, None, None


RULE = Rule("ctc_loss", forward, backward, inputs="x k n m", outputs="l")

# --- the public function and module -------------------------------------------------------------------------------------------


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """−log of the probability of all alignments of the targets with the input, as `torch.nn.functional.ctc_loss`.

    The gradient is the derivative by log_probs as they are given; torch's is the same behind log_softmax alone, where
    log_probs should come from.

    Args:
        log_probs: (T, N, C), or unbatched (T, C): logarithms of probabilities.
        targets: (N, S), padded, or (ΣS), one row after the other; integers. Unbatched (S,).
        input_lengths: (N,) or (): how much of each row of log_probs counts, at most T; a tensor or a sequence of ints.
        target_lengths: (N,) or (): likewise of targets.
        blank: the class that stands for no label.
        reduction: "none", "mean" (each loss by the length of its target, then their mean) or "sum".
        zero_infinity: where a target does not fit its input, a loss of 0 and no gradient; else ∞ and NaN.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N,) for "none" (() if unbatched), else a scalar.

    Raises:
        ValueError: shapes, lengths or labels that do not go together, an empty log_probs, a blank that is no class, or a
            reduction that does not exist. Values in tensors are checked on the CPU, outside transforms.
        TypeError: log_probs are not of floating point, or targets or lengths not integers.
    """
    check_reduction("ctc_loss", reduction)
    (x,) = OP.cast(log_probs)
    OP.check(x)
    if x.dim() not in (2, 3):
        raise ValueError(f"ctc_loss: log_probs has shape {tuple(x.shape)}; it needs (T N C), or (T C) unbatched")
    batched = x.dim() == 3
    x = x if batched else x.unsqueeze(1)
    T, N, C = x.shape
    if T == 0 or N == 0 or C == 0:
        raise ValueError(f"ctc_loss: log_probs has shape {tuple(log_probs.shape)}; it must not be empty")
    if not 0 <= blank < C:
        raise ValueError(f"ctc_loss: blank={blank} is none of the {C} classes of log_probs {tuple(log_probs.shape)}")
    n, _ = _lengths("input_lengths", input_lengths, x, T)
    m, sizes = _lengths("target_lengths", target_lengths, x, None)
    k = _with_blanks(_padded(targets, m, sizes, x), m, blank, C)
    args = (x, k, n, m, reduction, bool(zero_infinity))
    l = RULE(*args, backend=OP.pick(RULE, backend, *args))
    return l if batched or reduction != "none" else l.squeeze(0)


def _lengths(name: str, given: Any, x: Tensor, most: int | None) -> tuple[Tensor, list[int] | None]:
    """The lengths as a tensor (N,), and their values where they are to be had without waiting or tracing."""
    N, values = x.shape[1], None
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"ctc_loss: {name} is {given.dtype}; lengths must be integers")
        if given.dim() > 1:
            raise ValueError(f"ctc_loss: {name} has shape {tuple(given.shape)}; it needs ({N},)")
        lengths = given.to(x.device, torch.int64).reshape(-1)
        if values_readable(given):
            values = given.reshape(-1).tolist()
    elif isinstance(given, (tuple, list)) and all(isinstance(v, int) and not isinstance(v, bool) for v in given):
        lengths, values = torch.tensor(given, dtype=torch.int64, device=x.device), list(given)
    else:
        raise TypeError(f"ctc_loss: {name} must be a tensor or a sequence of ints, not {given!r}")
    if lengths.shape[0] != N:
        raise ValueError(f"ctc_loss: {name} has {lengths.shape[0]} lengths for the {N} rows of log_probs {tuple(x.shape)}")
    for v in values or ():
        if v < 0 or (most is not None and v > most):
            limit = "" if most is None else f" and at most T = {most}, by log_probs {tuple(x.shape)}"
            raise ValueError(f"ctc_loss: {name} has {v}; it must be at least 0{limit}")
    return lengths, values


def _padded(targets: Any, m: Tensor, sizes: list[int] | None, x: Tensor) -> Tensor:
    """The targets as N S; what lies past a row's length means nothing."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        what = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"ctc_loss: targets must be a tensor of integers, not {what}")
    N, most, whole = m.shape[0], None if sizes is None else max(sizes), None if sizes is None else sum(sizes)
    shape, targets = tuple(targets.shape), targets.to(x.device)
    if targets.dim() == 2:
        if shape[0] != N:
            raise ValueError(f"ctc_loss: targets {shape} have {shape[0]} rows for the {N} of log_probs {tuple(x.shape)}")
        if most is not None and most > shape[1]:
            raise ValueError(f"ctc_loss: target_lengths has {most} but targets {shape} only {shape[1]} labels in a row")
        return targets if most is None else targets[:, :most]
    if targets.dim() != 1:
        raise ValueError(f"ctc_loss: targets have shape {shape}; they need (N S), or (ΣS) one after the other")
    if whole is not None and whole != shape[0]:
        raise ValueError(f"ctc_loss: target_lengths add up to {whole} but targets {shape} have {shape[0]} labels")
    S = shape[0] if most is None else most
    if S == 0:
        return targets.new_zeros(N, 0)
    first = (m.cumsum(0) - m).unsqueeze(1)
    return targets[(first + torch.arange(S, device=x.device)).clamp(max=shape[0] - 1)]


def _with_blanks(labels: Tensor, m: Tensor, blank: int, C: int) -> Tensor:
    """k: N L. Past the labels of a row, blanks."""
    N, S = labels.shape
    inside = torch.arange(S, device=m.device) < m.unsqueeze(1)
    labels = torch.where(inside, labels.long(), blank)
    if values_readable(labels) and bool(((labels < 0) | (labels >= C)).any()):
        wrong = labels[(labels < 0) | (labels >= C)][0].item()
        raise ValueError(f"ctc_loss: targets have the label {wrong}; there are the classes 0 to {C - 1}")
    pairs = torch.stack((torch.full_like(labels, blank), labels), 2).reshape(N, 2 * S)
    return F.pad(pairs, (0, 1), value=blank)


class CTCLoss(nn.CTCLoss):
    """`torch.nn.CTCLoss` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any) -> Tensor:
        options = (self.blank, self.reduction, self.zero_infinity)
        return ctc_loss(log_probs, targets, input_lengths, target_lengths, *options, backend=self.backend)


# --- the op -------------------------------------------------------------------------------------------------------------------


def reference(log_probs, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False):
    """A row at a time, by a matrix of the moves between its states: of second derivatives, torch has none."""
    x = wide(log_probs) if log_probs.dim() == 3 else wide(log_probs).unsqueeze(1)
    ns, ms = (t.reshape(-1).tolist() if isinstance(t, Tensor) else list(t) for t in (input_lengths, target_lengths))
    rows = targets.unbind(0) if targets.dim() == 2 else targets.split(ms)
    losses = []
    for row, (n, m) in enumerate(zip(ns, ms)):
        states = [blank]
        for label in rows[row][:m].tolist():
            states += [label, blank]
        moves = torch.full((2 * m + 1, 2 * m + 1), -1e30, dtype=x.dtype, device=x.device)  # −∞ has no derivatives
        for s, label in enumerate(states):
            for came in range(max(s - 2, 0), s + 1):
                if s - came < 2 or states[came] != label:
                    moves[came, s] = 0
        a = torch.tensor([0.0, *[-1e30] * (2 * m)], dtype=x.dtype, device=x.device)
        for t in range(n):
            a = torch.logsumexp(a.unsqueeze(1) + moves, 0) + x[t, row][states]
        l = -torch.logsumexp(a[-2:], 0)
        l = torch.where(l > 1e29, inf, l)
        losses.append(torch.where(l == inf, 0.0, l) if zero_infinity else l)
    l = torch.stack(losses)
    if reduction == "mean":
        l = (l / torch.tensor(ms, dtype=l.dtype, device=l.device).clamp(min=1)).mean()
    l = l.sum() if reduction == "sum" else l
    return (l if log_probs.dim() == 3 or reduction != "none" else l[0]).to(log_probs.dtype)


def case(draw: Draw) -> Case:
    N, C, S = draw.size(least=1, most=5), draw.size(least=2), draw.size(most=3)
    rows, N = ((), 1) if draw.random.random() < 0.15 else ((N,), N)
    T, blank = max(draw.size(least=1, most=8), 2 * S), draw.choice((0, C - 1))
    ms = [draw.random.randint(0, S) for _ in range(N)]
    ns = [draw.random.randint(max(2 * m, 1), T) for m in ms]  # a repeated label needs a blank between
    shape = draw.choice(((N, S), (sum(ms),)))
    targets = draw.integers(0, C - 1, *shape) + (blank == 0)
    x = draw.tensor(T, *rows, C)
    lengths: Any = [torch.tensor(t, device=draw.device) for t in (ns, ms)] if draw.flag() else [ns, ms]
    return Case((x, targets, *lengths, blank), {"reduction": draw.choice(REDUCTIONS), "zero_infinity": draw.flag()})


def bench_of(T: int, N: int, C: int, S: int) -> Any:
    def bench(draw: Draw) -> Case:
        x = draw.tensor(T, N, C, grad=False).log_softmax(2).requires_grad_()
        return Case((x, draw.integers(1, C, N, S), [T] * N, [S] * N), {})

    return bench


OP = Op(
    name="ctc_loss",
    call=ctc_loss,
    reference=reference,
    peer=F.ctc_loss,
    rules=(RULE,),
    module=(CTCLoss,),
    replaces=(nn.CTCLoss,),
    shapes="log_probs: *T C -> *N",
    source="Graves et al. 2006, §4",
    autocast={"cpu": "float32"},
    case=case,
    bench={"letters": bench_of(200, 32, 32, 40), "1000 classes": bench_of(100, 32, 1000, 20)},
)
OPS = (OP,)
