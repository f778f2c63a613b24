"""Dropout, the residual sum and the normalization, fused. For the maths see the op of this name, for the kernels `norms`.

The mask is computed where it is used, in forward and in backward, from the seed.
"""

from __future__ import annotations

from bptoolkit.ops import dropout_add_norm
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel
from bptoolkit.triton_kernels.norm_operators import FORWARD, gradients, too_long
from bptoolkit.triton_kernels.norms import compilations


def forward(x, a, w, b, z, p, D, eps):
    return FORWARD(x, a, z, w, b, p, D, eps, True)


def backward(dy, ds, dm, dr, s, w, b, m, r, z, p, D, need):
    if (dy is None and dm is None and dr is None) or not any(need[:3]):  # little to fuse; s may not have been kept
        return dropout_add_norm.backward(dy, ds, dm, dr, s, w, b, m, r, z, p, D, need)
    return *gradients(dy, ds, dm, dr, s, w, b, m, r, z, p, D, need[:4]), None


def rms_forward(x, a, w, z, p, D, eps):
    y, s, _, r = FORWARD(x, a, z, w, None, p, D, eps, False)
    return y, s, r


def rms_backward(dy, ds, dr, s, w, r, z, p, D, need):
    if dy is None and dr is None:
        return dropout_add_norm.rms_backward(dy, ds, dr, s, w, r, z, p, D, need)
    dx, da, dw, _ = gradients(dy, ds, None, dr, s, w, None, None, r, z, p, D, (*need[:3], False))
    return dx, da, dw, None


def unsupported(x, a, w, b, z, p, D, eps) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


def rms_unsupported(x, a, w, z, p, D, eps) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


LAYER = Kernel(forward, backward, unsupported)
RMS = Kernel(rms_forward, rms_backward, rms_unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations."""
    layer = compilations("dropout_add_layer_norm", warp, centred=True, added=True, dropout=True)
    return layer + compilations("dropout_add_rms_norm", warp, centred=False, added=True, dropout=True)
