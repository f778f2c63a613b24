"""The residual sum and the normalization after it, fused. For the maths see the op of this name, for the kernels `norms`.

The sum is written as it is normalized; backward adds what flows into it to what flows through the normalization.
"""

from __future__ import annotations

from bptoolkit.ops import add_norm
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel
from bptoolkit.triton_kernels.norm_operators import FORWARD, gradients, too_long
from bptoolkit.triton_kernels.norms import compilations


def forward(x, a, w, b, D, eps):
    return FORWARD(x, a, None, w, b, 0.0, D, eps, True)


def backward(dy, ds, dm, dr, s, w, b, m, r, D, need):
    summand = need.x or need.a
    if (dy is None and dm is None and dr is None) or not (summand or need.w):  # nothing to fuse; s may not have been kept
        return add_norm.backward(dy, ds, dm, dr, s, w, b, m, r, D, need)
    dx, _, dw, db = gradients(dy, ds, dm, dr, s, w, b, m, r, None, 0.0, D, (summand, False, need.w, need.b))
    return dx, dx, dw, db


def rms_forward(x, a, w, D, eps):
    y, s, _, r = FORWARD(x, a, None, w, None, 0.0, D, eps, False)
    return y, s, r


def rms_backward(dy, ds, dr, s, w, r, D, need):
    if dy is None and dr is None:
        return add_norm.rms_backward(dy, ds, dr, s, w, r, D, need)
    wanted = (need.x or need.a, False, need.w, False)
    dx, _, dw, _ = gradients(dy, ds, None, dr, s, w, None, None, r, None, 0.0, D, wanted)
    return dx, dx, dw


def unsupported(x, a, w, b, D, eps) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


def rms_unsupported(x, a, w, D, eps) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


LAYER = Kernel(forward, backward, unsupported)
RMS = Kernel(rms_forward, rms_backward, rms_unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations."""
    layer = compilations("add_layer_norm", warp, centred=True, added=True)
    return layer + compilations("add_rms_norm", warp, centred=False, added=True)
