"""Embedding bags: sums, means or maxima of rows of a table, over bags of indices.

Maths     sum   y_b = Σ_{n in b} s_n w[i_n]            dw_v = Σ_n [i_n = v] s_n dy_b(n)      ds_n = ⟨dy_b(n), w[i_n]⟩
          mean  y_b = Σ_{n in b} w[i_n] / N_b          dw_v = Σ_n [i_n = v] dy_b(n) / N_b
          max   y_be = max_{n in b} w[i_n]_e           dw_ve = Σ_b [m_be = v] dy_be,   m_be the index of the first maximum
          an index that is padding_idx is in no bag; an empty bag has y_b = 0; scale_grad_by_freq divides row v by how often
          v occurs among all indices
Letters   i indices N; b(n) the bag of n, found in the offsets o; B bags; s weights N, 1 where not given; w the table V E;
          y, dy B E; N_b indices in bag b that count; m is a residual output without a derivative
Numerics  rows are never gathered in forward; half cotangents are summed in float32
Source    Joulin et al., "Bag of tricks for efficient text classification", 2017, section 2
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops.embedding import check_sparse, check_table, readable, renorm, row_of, scatter, scatter_sparse, sum_by
from bptoolkit.precision import wide
from bptoolkit.shapes import check_alike, check_floating
from bptoolkit.transforms import _transforms_active

MODES = ("sum", "mean", "max")


def bag_of(i, o):
    """The bag of each index: N. An offset that is repeated is an empty bag, which the last one of them follows."""
    n = torch.arange(i.shape[0], dtype=o.dtype, device=o.device)
    return torch.searchsorted(o.contiguous(), n, right=True) - 1


def counting(i, padding, like):
    """1 where an index counts, 0 where it is padding: N."""
    return torch.ones_like(i, dtype=like.dtype) if padding is None else (i != padding).to(like.dtype)


def forward(w, s, i, o, mode, padding, by_freq, sparse, V):
    args = (w, i, o, False, MODES.index(mode), False, s, False, padding)
    y, _, _, m = torch._VF.embedding_bag(*args)
    if mode != "max":
        m = i.new_empty(0)
    return y, m


def backward(dy, dm, w, s, i, o, m, mode, padding, by_freq, sparse, V, need):
    i, E = i.long(), dy.shape[1]
    dw = ds = None
    b, d = bag_of(i, o), wide(dy)
    if mode != "sum":
        counts = sum_by(b, counting(i, padding, d), o.shape[0]).unsqueeze(1)  # B 1
    if mode == "max":
        d, m = torch.where(counts > 0, d, 0), torch.where(counts > 0, m.long(), 0)  # an empty bag has no maximum
        return torch.zeros(V, E, dtype=d.dtype, device=d.device).scatter_add(0, m, d).to(dy.dtype), None, None, None
    if need.s:
        ds = ((d[b] * wide(w)[i]).sum(1) * counting(i, padding, d)).to(s.dtype)
    if need.w:
        if mode == "mean":
            d = d / counts.clamp_min(1)
        if sparse and not _transforms_active():
            rows = d[b] if s is None else d[b] * wide(s).unsqueeze(1)  # N E
            dw = scatter_sparse("embedding_bag", i, rows.to(dy.dtype), V, padding)
        else:
            dw = scatter(i, d, b, s if s is None else wide(s), V, padding, by_freq, dy.dtype)
    return dw, ds, None, None


RULE = Rule(
    "embedding_bag",
    forward,
    backward,
    inputs="w s i o",
    outputs="y m",
    constants="m",
    uses={"w": "s i o m", "s": "w s i o"},
)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sums, means or maxima of rows of a table, as `torch.nn.functional.embedding_bag`.

    Args:
        input: indices, int64 or int32: (B, N), a bag a row, or (N,) with offsets.
        weight: the table (V, E), floating point.
        offsets: where each bag begins in input, (B,), ascending from 0.
        max_norm: rows that are looked up and have a larger norm are rescaled to it first, in weight itself.
        norm_type: the p of that norm.
        scale_grad_by_freq: divide gradients by how often the index occurs in input; not with "max".
        mode: "sum", "mean" or "max".
        sparse: weight's gradient is a sparse tensor (of first order, outside torch.func's transforms); not with "max".
        per_sample_weights: of input's shape and weight's dtype, with "sum"; differentiable.
        include_last_offset: offsets has one more element, the end of the last bag.
        padding_idx: the index that is in no bag; a negative one counts from the end.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (B, E), of weight's dtype; 0 for empty bags.

    Raises:
        TypeError: input or offsets are not of int64 or int32, or weight or per_sample_weights not of one floating-point dtype.
        ValueError: shapes or devices disagree, a mode that does not exist, options that do not go together, or the named
            backend cannot run the call.
        IndexError: an index is no row of weight (checked on the CPU, outside transforms).
        NotImplementedError: a second derivative by way of a sparse gradient.
    """
    name = "embedding_bag"
    check_table(name, input, weight)
    padding = row_of(name, padding_idx, weight)
    check_sparse(name, sparse, scale_grad_by_freq)
    if mode not in MODES:
        raise ValueError(f"{name}: mode={mode!r} is not known; choose from {', '.join(map(repr, MODES))}")
    if mode == "max" and (sparse or scale_grad_by_freq):
        raise ValueError(f"{name}: mode='max' goes neither with sparse=True nor with scale_grad_by_freq=True")
    s = per_sample_weights
    if s is not None:
        check_floating(name, "per_sample_weights", s)
        check_alike(name, "weight", weight, "per_sample_weights", s)
        if s.shape != input.shape:
            raise ValueError(f"{name}: per_sample_weights has shape {tuple(s.shape)} but input {tuple(input.shape)}")
        if mode != "sum":
            raise ValueError(f"{name}: per_sample_weights goes with mode='sum', not {mode!r}")
    i, o = _bags(input, offsets, include_last_offset)
    if max_norm is not None:
        renorm(weight, i, max_norm, norm_type)
    args = (weight, s if s is None else s.reshape(-1), i, o, mode, padding, scale_grad_by_freq, sparse, weight.shape[0])
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


def _bags(i: Tensor, offsets: Any, include_last: bool) -> tuple[Tensor, Tensor]:
    """All indices in one row, and where each bag begins."""
    name = "embedding_bag"
    if i.dim() == 2:
        if offsets is not None:
            raise ValueError(f"{name}: input has shape {tuple(i.shape)}, a bag a row; offsets must be None then")
        return i.reshape(-1), torch.arange(i.shape[0], dtype=i.dtype, device=i.device) * i.shape[1]
    if i.dim() != 1:
        raise ValueError(f"{name}: input has shape {tuple(i.shape)}; it needs (B N), or (N) with offsets")
    if not isinstance(offsets, Tensor):
        raise ValueError(f"{name}: input has shape {tuple(i.shape)} and needs offsets, a tensor, not {offsets!r}")
    if offsets.dtype != torch.int64 and offsets.dtype != torch.int32:
        raise TypeError(f"{name}: offsets is {offsets.dtype}; it must be torch.int64 or torch.int32")
    if offsets.dim() != 1 or (include_last and not len(offsets)):
        raise ValueError(f"{name}: offsets has shape {tuple(offsets.shape)}; it needs (B), or (B + 1) with the last one")
    if offsets.device != i.device:
        raise ValueError(f"{name}: offsets is on {offsets.device} but input is on {i.device}; they must be on one device")
    if readable(offsets):
        first, last, rising = int(offsets[0]), int(offsets[-1]), bool((offsets.diff() >= 0).all())
        if first != 0 or last > len(i) or not rising:
            raise ValueError(f"{name}: offsets runs from {first} to {last}; it must rise from 0 to at most N={len(i)}")
    o = offsets[:-1] if include_last else offsets
    wide_type = torch.promote_types(i.dtype, o.dtype)
    return i.to(wide_type), o.to(wide_type)


class EmbeddingBag(nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with the backward above; same parameter, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
            backend=self.backend,
        )


def reference(
    input,
    weight,
    offsets=None,
    max_norm=None,
    norm_type=2,
    scale_grad_by_freq=False,
    mode="mean",
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=None,
):
    """Bag by bag: torch's own cannot be differentiated twice."""
    V, E = weight.shape
    flat = input.reshape(-1).long()
    if input.dim() == 2:
        bounds = [k * input.shape[1] for k in range(input.shape[0] + 1)]
    else:
        bounds = offsets.tolist() + ([] if include_last_offset else [len(flat)])
    rows = weight[flat]
    if scale_grad_by_freq:
        share = 1 / torch.bincount(flat, minlength=V)[flat].unsqueeze(1).to(weight.dtype)
        rows = share * rows + ((1 - share) * rows).detach()
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    out = []
    for a, b in pairwise(bounds):
        at = [k for k in range(a, b) if padding_idx is None or int(flat[k]) != padding_idx % V]
        bag = rows[at]
        if not at:
            out.append((0 * weight).sum(0))
        elif mode == "max":
            out.append(bag.gather(0, bag.argmax(0, keepdim=True))[0])
        else:
            out.append(bag.sum(0) if mode == "sum" else bag.sum(0) / len(at))
    return torch.stack(out) if out else (0 * weight).sum() + weight.new_zeros(0, E)


def case(draw: Draw) -> Case:
    V, E, N = draw.size(least=1), draw.size(least=1), draw.size()
    mode = draw.choice(("sum", "mean", "max"))
    kwargs: dict[str, Any] = {"mode": mode}
    if draw.flag():
        i = draw.integers(0, V, draw.size(most=5), N)
    else:
        B = draw.size(least=1, most=5)
        cuts = sorted(draw.random.randint(0, N) for _ in range(B - 1))
        last = draw.flag()
        i, kwargs["include_last_offset"] = draw.integers(0, V, N), last
        kwargs["offsets"] = torch.tensor([0, *cuts, *[N] * last], device=draw.device)
    if draw.flag():
        kwargs["padding_idx"] = draw.choice((0, -1))
    if mode != "max" and draw.flag():
        kwargs["scale_grad_by_freq"] = True
    if mode == "sum" and draw.flag():
        kwargs["per_sample_weights"] = draw.tensor(*i.shape)
    return Case((i, draw.tensor(V, E)), kwargs)


def _bench(mode: str) -> Any:
    def bench(draw: Draw) -> Case:
        i = draw.integers(0, 10000, 2048, 20)
        return Case((i, draw.tensor(10000, 64)), {"mode": mode})

    return bench


OP = Op(
    name="embedding_bag",
    call=embedding_bag,
    reference=reference,
    peer=F.embedding_bag,
    rules=(RULE,),
    module=(EmbeddingBag,),
    replaces=(nn.EmbeddingBag,),
    shapes="input: B N, weight: V E -> B E",
    source="Joulin et al. 2017, §2",
    case=case,
    bench={mode: _bench(mode) for mode in MODES},
)
OPS = (OP,)
