"""Two linear layers, fused between their products: du, h and the sums for db₁ in one pass. For the maths see the op of
this name.

Forward has nothing to fuse: the bias is added by the product, and the activation is one pass. Backward is the kernel of
`bias_activation`, here with the output written once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptoolkit.ops import mlp as eager
from bptoolkit.ops.linear import rows
from bptoolkit.triton_kernels import bias_activation
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.operator import operator


def _launch_backward(dh: Tensor, cu: Tensor | None, u: Tensor, name: str, need: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    du, h, _ = _fake_backward(dh, cu, u, name, need)
    out = (du if need[0] else None, h if need[1] else None)
    return du, h, bias_activation.backward_into(rows(dh), rows(u), None, dense(cu), *out, need[2], name)


def _fake_backward(dh, cu, u, name, need):
    du, h = (torch.empty(u.shape if n else (0,), dtype=u.dtype, device=u.device) for n in need[:2])
    return du, h, torch.empty((u.shape[-1] if need[2] else 0,), dtype=torch.float32, device=u.device)


BACKWARD = operator("triton_mlp_backward", _launch_backward, _fake_backward)


def forward(x, w1, b1, w2, b2, activation):
    return eager.forward(x, w1, b1, w2, b2, activation)


def backward(dy, du, x, w1, w2, u, activation, need):
    return eager.gradients(elementwise, dy, du, x, w1, w2, u, activation, need)


def elementwise(dh, cu, u, activation, wanted):
    """As the eager rule's, which has nothing to fuse where no dh flows into h."""
    if dh is None:
        return eager.elementwise(dh, cu, u, activation, wanted)
    du, h, db1 = BACKWARD(dh, cu, u, activation, list(wanted))
    return du if wanted[0] else None, h if wanted[1] else None, db1.to(u.dtype) if wanted[2] else None


def unsupported(x: Tensor, *others: object) -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The backward at the shipped configurations: short rows, several to a tile; common rows; second order."""
    every = []
    for t in ("bf16", "fp32"):
        for name, N, more in (
            *((name, 4096, ()) for name in ("gelu", "gelu_tanh", "silu", "relu")),
            ("gelu", 64, ()),
            ("gelu", 4096, ("c",)),
        ):
            label = f"mlp backward {name}{' second order' if more else ''} {N} {t}"
            every.append(bias_activation.backward_spec(label, name, N, t, warp, given=("y", *more)))
    return every
