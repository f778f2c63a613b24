"""Targets of class indices: their checks, and what losses make of them, the ignored index included."""

from __future__ import annotations

import torch
from torch import Tensor

from bptoolkit.precision import wide
from bptoolkit.shapes import check_alike, check_floating


def at_index(x, w, k, ignore):
    """The index, 0 where it is the ignored one; where it is not; the weight of its class, 0 where it is. N *D each."""
    counts = k != ignore
    k = torch.where(counts, k, 0)
    wk = wide(counts.to(x.dtype)) if w is None else torch.where(counts, wide(w)[k], 0)
    return k, counts, wk


def check_classes(op: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None) -> bool:
    """Raise for arguments that disagree; whether the target is of class indices."""
    check_floating(op, "input", input)
    if input.dim() == 0:
        raise ValueError(f"{op}: input has no dimensions; it needs (C), (N C) or (N C *D)")
    C = input.shape[0 if input.dim() == 1 else 1]
    if C == 0:
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}, which has no classes")
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, not {type(target).__name__}")
    if target.device != input.device:
        raise ValueError(f"{op}: target is on {target.device} but input is on {input.device}")
    if weight is not None:
        check_floating(op, "weight", weight)
        check_alike(op, "input", input, "weight", weight)
        if weight.shape != (C,):
            raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; input {tuple(input.shape)} has C={C} classes")
    if target.dtype.is_floating_point:
        check_alike(op, "input", input, "target", target)
        if target.shape != input.shape:
            raise ValueError(
                f"{op}: target of class probabilities has shape {tuple(target.shape)} but input {tuple(input.shape)}"
            )
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError(f"{op}: ignore_index={ignore_index} goes with class indices, not with probabilities")
        return False
    if target.dtype != torch.int64 and target.dtype != torch.uint8:
        raise TypeError(f"{op}: target is {target.dtype}; class indices must be int64 or uint8, probabilities {input.dtype}")
    wanted = () if input.dim() == 1 else (input.shape[0], *input.shape[2:])
    if target.shape != wanted:
        raise ValueError(
            f"{op}: target of class indices has shape {tuple(target.shape)}; input {tuple(input.shape)} needs {tuple(wanted)}"
        )
    if type(target) is Tensor and target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        _check_range(op, target, C, ignore_index)
    return True


def _check_range(op: str, target: Tensor, C: int, ignore_index: int | None) -> None:
    """Raise for an index that is no class; looks at values, so only where nothing transforms or traces."""
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return
    low, high = (int(v) for v in torch.aminmax(target))
    if low >= 0 and high < C:
        return
    wrong = target[((target < 0) | (target >= C)) & (target != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"{op}: target holds {int(wrong.flatten()[0])}, which is no class of 0..{C - 1} and not ignore_index={ignore_index}"
        )
