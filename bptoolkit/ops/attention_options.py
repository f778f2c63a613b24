"""The options of attention's two functions: windows, caps, slopes, lengths; their checks and layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bptoolkit import randomness
from bptoolkit.ops.attention_tiles import EVERYWHERE, wide


def read_window(name: str, window: Any, causal: bool, align: str, distances: bool) -> tuple[int, int, int]:
    """The window as the rule has it: left and right bound, −1 for none, and whether the last row stands at the last column."""
    if align not in ("top_left", "bottom_right"):
        raise ValueError(f"{name}: causal_align={align!r} must be 'top_left' or 'bottom_right'")
    pair = (-1, -1) if window is None else (window, window) if isinstance(window, int) else window
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(type(w) is int for w in pair):
        raise TypeError(f"{name}: window={window!r} must be an int, two of them, or None")
    left, right = pair
    if left < -1 or right < -1:
        raise ValueError(f"{name}: window={window!r} must have bounds from 0 on, or -1 for none")
    if causal:
        right = 0
    if left < 0 and right < 0 and not distances:
        return EVERYWHERE
    return left, right, int(align == "bottom_right")


def read_cap(name: str, softcap: float | None) -> float:
    """The cap as the rule has it: 0.0 for none."""
    if softcap is None:
        return 0.0
    if not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap={softcap} must be positive and finite, or None")
    return float(softcap)


def read_dropout(name: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: dropout_p={p} must be between 0 and 1")
    return 0.0 if p == 0 else float(p)


def draw_seed(p: float, q: Tensor) -> Tensor | None:
    return randomness.draw_seed(q) if p > 0 else None


def check_mask(name: str, q: Tensor, m: Any, causal: bool) -> None:
    """Raise for a mask that cannot be."""
    if m is None:
        return
    if not isinstance(m, Tensor):
        raise TypeError(f"{name}: attn_mask must be a tensor or None, not {type(m).__name__}")
    if causal:
        raise ValueError(f"{name}: attn_mask and is_causal=True cannot both be given; put the causal part into the mask")
    if m.dtype not in (torch.bool, q.dtype, wide(q.dtype)):
        raise TypeError(
            f"{name}: attn_mask is {m.dtype}; it must be torch.bool, or query's {q.dtype}, to be added to the scores"
        )
    _check_device(name, "attn_mask", m, q)


def lay_out_slopes(name: str, slopes: Any, q: Tensor, grouped: bool) -> Tensor | None:
    """(H,) or (*B, H), as broadcast over q's batch dimensions, the last two of which are one dimension of heads if grouped."""
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor) or slopes.dtype not in (q.dtype, wide(q.dtype)):
        kind = slopes.dtype if isinstance(slopes, Tensor) else type(slopes).__name__
        raise TypeError(f"{name}: alibi_slopes is {kind}; it must be a tensor of query's {q.dtype}, or of {wide(q.dtype)}")
    _check_device(name, "alibi_slopes", slopes, q)
    over = (q.flatten(-4, -3) if grouped else q).shape[:-2]
    if slopes.dim() > len(over) or any(s != 1 and s != b for s, b in zip(reversed(slopes.shape), reversed(over))):
        raise ValueError(
            f"{name}: alibi_slopes is {tuple(slopes.shape)}; it must broadcast to the batch and heads {tuple(over)}"
        )
    slopes = slopes[(None,) * (len(over) - slopes.dim())]
    if grouped:
        slopes = slopes.unsqueeze(-1) if slopes.shape[-1] == 1 else slopes.unflatten(-1, q.shape[-4:-2])
    return slopes


def lay_out_lengths(name: str, lengths: Any, q: Tensor, grouped: bool) -> Tensor | None:
    """(B,): of the first batch dimension of q; with a dimension for each of the others."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name}: key_lengths is {kind}; it must be a tensor of torch.int32 or torch.int64")
    _check_device(name, "key_lengths", lengths, q)
    batch = q.shape[:-2]
    if lengths.dim() != 1 or not batch or (grouped and len(batch) < 3) or lengths.shape[0] != batch[0]:
        shape = tuple((q.flatten(-4, -3) if grouped else q).shape)
        raise ValueError(f"{name}: key_lengths is {tuple(lengths.shape)}; it must be one length per row of query {shape}")
    return lengths[(slice(None), *(None,) * (len(batch) - 1))]


def _check_device(name: str, what: str, t: Tensor, q: Tensor) -> None:
    if t.device != q.device:
        raise ValueError(f"{name}: {what} is on {t.device} but query is on {q.device}; they must be on one device")
