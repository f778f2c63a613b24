"""Dropout, the residual sum and the normalization, fused. For the maths see the op of this name, for the kernels `norms`.

The mask is computed where it is used, in forward and in backward, from the seed.
"""

from __future__ import annotations

from torch import Tensor

from bptoolkit.ops import dropout_add_norm
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel
from bptoolkit.triton_kernels.layer_norm import gradients, outputs, run_backward, run_forward, shaped, too_long
from bptoolkit.triton_kernels.norms import compilations
from bptoolkit.triton_kernels.operator import operator


def _launch_forward(
    x: Tensor, a: Tensor, w: Tensor | None, b: Tensor | None, z: Tensor, p: float, D: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mean, rstd = _fake_forward(x, a, w, b, z, p, D, eps)
    run_forward(x, w, b, D, eps, y=y, s=s, mean=mean, rstd=rstd, a=a, seed=z, p=p)
    return y, s, mean, rstd


def _fake_forward(x, a, w, b, z, p, D, eps):
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
    z: Tensor | None,
    p: float,
    D: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, da, dw, db = _fake_backward(dy, ds, dm, dr, s, w, m, r, z, p, D, need)
    run_backward(dy, dm, dr, s, w, r, D, dx=dx, dw=dw, db=db, mean=m, ds=ds, da=da, seed=z, p=p)
    return dx, da, dw, db


def _fake_backward(dy, ds, dm, dr, s, w, m, r, z, p, D, need):
    return tuple(gradients(s, D, need[:2], need[2:]))


def _launch_rms_forward(
    x: Tensor, a: Tensor, w: Tensor | None, z: Tensor, p: float, D: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, s, rstd = _fake_rms_forward(x, a, w, z, p, D, eps)
    run_forward(x, w, None, D, eps, y=y, s=s, rstd=rstd, a=a, seed=z, p=p)
    return y, s, rstd


def _fake_rms_forward(x, a, w, z, p, D, eps):
    return tuple(outputs(x, D, 2, 1))


def _launch_rms_backward(
    dy: Tensor | None,
    ds: Tensor | None,
    dr: Tensor | None,
    s: Tensor,
    w: Tensor | None,
    r: Tensor,
    z: Tensor | None,
    p: float,
    D: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, dw = _fake_rms_backward(dy, ds, dr, s, w, r, z, p, D, need)
    run_backward(dy, None, dr, s, w, r, D, dx=dx, dw=dw, ds=ds, da=da, seed=z, p=p)
    return dx, da, dw


def _fake_rms_backward(dy, ds, dr, s, w, r, z, p, D, need):
    return tuple(gradients(s, D, need[:2], need[2:]))


FORWARD = operator("triton_dropout_add_layer_norm", _launch_forward, _fake_forward)
BACKWARD = operator("triton_dropout_add_layer_norm_backward", _launch_backward, _fake_backward)
RMS_FORWARD = operator("triton_dropout_add_rms_norm", _launch_rms_forward, _fake_rms_forward)
RMS_BACKWARD = operator("triton_dropout_add_rms_norm_backward", _launch_rms_backward, _fake_rms_backward)


def forward(x, a, w, b, z, p, D, eps):
    return FORWARD(x, a, w, b, z, p, D, eps)


def backward(dy, ds, dm, dr, s, w, b, m, r, z, p, D, need):
    if (dy is None and dm is None and dr is None) or not (
        need.x or need.a or need.w
    ):  # little to fuse; s may not have been kept
        return dropout_add_norm.backward(dy, ds, dm, dr, s, w, b, m, r, z, p, D, need)
    dx, da, dw, db = BACKWARD(dy, ds, dm, dr, s, w, m, r, z, p, D, list(need[:4]))
    return dx if need.x else None, da if need.a else None, shaped(dw, w, need.w), shaped(db, b, need.b), None


def rms_forward(x, a, w, z, p, D, eps):
    return RMS_FORWARD(x, a, w, z, p, D, eps)


def rms_backward(dy, ds, dr, s, w, r, z, p, D, need):
    if dy is None and dr is None:
        return dropout_add_norm.rms_backward(dy, ds, dr, s, w, r, z, p, D, need)
    dx, da, dw = RMS_BACKWARD(dy, ds, dr, s, w, r, z, p, D, list(need[:3]))
    return dx if need.x else None, da if need.a else None, shaped(dw, w, need.w), None


def unsupported(
    x: Tensor, a: Tensor, w: Tensor | None, b: Tensor | None, z: Tensor, p: float, D: int, eps: float
) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


def rms_unsupported(x: Tensor, a: Tensor, w: Tensor | None, z: Tensor, p: float, D: int, eps: float) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


LAYER = Kernel(forward, backward, unsupported)
RMS = Kernel(rms_forward, rms_backward, rms_unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations."""
    layer = compilations("dropout_add_layer_norm", warp, centred=True, added=True, dropout=True)
    return layer + compilations("dropout_add_rms_norm", warp, centred=False, added=True, dropout=True)
