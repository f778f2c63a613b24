"""Layer normalization, fused. For the maths see the op of this name, for the kernels `norms`."""

from __future__ import annotations

from bptoolkit.ops.layer_norm import RULE
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel
from bptoolkit.triton_kernels.norm_operators import FORWARD, gradients, too_long
from bptoolkit.triton_kernels.norms import compilations


def forward(x, w, b, D, eps):
    y, _, m, r = FORWARD(x, None, None, w, b, 0.0, D, eps, True)
    return y, m, r


def backward(dy, dm, dr, x, w, b, m, r, D, need):
    if not (need.x or need.w):
        return RULE.backward(dy, dm, dr, x, w, b, m, r, D, need)  # x has not been kept
    dx, _, dw, db = gradients(dy, None, dm, dr, x, w, b, m, r, None, 0.0, D, (need.x, False, need.w, need.b))
    return dx, dw, db


def unsupported(x, w, b, D, eps) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations."""
    return compilations("layer_norm", warp, centred=True)
