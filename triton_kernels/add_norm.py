"""The residual sum and the normalization after it, fused. For the maths see the op of this name, for the kernels `norms`.

The sum is written as it is normalized; backward adds what flows into it to what flows through the normalization.
"""

from __future__ import annotations

from torch import Tensor

from bptoolkit.ops import add_norm
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel
from bptoolkit.triton_kernels.layer_norm import gradients, outputs, run_backward, run_forward, shaped, too_long
from bptoolkit.triton_kernels.norms import compilations
from bptoolkit.triton_kernels.operator import operator


def _launch_forward(
    x: Tensor, a: Tensor, w: Tensor | None, b: Tensor | None, D: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mean, rstd = _fake_forward(x, a, w, b, D, eps)
    run_forward(x, w, b, D, eps, y=y, s=s, mean=mean, rstd=rstd, a=a)
    return y, s, mean, rstd


def _fake_forward(x, a, w, b, D, eps):
    return tuple(outputs(x, D, 2, 2))


def _launch_backward(
    dy: Tensor | None,
    ds: Tensor | None,
    dm: Tensor | None,
    dr: Tensor | None,
    s: Tensor,
    w: Tensor | None,
    m: Tensor,
    r: Tensor,
    D: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = _fake_backward(dy, ds, dm, dr, s, w, m, r, D, need)
    run_backward(dy, dm, dr, s, w, r, D, dx=dx, dw=dw, db=db, mean=m, ds=ds)
    return dx, dw, db


def _fake_backward(dy, ds, dm, dr, s, w, m, r, D, need):
    return tuple(gradients(s, D, need[:1], need[1:]))


def _launch_rms_forward(x: Tensor, a: Tensor, w: Tensor | None, D: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, s, rstd = _fake_rms_forward(x, a, w, D, eps)
    run_forward(x, w, None, D, eps, y=y, s=s, rstd=rstd, a=a)
    return y, s, rstd


def _fake_rms_forward(x, a, w, D, eps):
    return tuple(outputs(x, D, 2, 1))


def _launch_rms_backward(
    dy: Tensor | None,
    ds: Tensor | None,
    dr: Tensor | None,
    s: Tensor,
    w: Tensor | None,
    r: Tensor,
    D: int,
    need: list[bool],
) -> tuple[Tensor, Tensor]:
    dx, dw = _fake_rms_backward(dy, ds, dr, s, w, r, D, need)
    run_backward(dy, None, dr, s, w, r, D, dx=dx, dw=dw, ds=ds)
    return dx, dw


def _fake_rms_backward(dy, ds, dr, s, w, r, D, need):
    return tuple(gradients(s, D, need[:1], need[1:]))


FORWARD = operator("triton_add_layer_norm", _launch_forward, _fake_forward)
BACKWARD = operator("triton_add_layer_norm_backward", _launch_backward, _fake_backward)
RMS_FORWARD = operator("triton_add_rms_norm", _launch_rms_forward, _fake_rms_forward)
RMS_BACKWARD = operator("triton_add_rms_norm_backward", _launch_rms_backward, _fake_rms_backward)


def forward(x, a, w, b, D, eps):
    return FORWARD(x, a, w, b, D, eps)


def backward(dy, ds, dm, dr, s, w, b, m, r, D, need):
    summand = need.x or need.a
    if (dy is None and dm is None and dr is None) or not (summand or need.w):  # nothing to fuse; s may not have been kept
        return add_norm.backward(dy, ds, dm, dr, s, w, b, m, r, D, need)
    dx, dw, db = BACKWARD(dy, ds, dm, dr, s, w, m, r, D, [summand, need.w, need.b])
    dx = dx if summand else None
    return dx, dx, shaped(dw, w, need.w), shaped(db, b, need.b)


def rms_forward(x, a, w, D, eps):
    return RMS_FORWARD(x, a, w, D, eps)


def rms_backward(dy, ds, dr, s, w, r, D, need):
    summand = need.x or need.a
    if dy is None and dr is None:
        return add_norm.rms_backward(dy, ds, dr, s, w, r, D, need)
    dx, dw = RMS_BACKWARD(dy, ds, dr, s, w, r, D, [summand, need.w])
    dx = dx if summand else None
    return dx, dx, shaped(dw, w, need.w)


def unsupported(x: Tensor, a: Tensor, w: Tensor | None, b: Tensor | None, D: int, eps: float) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


def rms_unsupported(x: Tensor, a: Tensor, w: Tensor | None, D: int, eps: float) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


LAYER = Kernel(forward, backward, unsupported)
RMS = Kernel(rms_forward, rms_backward, rms_unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations."""
    layer = compilations("add_layer_norm", warp, centred=True, added=True)
    return layer + compilations("add_rms_norm", warp, centred=False, added=True)
