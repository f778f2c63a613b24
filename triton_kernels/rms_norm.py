"""Root-mean-square normalization, fused. For the maths see the op of this name, for the kernels `norms`."""

from __future__ import annotations

from torch import Tensor

from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel
from bptoolkit.triton_kernels.layer_norm import gradients, outputs, run_backward, run_forward, shaped, too_long
from bptoolkit.triton_kernels.norms import compilations
from bptoolkit.triton_kernels.operator import operator


def _launch_forward(x: Tensor, w: Tensor | None, D: int, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = _fake_forward(x, w, D, eps)
    run_forward(x, w, None, D, eps, y=y, rstd=rstd)
    return y, rstd


def _fake_forward(x, w, D, eps):
    return tuple(outputs(x, D, 1, 1))


def _launch_backward(
    dy: Tensor | None, dr: Tensor | None, x: Tensor, w: Tensor | None, r: Tensor, D: int, need: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dw = _fake_backward(dy, dr, x, w, r, D, need)
    run_backward(dy, None, dr, x, w, r, D, dx=dx, dw=dw)
    return dx, dw


def _fake_backward(dy, dr, x, w, r, D, need):
    return tuple(gradients(x, D, need[:1], need[1:]))


FORWARD = operator("triton_rms_norm", _launch_forward, _fake_forward)
BACKWARD = operator("triton_rms_norm_backward", _launch_backward, _fake_backward)


def forward(x, w, D, eps):
    return FORWARD(x, w, D, eps)


def backward(dy, dr, x, w, r, D, need):
    dx, dw = BACKWARD(dy, dr, x, w, r, D, list(need))
    return dx if need.x else None, shaped(dw, w, need.w)


def unsupported(x: Tensor, w: Tensor | None, D: int, eps: float) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations."""
    return compilations("rms_norm", warp, centred=False)
