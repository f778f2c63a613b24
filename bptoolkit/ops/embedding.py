"""Embedding: rows of a table.

Maths     y_n = w[i_n]                                   dw_v = Σ_n [i_n = v] dy_n
          scale_grad_by_freq                             dw_v = Σ_n [i_n = v] dy_n / c_v,  c_v = Σ_n [i_n = v]
          padding_idx = v                                dw_v = 0
Letters   i indices (*B), n runs over them; w the table V E; y, dy *B E
Numerics  the indices are kept and the table is not; half cotangents are summed in float32; rows are added in the order of n
          on the CPU; max_norm rescales the rows that are looked up, in place, before the lookup, and is not differentiated
Source    Bengio et al., "A neural probabilistic language model", 2003, section 2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating
from bptoolkit.transforms import _transforms_active


def sum_by(i, rows, V):
    """Σ over the rows whose index is v: N E -> V E."""
    return torch.zeros(V, *rows.shape[1:], dtype=rows.dtype, device=rows.device).index_add(0, i, rows)


def scatter(i, rows, b, s, V, padding, by_freq, dtype):
    """The table's gradient, Σ_n [i_n = v] s_n rows[b_n]: V E. Without b, b_n = n; without s, s_n = 1."""
    rows = wide(rows)
    if rows.is_cpu and i.numel() and unwatched(i, rows, b, s):
        dw = sum_sorted(i, rows, b, s, V)
    else:
        rows = rows if b is None else rows[b]
        dw = sum_by(i, rows if s is None else rows * wide(s).unsqueeze(1), V)
    if by_freq:
        dw = dw / sum_by(i, torch.ones_like(i, dtype=dw.dtype), V).clamp_min(1).unsqueeze(1)
    if padding is not None:
        dw = torch.where((torch.arange(V, device=i.device) == padding).unsqueeze(1), 0, dw)
    return dw.to(dtype)


def sum_sorted(i, rows, b, s, V):
    """The same sum as bags: bag v has the places where the index is v. index_add takes a microsecond a row on the CPU."""
    i = i.long()
    order, counts = torch.sort(i, stable=True)[1], torch.bincount(i, minlength=V)
    places = order if b is None else b[order]
    return torch._VF.embedding_bag(
        rows.contiguous(), places, counts.cumsum(0) - counts, False, 0, False, s if s is None else s[order]
    )[0]


def scatter_sparse(name, i, rows, V, padding):
    """The same as a sparse tensor of the rows that occur; first order only."""
    if torch.is_grad_enabled() and rows.requires_grad:
        raise NotImplementedError(
            f"{name}: sparse=True has gradients of first order only, and create_graph=True asks for more; use sparse=False"
        )
    if padding is not None:
        counts = i != padding
        i, rows = i[counts], rows[counts]
    return torch.sparse_coo_tensor(i.unsqueeze(0), rows, (V, rows.shape[1]), check_invariants=False)


def forward(w, i, V, padding, by_freq, sparse):
    return torch.embedding(w, i)


def backward(dy, i, V, padding, by_freq, sparse):
    i, rows = i.reshape(-1), dy.reshape(i.numel(), dy.shape[-1])
    if sparse and not _transforms_active():
        return scatter_sparse("embedding", i, rows, V, padding), None
    return scatter(i, rows, None, None, V, padding, by_freq, dy.dtype), None


def kernel():
    from bptoolkit.triton_kernels.embedding import KERNEL

    return KERNEL


RULE = Rule("embedding", forward, backward, inputs="w i", outputs="y", kernel=kernel)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Rows of a table, as `torch.nn.functional.embedding`.

    Args:
        input: indices (*B), int64 or int32.
        weight: the table (V, E), floating point.
        padding_idx: the row that gets no gradient; a negative one counts from the end.
        max_norm: rows that are looked up and have a larger norm are rescaled to it first, in weight itself.
        norm_type: the p of that norm.
        scale_grad_by_freq: divide gradients by how often the index occurs in input.
        sparse: weight's gradient is a sparse tensor (of first order, outside torch.func's transforms).
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, E), of weight's dtype.

    Raises:
        TypeError: input is not of int64 or int32, or weight not of floating point.
        ValueError: weight has not two dimensions, padding_idx is none of its rows, both sparse and scale_grad_by_freq are
            asked for, devices differ, or the named backend cannot run the call.
        IndexError: an index is no row of weight (checked on the CPU, outside transforms).
        NotImplementedError: a second derivative by way of a sparse gradient.
    """
    check_table("embedding", input, weight)
    padding = row_of("embedding", padding_idx, weight)
    check_sparse("embedding", sparse, scale_grad_by_freq)
    if max_norm is not None:
        renorm(weight, input, max_norm, norm_type)
    args = (weight, input, weight.shape[0], padding, scale_grad_by_freq, sparse)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))


def check_table(op: str, i: Any, w: Any) -> None:
    """Raise for indices or a table that cannot be."""
    check_floating(op, "weight", w)
    if not isinstance(i, Tensor):
        raise TypeError(f"{op}: input must be a tensor, not {type(i).__name__}")
    if i.dtype != torch.int64 and i.dtype != torch.int32:
        raise TypeError(f"{op}: input is {i.dtype}; indices must be torch.int64 or torch.int32")
    if w.dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(w.shape)}; it needs (V E)")
    if i.device != w.device:
        raise ValueError(f"{op}: weight is on {w.device} but input is on {i.device}; they must be on one device")
    if readable(i):
        low, high = (int(v) for v in torch.aminmax(i))
        if low < 0 or high >= w.shape[0]:
            raise IndexError(f"{op}: input holds {low if low < 0 else high}, which is no row of weight {tuple(w.shape)}")


def readable(i: Tensor) -> bool:
    """Whether there are values that can be looked at: on the CPU, where nothing transforms or traces."""
    if torch.compiler.is_compiling() or type(i) is not Tensor or i.device.type != "cpu" or i.numel() == 0:
        return False
    return not _transforms_active() and not torch._C._len_torch_dispatch_stack()


def row_of(op: str, padding_idx: int | None, w: Tensor) -> int | None:
    """padding_idx as a row from the start."""
    if padding_idx is None:
        return None
    V = w.shape[0]
    if not -V <= padding_idx < V:
        raise ValueError(f"{op}: padding_idx={padding_idx} is no row of weight {tuple(w.shape)}")
    return padding_idx % V


def check_sparse(op: str, sparse: bool, by_freq: bool) -> None:
    """Raise for options that torch's sparse gradients do not have either."""
    if sparse and by_freq:
        raise ValueError(f"{op}: sparse=True and scale_grad_by_freq=True do not go together, as in torch")


def renorm(w: Tensor, i: Tensor, max_norm: float, norm_type: float) -> None:
    """Rescale the rows of w that are looked up, in place."""
    with torch.no_grad():
        torch.embedding_renorm_(w, i.contiguous(), max_norm, norm_type)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` with the backward above; same parameter, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
            backend=self.backend,
        )


def reference(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """In plain torch: second derivatives of torch's own are not those of its first where it scales by frequency."""
    i, V = input.reshape(-1).long(), weight.shape[0]
    onehot = (i.unsqueeze(1) == torch.arange(V, device=i.device)).to(weight.dtype)  # N V
    y = weight[i]
    if scale_grad_by_freq:
        share = 1 / onehot.sum(0)[i].unsqueeze(1)
        y = share * y + ((1 - share) * y).detach()
    if padding_idx is not None:
        y = torch.where((i == padding_idx % V).unsqueeze(1), y.detach(), y)
    return y.reshape(*input.shape, weight.shape[1])


def case(draw: Draw) -> Case:
    V, E = draw.size(least=1), draw.size()
    i = draw.integers(0, V, *draw.batch())
    if draw.flag():
        i = i.int()
    kwargs: dict[str, Any] = {"padding_idx": draw.choice((0, -1))} if draw.flag() else {}
    if draw.flag():
        kwargs["scale_grad_by_freq"] = True
    return Case((i, draw.tensor(V, E)), kwargs)


def bench(draw: Draw) -> Case:
    return Case((draw.integers(0, 8192, 32, 512), draw.tensor(8192, 256)), {})


def bench_padded(draw: Draw) -> Case:
    return Case((draw.integers(0, 1000, 64, 512), draw.tensor(1000, 128)), {"padding_idx": 0})


OP = Op(
    name="embedding",
    call=embedding,
    reference=reference,
    peer=F.embedding,
    rules=(RULE,),
    module=(Embedding,),
    replaces=(nn.Embedding,),
    shapes="input: *B, weight: V E -> *B E",
    source="Bengio et al. 2003, §2",
    case=case,
    bench={"8192 rows": bench, "1000 rows, padded": bench_padded},
)
OPS = (OP,)
