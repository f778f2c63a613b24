"""The recurrent ops in plain torch, a step and, where lengths differ, a row at a time: what lstm, gru and rnn are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bptoolkit import randomness
from bptoolkit.ops.bptt import ARTBP
from bptoolkit.ops.bptt_plan import sizes_of

Step = Callable[..., Sequence[Tensor]]


def plain(
    step: Step,
    sizes: Sequence[int],
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    truncate: Any = None,
    **_: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run `step(x_t, states, weights) -> states` over all steps, rows, directions and layers.

    The first of the states is the output; `sizes` are theirs. With truncate="eprop" a step gets h= as well, what it is to
    multiply by the recurrent weights.
    """
    batched, D = input.dim() == 3, 1 + bidirectional
    x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if batch_first else input
    if hx is not None and not batched:
        hx = [h.unsqueeze(1) for h in hx]
    T, B, per = x.shape[0], x.shape[1], len(weights) // (num_layers * D)
    rows = [(slice(None), T)] if lengths is None or not B else [(slice(b, b + 1), n) for b, n in enumerate(lengths.tolist())]
    finals: list[list[Tensor]] = [[] for _ in sizes]
    masks = [None if not isinstance(truncate, ARTBP) else _mask(truncate, T, B, x, k) for k in range(num_layers * D)]
    for layer in range(num_layers):
        directions = []
        for d in range(D):
            k = layer * D + d
            ws = weights[k * per : (k + 1) * per]
            start = [x.new_zeros(B, n) for n in sizes] if hx is None else [h[k] for h in hx]
            outputs, ends = [], []
            for at, n in rows:
                steps = range(n - 1, -1, -1) if d else range(n)
                kept = masks[k]
                mask = None if kept is None else kept[:, at].unsqueeze(-1)
                ys, states = _row(step, x[:, at], [s[at] for s in start], ws, steps, truncate, mask)
                ys = ys[::-1] if d else ys
                past = x.new_zeros(T - n, states[0].shape[0], sizes[0])
                outputs.append(torch.cat([torch.stack(ys), past]) if n else past)
                ends.append(states)
            directions.append(torch.cat(outputs, 1))
            for s, f in enumerate(finals):
                f.append(torch.cat([e[s] for e in ends]))
        x = torch.cat(directions, -1)
    states = tuple(torch.stack(f) for f in finals)
    if not batched:
        return x.squeeze(1), tuple(s.squeeze(1) for s in states)
    return x.transpose(0, 1) if batch_first else x, states


def _mask(truncate: ARTBP, T: int, B: int, x: Tensor, k: int) -> Tensor | None:
    """Where the way into a step is not cut."""
    if truncate.p == 0:
        return None
    seed = randomness.draw_seed(x) if truncate.seed is None else truncate.seed + k
    return randomness.keep(seed, (T, B), truncate.p)


def _row(
    step: Step,
    x: Tensor,
    first: Sequence[Tensor],
    ws: Sequence[Tensor],
    steps: Sequence[int],
    truncate: Any,
    mask: Tensor | None,
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """The outputs in the order of `steps`, and the last states."""

    def run(states: Sequence[Tensor], steps: Sequence[int], begun: int = 0) -> list[Sequence[Tensor]]:
        out = []
        for s, t in enumerate(steps, begun):
            if mask is not None and s:
                a = 1 / (1 - truncate.p)
                states = [torch.where(mask[t], a * h - ((a - 1) * h).detach(), h.detach()) for h in states]
            states = step(x[t], states, ws, **({"h": states[0].detach()} if truncate == "eprop" else {}))
            out.append(states)
        return out

    n = len(steps)
    if isinstance(truncate, (int, tuple, list)) and not isinstance(truncate, ARTBP):
        k1, k2 = (truncate, truncate) if isinstance(truncate, int) else truncate
        found: list[Sequence[Tensor]] = []
        held = run(first, steps)
        for w in range(0, n, k1):
            begin, end = max(0, w + k1 - k2), min(w + k1, n)
            states = first if begin == 0 else [h.detach() for h in held[begin - 1]]
            found += run(states, steps[begin:end], begin)[w - begin :]
    else:
        found = run(first, steps)
    return [states[0] for states in found], found[-1] if found else first


def case(draw: Any, gates: int, states: int, projections: bool = False, small: bool = False) -> tuple[Any, dict[str, Any]]:
    """A drawn call of a recurrent op: its input, hx and weights, and its options. Small, for they are differentiated thrice.

    small: one layer, seldom two directions, at most 3 steps. Layers and directions are `recurrent.sequence`'s, so that lstm,
    gru and rnn speak for the others.
    """
    T, B, I, H = draw.size(1, 3 if small else 4), draw.size(0, 3), draw.size(1, 3), draw.size(1, 3)
    L, D, P = 1 if small else draw.choice((1, 1, 2)), draw.choice((2, 1, 1, 1, 1) if small else (1, 1, 2)), H
    bias, batched = draw.flag(), draw.random.random() < 0.8
    kwargs: dict[str, Any] = {"num_layers": L, "bidirectional": D == 2, "bias": bias}
    if projections and draw.random.random() < 0.3:
        P = kwargs["proj_size"] = 1
        H = max(H, 2)
    if draw.flag():
        kwargs["batch_first"] = True
    if batched and draw.random.random() < 0.4:
        kwargs["lengths"] = draw.integers(0, T + 1, B)
        kwargs["lengths"][:1] = T  # or nothing might depend on anything
    scale = H**-0.5
    weights = []
    for layer in range(L):
        for _ in range(D):
            weights += [draw.tensor(gates * H, D * P if layer else I, scale=scale), draw.tensor(gates * H, P, scale=scale)]
            weights += [draw.tensor(gates * H, scale=scale) for _ in range(2 * bias)]
            weights += [draw.tensor(P, H, scale=scale)] if "proj_size" in kwargs else []
    lead = (B, T) if "batch_first" in kwargs else (T, B)
    x = draw.tensor(*lead, I) if batched else draw.tensor(T, I)
    hx = None
    if draw.flag():
        hx = tuple(draw.tensor(L * D, *([B] if batched else []), n) for n in (P, H)[:states])
        hx = hx[0] if states == 1 else hx
    return (x, hx, weights), kwargs


def options(draw: Any, name: str, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Further options of a drawn call of lstm, gru or rnn: what is kept, and truncation; the rarer ways rarely."""
    saves: tuple[Any, ...] = ("gates", "outputs")
    if draw.random.random() < 0.15:
        x, _, weights = args
        B = 1 if x.dim() == 2 else x.shape[0 if "batch_first" in kwargs else 1]
        P = weights[1].shape[1]
        H = weights[-1].shape[1] if "proj_size" in kwargs else P
        a, b = sizes_of(name, B, H, P, x.element_size())
        saves = ("sparse", "segments", 1 << 20, max(1, a + a * -(-b // max(a, 1))))  # and the least budget there is
    more = {"save": draw.choice(saves)}
    if draw.random.random() < 0.15:
        k, seed = draw.size(1, 3), draw.integers(-(1 << 31), 1 << 31, 2).to(torch.int32)
        more["truncate"] = draw.choice((k, (k, k + 1), (1, 3), "eprop", ARTBP(0.4, seed)))
    return kwargs | more


def wide(draw: Any, gates: int, T: int, B: int, H: int) -> tuple[Any, None, list[Tensor]]:
    """The arguments of a benchmark: one layer, I = H."""
    scale = H**-0.5
    shapes = ((gates * H, H), (gates * H, H), (gates * H,), (gates * H,))
    return draw.tensor(T, B, H), None, [draw.tensor(*s, scale=scale) for s in shapes]


def torchs(run: Any, input: Tensor, states: Any, weights: Sequence[Tensor], lengths: Tensor | None) -> tuple[Tensor, ...]:
    """One layer of torch's own from states of zeros, for benchmarks: the output and the last states. Ragged rows are packed."""
    options = (weights, True, 1, 0.0, True, False)
    if lengths is None:
        return run(input, states, *options, False)  # type: ignore[no-any-return]
    packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
    data, *last = run(packed.data, packed.batch_sizes, states, *options)
    y, _ = pad_packed_sequence(packed._replace(data=data), total_length=input.shape[0])
    return y, *(s.index_select(1, packed.unsorted_indices) for s in last)
