"""What lstm, gru and rnn share: layers and directions, ragged lengths, packed sequences, checks, vmap of their time loops.

Letters   T steps, B batch, I in, H hidden, P projected (H without a projection), G·H the gates of a cell side by side,
          L layers, D directions; *V the dimensions that vmap adds in front, inside the loops
Ragged    rows end at `lengths`: what a row has past its length is never read, its outputs there are zero, its state stays what
          it was. A reverse direction therefore starts each row at its own end, with nothing turned round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from bptoolkit.op import Op
from bptoolkit.ops.resets import Cell, Runs, check_resets
from bptoolkit.shapes import check_alike, check_floating
from bptoolkit.transforms import _transforms_active

CHUNK = 1 << 18  # elements of gates that a backward loop works on at a time: 1 MiB of float32


# --- inside a rule: steps and lengths ------------------------------------------------------------------------------------


def order(T: int, reverse: bool) -> range:
    """The steps in the order the recurrence takes them; `[::-1]` is the order of its backward."""
    return range(T - 1, -1, -1) if reverse else range(T)


def valid(T: int, lengths: Tensor) -> Tensor:
    """Where a row is still within its length: *V T B 1."""
    steps = torch.arange(T, device=lengths.device)
    return (steps.unsqueeze(-1) < lengths.unsqueeze(-2)).unsqueeze(-1)


def within(t: Any, lengths: Tensor | None) -> Any:
    """A sequence, or None, with zeros past the lengths, whatever was there."""
    return t if t is None or lengths is None else torch.where(valid(t.shape[-3], lengths), t, 0)


def before(s0: Tensor, s: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state each step started from: s0 at a row's first step, else the state that the step before left."""
    if not reverse:
        return torch.cat([s0.unsqueeze(-3), s[..., :-1, :, :]], -3)  # *V T B H
    start = s0.unsqueeze(-3)
    shifted = torch.cat([s[..., 1:, :, :], start], -3)  # *V T B H
    if lengths is None:
        return shifted
    ends = torch.arange(s.shape[-3], device=s.device).unsqueeze(-1) == lengths.unsqueeze(-2) - 1  # *V T B
    return torch.where(ends.unsqueeze(-1), start, shifted)


def last(s0: Tensor, s: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state after a row's last step: B H; of an empty row, s0."""
    if lengths is None:
        return s[0 if reverse else -1]
    at = torch.zeros_like(lengths) if reverse else (lengths - 1).clamp(0, s.shape[0] - 1)
    picked = s.gather(0, at.reshape(1, -1, 1).expand(1, *s.shape[1:])).squeeze(0)
    return torch.where((lengths > 0).unsqueeze(-1), picked, s0)


def carry(keep: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """The state of the rows that took the step; the others keep theirs."""
    return new if keep is None else torch.where(keep, new, old)


def each(t: Tensor | None, T: int) -> Any:
    """The steps of a sequence *V T B ·, or T times None. (A select per step would make autograd's backward quadratic in T.)"""
    return [None] * T if t is None else t.unbind(-3)


def next_sends(sent: Tensor, reverse: bool) -> Tensor:
    """What the step after each sends back to it, from what each step sends back; zero at the last: *V T B ·."""
    return before(torch.zeros_like(sent[..., 0, :, :]), sent, None, not reverse)


def back(da: Tensor, wh: Tensor) -> Tensor:
    """Through the recurrent weights, one product over all steps: *V T B N, *V N M -> *V T B M."""
    return da @ (wh if wh.dim() == 2 else wh.unsqueeze(-3))


def over_time(a: Tensor, b: Tensor) -> Tensor:
    """Σₜ Σ_b aₜ bₜᵀ, one product over all steps: T B M, T B N -> M N."""
    n = a.shape[0] * a.shape[1]
    return a.reshape(n, a.shape[2]).mT @ b.reshape(n, b.shape[2])


# --- around a loop: vmap --------------------------------------------------------------------------------------------------


def folded(kinds: str, fast: Callable[..., Any], loop: Callable[..., Any]) -> Callable[..., Any]:
    """`fast`, which takes no *V, made to take what `loop` takes.

    Where the samples share their weights they are one larger batch: *V goes into B. Where they do not, `loop` runs.

    Args:
        kinds: a letter per tensor argument: t a sequence (T B ·), b a state (B ·), w a weight, l lengths (B).
        fast: the function without *V.
        loop: the function with it.
    """

    def run(*args: Any) -> Any:
        tensors = args[: len(kinds)]
        V = tensors[kinds.index("b")].shape[:-2]
        if not V:
            return fast(*args)
        shared = [t for k, t in zip(kinds, tensors) if k == "w" and t is not None]
        if not all(s == 0 or n == 1 for w in shared for s, n in zip(w.stride()[:-2], w.shape[:-2])):
            return loop(*args)
        n = V.numel()

        def fold(kind: str, t: Tensor | None) -> Tensor | None:
            if t is None or kind == "w":
                return t if t is None else t[(0,) * len(V)]
            if kind == "t":
                return t.reshape(n, *t.shape[-3:]).movedim(0, 1).reshape(t.shape[-3], n * t.shape[-2], t.shape[-1])
            return t.reshape(n * t.shape[len(V)], *t.shape[len(V) + 1 :])

        def unfold(t: Tensor) -> Tensor:
            if t.dim() == 2:
                return t.reshape(*V, t.shape[0] // n, t.shape[1])
            t = t.reshape(t.shape[0], n, t.shape[1] // n, t.shape[2]).movedim(1, 0).contiguous()
            return t.reshape(*V, *t.shape[1:])

        out = fast(*map(fold, kinds, tensors), *args[len(kinds) :])
        return unfold(out) if isinstance(out, Tensor) else tuple(map(unfold, out))

    return run


# --- around the rules: layers, directions, packing ------------------------------------------------------------------------


class Layout(NamedTuple):
    """How the weights are laid out, and what happens between layers.

    `recurrent`: whether there are weight_hh and bias_hh. `further`: vectors that come after, and their sizes in H.
    """

    num_layers: int
    bidirectional: bool
    batch_first: bool
    bias: bool
    dropout: float = 0.0
    proj_size: int = 0
    recurrent: bool = True
    further: tuple[tuple[str, int], ...] = ()

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def names(self) -> tuple[str, ...]:
        """The weights of one layer in one direction."""
        sides = ("ih", "hh") if self.recurrent else ("ih",)
        names = [f"{kind}_{side}" for kind in (("weight", "bias") if self.bias else ("weight",)) for side in sides]
        return (*names, *(("weight_hr",) if self.proj_size else ()), *(name for name, _ in self.further))


def sequence(
    op: Op,
    cell: Cell,
    gates: int,
    states: tuple[str, ...],
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    layout: Layout,
    lengths: Tensor | None,
    keep_state: bool = False,
    resets: Tensor | None = None,
    records: Sequence[Any] | None = None,
) -> tuple[Any, tuple[Tensor, ...]]:
    """All layers and directions of a recurrent op, with everything torch's modules take.

    Args:
        op: the op, for its name and casts.
        cell: one layer in one direction, `cell(x, states, weights, lengths, reverse, record) -> y, last
            states`.
        gates: how many blocks of H rows its weights have.
        states: the names of its states.
        input, hx, weights, lengths, resets: the arguments of the public function.
        layout: its options.
        keep_state: under autocast on the CPU, work in the dtype of the states; see `cast`.
        records: who is given the norms of gradients of each layer and direction; see `grad_norms`.

    Returns:
        The output and the last states.
    """
    hx = check_hx(op.name, hx, states)
    check_weights(op.name, weights, layout)
    packed = input if isinstance(input, PackedSequence) else None
    x: Any = input if packed is None else packed.data
    x, hx, weights = cast(op, x, hx, weights, keep_state)
    if packed is not None:
        if lengths is not None:
            raise ValueError(f"{op.name}: a PackedSequence has its lengths in it; leave lengths out")
        if resets is not None:
            raise ValueError(f"{op.name}: resets need a padded input and lengths, not a PackedSequence")
        check_floating(op.name, "input.data", x)
        x, lengths, index = unpack(packed, x)
        layout = layout._replace(batch_first=False)
    num_layers, batch_first, dropout, proj_size = layout.num_layers, layout.batch_first, layout.dropout, layout.proj_size
    D, per = layout.directions, len(layout.names)
    check(op.name, x, hx, weights, gates, states, layout)
    batched = x.dim() == 3
    x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if batch_first else x  # T B I
    hx = hx if hx is None or batched else [h.unsqueeze(1) for h in hx]  # L·D B ·
    if hx is not None and packed is not None and packed.sorted_indices is not None:
        hx = [h.index_select(1, packed.sorted_indices) for h in hx]
    if lengths is not None:
        lengths = check_lengths(op.name, lengths, x, batched).to(x.device)
    if resets is not None:
        resets = check_resets(op.name, resets, x, batched, batch_first)
        cell = Runs(resets, lengths).cell(cell) if x.shape[1] else cell
    H = weights[0].shape[0] // gates
    sizes = (proj_size or H, H)
    finals: list[list[Tensor]] = [[] for _ in states]
    for layer in range(num_layers):
        outputs = []
        for d in range(D):
            k = layer * D + d
            start = [x.new_zeros(x.shape[1], n) for _, n in zip(states, sizes)] if hx is None else [h[k] for h in hx]
            y, ends = cell(x, start, weights[k * per : (k + 1) * per], lengths, d == 1, records[k] if records else 0)
            outputs.append(y)
            for f, e in zip(finals, ends):
                f.append(e)
        x = outputs[0] if D == 1 else torch.cat(outputs, -1)  # T B D·P
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    last_states = tuple(torch.stack(f) for f in finals)  # L·D B ·
    if packed is not None:
        if packed.unsorted_indices is not None:
            last_states = tuple(s.index_select(1, packed.unsorted_indices) for s in last_states)
        return repack(packed, x, index), last_states
    if not batched:
        return x.squeeze(1), tuple(s.squeeze(1) for s in last_states)
    return x.transpose(0, 1) if batch_first else x, last_states


def cast(op: Op, x: Tensor, hx: Any, weights: Sequence[Tensor], keep_state: bool) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """The casts of autocast, once for the whole sequence.

    On the CPU torch's gru and its packed lstm multiply in the low dtype but keep the dtype of their states; here everything
    is done in the states' dtype.
    """
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, Tensor):
        return x, hx, weights
    tensors = (x, *(hx or ()), *weights)
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and keep_state:
        dtype = x.dtype if hx is None else hx[0].dtype
        tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
    else:
        tensors = op.cast(*tensors)
    n = len(tensors) - len(weights)
    return tensors[0], tensors[1:n] or None, tensors[n:]


def unpack(packed: PackedSequence, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A packed sequence with its rows padded: T B I; the rows' lengths; where each packed row is in T·B."""
    sizes = packed.batch_sizes
    T, B = len(sizes), int(sizes[0])
    there = torch.arange(B) < sizes.unsqueeze(-1)  # T B: row b has a step t
    index = there.flatten().nonzero().squeeze(-1).to(data.device)
    x = data.new_zeros(T * B, data.shape[-1]).index_copy(0, index, data)
    return x.reshape(T, B, data.shape[-1]), there.sum(0), index


def repack(packed: PackedSequence, y: Tensor, index: Tensor) -> PackedSequence:
    """What `unpack` undid: T B · packed as `packed` is."""
    data = y.reshape(y.shape[0] * y.shape[1], *y.shape[2:]).index_select(0, index)
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


# --- checks ---------------------------------------------------------------------------------------------------------------


def check_save(op: str, save: str) -> None:
    """Raise unless save is a known mode."""
    if save not in ("gates", "outputs"):
        raise ValueError(f"{op}: save={save!r} is not known; choose 'gates' or 'outputs'")


def check_hx(op: str, hx: Any, states: Sequence[str]) -> Any:
    """The initial states as a sequence with a tensor per state, or None."""
    if hx is None:
        return None
    if len(states) == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"{op}: hx must be one tensor, {states[0]}, or None; not {type(hx).__name__}")
        return (hx,)
    if not isinstance(hx, (tuple, list)) or len(hx) != len(states) or not all(isinstance(h, Tensor) for h in hx):
        got = f"{type(hx).__name__} of {len(hx)}" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"{op}: hx must be a tuple ({', '.join(states)}) of tensors, or None; not {got}")
    return tuple(hx)


def check_weights(op: str, weights: Any, layout: Layout) -> None:
    """Check the options and the number of the weights."""
    L, D, names = layout.num_layers, layout.directions, layout.names
    if L < 1:
        raise ValueError(f"{op}: num_layers={L}; there must be at least one")
    if not 0 <= layout.dropout <= 1:
        raise ValueError(f"{op}: dropout={layout.dropout}; it must be between 0 and 1")
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"{op}: weights must be a list of tensors, not {type(weights).__name__}")
    if len(weights) != L * D * len(names):
        raise ValueError(
            f"{op}: weights has {len(weights)} tensors; {L} layers in {D} directions, with {', '.join(names)} each, "
            f"need {L * D * len(names)}"
        )


def check(op: str, x: Tensor, hx: Any, weights: Sequence[Tensor], gates: int, states: tuple[str, ...], layout: Layout) -> None:
    """Check every tensor's rank, size, dtype and device, before any work."""
    L, D, names, proj_size = layout.num_layers, layout.directions, layout.names, layout.proj_size
    check_floating(op, "input", x)
    if x.dim() not in (2, 3):
        lead = "(B, T, I)" if layout.batch_first else "(T, B, I)"
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}, which is {x.dim()} dimensions; it needs {lead} or (T, I)")
    first = weights[0]
    check_floating(op, "weight_ih_l0", first)
    if first.dim() != 2 or first.shape[0] % gates:
        raise ValueError(f"{op}: weight_ih_l0 has shape {tuple(first.shape)}; it needs ({gates}·H, I)")
    H = first.shape[0] // gates
    if not 0 <= proj_size < max(H, 1):
        raise ValueError(f"{op}: proj_size={proj_size}; it must be smaller than the hidden size, {H}, or 0")
    P, I = proj_size or H, x.shape[-1]
    if first.shape[1] != I:
        raise ValueError(
            f"{op}: input has {I} features {tuple(x.shape)}, but weight_ih_l0 {tuple(first.shape)} takes {first.shape[1]}"
        )
    for k, w in enumerate(weights):
        layer, d, part = k // len(names) // D, k // len(names) % D, names[k % len(names)]
        name = f"{part}_l{layer}" + "_reverse" * d
        check_floating(op, name, w)
        check_alike(op, "input", x, name, w)
        fan = {"weight_ih": I if layer == 0 else D * P, "weight_hh": P, "weight_hr": H}
        rows = {"weight_hr": P, **{name: n * H for name, n in layout.further}}.get(part, gates * H)
        wanted = (rows, fan[part]) if part in fan else (rows,)
        if tuple(w.shape) != wanted:
            raise ValueError(f"{op}: {name} has shape {tuple(w.shape)}; it needs {wanted}")
    time, batch = (1, 0) if layout.batch_first and x.dim() == 3 else (0, 1)
    if x.shape[time] == 0:
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}: Expected sequence length to be larger than 0 in RNN")
    for name, h, n in zip(states, hx or (), (P, H)):
        check_floating(op, name, h)
        check_alike(op, "input", x, name, h)
        expected = (L * D, n) if x.dim() == 2 else (L * D, x.shape[batch], n)
        if tuple(h.shape) != expected:
            raise ValueError(f"{op}: {name} has shape {tuple(h.shape)}; with input {tuple(x.shape)} it needs {expected}")


def check_lengths(op: str, lengths: Any, x: Tensor, batched: bool) -> Tensor:
    """Check the lengths against x: T B I; their values only where they can be read without waiting or tracing."""
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{op}: lengths must be an int64 tensor, not {got}")
    if not batched or lengths.dim() != 1 or lengths.shape[0] != x.shape[1]:
        raise ValueError(f"{op}: lengths has shape {tuple(lengths.shape)}; it needs ({x.shape[1]},), one per row of the batch")
    if torch.compiler.is_compiling() or _transforms_active() or torch._C._len_torch_dispatch_stack():
        return lengths
    if type(lengths) is Tensor and lengths.device.type == "cpu" and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > x.shape[0]:
            raise ValueError(f"{op}: lengths go from {low} to {high}; they must be between 0 and T, {x.shape[0]}")
    return lengths


def weights_of(module: torch.nn.RNNBase) -> list[Tensor]:
    """A module's weights in torch's order, as they are now: parametrized, swapped in by functional_call, or plain."""
    return [getattr(module, name) for name in module._flat_weights_names]


def options_of(module: torch.nn.RNNBase) -> dict[str, Any]:
    """A module's attributes as the options of its function."""
    names = ("num_layers", "bidirectional", "batch_first", "bias", "training", "save", "truncate", "backend")
    # under dynamic=True a float read from a module costs a second compilation, so it is read where it matters only
    dropout = module.dropout if module.training and module.num_layers > 1 else 0.0
    return {"dropout": dropout, "grad_norms": module._kept, **{name: getattr(module, name) for name in names}}
