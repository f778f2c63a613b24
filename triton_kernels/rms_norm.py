"""Root-mean-square normalization, fused. For the maths see the op of this name, for the kernels `norms`."""

from __future__ import annotations

from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel
from bptoolkit.triton_kernels.norm_operators import FORWARD, gradients, too_long
from bptoolkit.triton_kernels.norms import compilations


def forward(x, w, D, eps):
    y, _, _, r = FORWARD(x, None, None, w, None, 0.0, D, eps, False)
    return y, r


def backward(dy, dr, x, w, r, D, need):
    dx, _, dw, _ = gradients(dy, None, None, dr, x, w, None, None, r, None, 0.0, D, (need.x, False, need.w, False))
    return dx, dw


def unsupported(x, w, D, eps) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations."""
    return compilations("rms_norm", warp, centred=False)
