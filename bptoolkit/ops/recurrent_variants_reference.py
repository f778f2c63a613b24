"""The LSTM's variants in plain torch, a step at a time: what peephole_lstm, layer_norm_lstm and zoneout_lstm are judged by.

The masks are those of `recurrent_variants`, by way of `bptoolkit.randomness`; nothing else is shared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit import randomness
from bptoolkit.ops.recurrent_variants import CANDIDATE, INPUT, STATE, ZONE_C, ZONE_H, stream


def plain(
    more: Sequence[str],
    rates: Sequence[float],
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = True,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """All layers and directions; `more` names the weights beside torch's, `rates` has the probabilities by their streams."""
    batched, D, H = input.dim() == 3, 1 + bidirectional, weights[1].shape[1]
    x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if batch_first else input
    if hx is not None and not batched:
        hx = [s.unsqueeze(1) for s in hx]
    T, B = x.shape[:2]
    there = torch.ones(T, B, 1, dtype=torch.bool, device=x.device)
    if lengths is not None:
        there = torch.stack([lengths > t for t in range(T)]).unsqueeze(-1)
    names = ["wi", "wh", *(("bi", "bh") if bias else ()), *more]
    finals: list[tuple[Tensor, Tensor]] = []
    for layer in range(num_layers):
        outputs = []
        for d in range(D):
            k = layer * D + d
            w = dict(zip(names, weights[k * len(names) : (k + 1) * len(names)]))
            h, c = (x.new_zeros(B, H), x.new_zeros(B, H)) if hx is None else (hx[0][k], hx[1][k])
            seed = randomness.draw_seed(x) if training and any(rates) else None
            kx, kh = kept(seed, rates, INPUT, x, B, x.shape[2]), kept(seed, rates, STATE, x, B, H)
            kg = kept(seed, rates, CANDIDATE, x, T, B, H)
            if training:
                zh, zc = (1 - kept(seed, rates, z, x, T, B, H, scaled=False) for z in (ZONE_H, ZONE_C))
            else:
                zh, zc = (x.new_full((T, B, H), rates[z]) for z in (ZONE_H, ZONE_C))
            ys = [x] * T
            for t in range(T - 1, -1, -1) if d else range(T):
                u, v = (kx * torch.where(there[t], x[t], 0)) @ w["wi"].T, (kh * h) @ w["wh"].T
                if "gain_ih" in w:
                    u, v = normalised(u, w["gain_ih"], eps), normalised(v, w["gain_hh"], eps)
                i, f, g, o = (u + v + (w["bi"] + w["bh"] if bias else 0)).split(H, -1)
                if "weight_ch" in w:
                    pi, pf, po = w["weight_ch"].split(H)
                    i, f = i + pi * c, f + pf * c
                new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g) * kg[t]
                if "weight_ch" in w:
                    o = o + po * new
                seen = normalised(new, w["gain_c"], eps) + w.get("bias_c", 0) if "gain_c" in w else new
                h = torch.where(there[t], zh[t] * h + (1 - zh[t]) * torch.sigmoid(o) * torch.tanh(seen), h)
                c = torch.where(there[t], zc[t] * c + (1 - zc[t]) * new, c)
                ys[t] = torch.where(there[t], h, 0)
            outputs.append(torch.stack(ys))
            finals.append((h, c))
        x = torch.cat(outputs, -1)
        if dropout and training and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    h, c = (torch.stack(s) for s in zip(*finals))
    if not batched:
        return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
    return x.transpose(0, 1) if batch_first else x, (h, c)


def kept(seed: Tensor | None, rates: Sequence[float], which: int, like: Tensor, *shape: int, scaled: bool = True) -> Tensor:
    """0 where something is dropped, else 1, or what keeps the mean."""
    p = rates[which]
    if seed is None or p == 0:
        return like.new_ones(()).expand(shape)
    mask = randomness.keep(stream(seed, which), shape, p).to(like.dtype)
    return mask / (1 - p) if scaled and p < 1 else mask


def normalised(v: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Layer normalisation without a shift; the third derivatives of `F.layer_norm` are wrong."""
    mean = v.mean(-1, keepdim=True)
    return gain * (v - mean) / ((v - mean).pow(2).mean(-1, keepdim=True) + eps).sqrt()
