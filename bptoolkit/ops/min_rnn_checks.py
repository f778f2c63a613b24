"""The errors for arguments of min_gru and min_lstm that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bptoolkit.shapes import check_alike, check_floating

BLOCKS = {"min_gru": 2, "min_lstm": 3}
ACTIVATIONS = ("g", "identity", "tanh")


def check_options(op: str, num_layers: int, D: int, per: int, dropout: float, activation: str, hx: Any, weights: Any) -> None:
    """Check the options and the number of the weights."""
    if num_layers < 1:
        raise ValueError(f"{op}: num_layers={num_layers}; there must be at least one")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{op}: dropout={dropout}; it must be between 0 and 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation={activation!r} is not known; choose from {', '.join(map(repr, ACTIVATIONS))}")
    if hx is not None and not isinstance(hx, Tensor):
        raise TypeError(f"{op}: hx must be one tensor, h_0, or None; not {type(hx).__name__}")
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"{op}: weights must be a list of tensors, not {type(weights).__name__}")
    if len(weights) != num_layers * D * per:
        raise ValueError(
            f"{op}: weights has {len(weights)} tensors; {num_layers} layers in {D} directions, with "
            f"{'weight_ih, bias_ih' if per == 2 else 'weight_ih'} each, need {num_layers * D * per}"
        )


def check(op: str, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor], L: int, D: int, per: int, batch_first: bool) -> int:
    """Check every tensor's rank, size, dtype and device, before any work; the hidden size."""
    G, batched = BLOCKS[op], x.dim() == 3
    if x.dim() not in (2, 3):
        lead = "(B, T, I)" if batch_first else "(T, B, I)"
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}, which is {x.dim()} dimensions; it needs {lead} or (T, I)")
    check_floating(op, "weight_ih_l0", weights[0])
    if weights[0].dim() != 2 or weights[0].shape[0] % G:
        raise ValueError(f"{op}: weight_ih_l0 has shape {tuple(weights[0].shape)}; it needs ({G}·H, I)")
    H = weights[0].shape[0] // G
    for k, w in enumerate(weights):
        layer, d = k // per // D, k // per % D
        name = f"{('weight_ih', 'bias_ih')[k % per]}_l{layer}" + "_reverse" * d
        check_floating(op, name, w)
        check_alike(op, "input", x, name, w)
        wanted: tuple[Any, ...] = (G * H,) if k % per else (G * H, D * H if layer else x.shape[-1])
        if tuple(w.shape) != wanted:
            raise ValueError(f"{op}: {name} has shape {tuple(w.shape)}; with input {tuple(x.shape)} it needs {wanted}")
    if x.shape[1 if batch_first and batched else 0] == 0:
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}: Expected sequence length to be larger than 0 in RNN")
    if h0 is not None:
        check_floating(op, "h_0", h0)
        check_alike(op, "input", x, "h_0", h0)
        wanted = (L * D, x.shape[0 if batch_first else 1], H) if batched else (L * D, H)
        if tuple(h0.shape) != wanted:
            raise ValueError(f"{op}: h_0 has shape {tuple(h0.shape)}; with input {tuple(x.shape)} it needs {wanted}")
    return H
