"""The recurrent ops in plain torch, a step and, where lengths differ, a row at a time: what lstm, gru and rnn are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


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
    **_: Any,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run `step(x_t, states, weights) -> states` over all steps, rows, directions and layers.

    The first of the states is the output; `sizes` are theirs.
    """
    batched, D = input.dim() == 3, 1 + bidirectional
    x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if batch_first else input
    if hx is not None and not batched:
        hx = [h.unsqueeze(1) for h in hx]
    T, B, per = x.shape[0], x.shape[1], len(weights) // (num_layers * D)
    rows = [(slice(None), T)] if lengths is None or not B else [(slice(b, b + 1), n) for b, n in enumerate(lengths.tolist())]
    finals: list[list[Tensor]] = [[] for _ in sizes]
    for layer in range(num_layers):
        directions = []
        for d in range(D):
            k = layer * D + d
            ws = weights[k * per : (k + 1) * per]
            start = [x.new_zeros(B, n) for n in sizes] if hx is None else [h[k] for h in hx]
            outputs, ends = [], []
            for at, n in rows:
                states: Sequence[Tensor] = [s[at] for s in start]
                ys = [x.new_zeros(1)] * n
                for t in range(n - 1, -1, -1) if d else range(n):
                    states = step(x[t, at], states, ws)
                    ys[t] = states[0]
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


def case(draw: Any, gates: int, states: int, projections: bool = False) -> tuple[Any, dict[str, Any]]:
    """A drawn call of a recurrent op: its input, hx and weights, and its options. Small, for they are differentiated thrice."""
    T, B, I, H = draw.size(1, 4), draw.size(0, 3), draw.size(1, 3), draw.size(1, 3)
    L, D, P = draw.choice((1, 1, 2)), draw.choice((1, 1, 2)), H
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


def wide(draw: Any, gates: int, T: int, B: int, H: int) -> tuple[Any, None, list[Tensor]]:
    """The arguments of a benchmark: one layer, I = H."""
    scale = H**-0.5
    shapes = ((gates * H, H), (gates * H, H), (gates * H,), (gates * H,))
    return draw.tensor(T, B, H), None, [draw.tensor(*s, scale=scale) for s in shapes]
