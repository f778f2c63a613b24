"""The gated block, fused between its products: h in one pass, and dg, du and h in one. For the maths see the op of this name.

The products are torch's; the kernels are those of `gated`, here with the output written once more in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.ops.gated_mlp import gradients
from bptoolkit.triton_kernels import gated
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementwise import matrices, tile
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.operator import operator


def _launch_backward(
    dh: Tensor, cg: Tensor | None, cu: Tensor | None, g: Tensor, u: Tensor | None, name: str, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dg, du, h = out = _fake_backward(dh, cg, cu, g, u, name, need)
    if g.numel():
        M, N, inputs = matrices(dh, g, u)
        outputs = [t if n else None for t, n in zip(out, need)]
        gated.launch_backward(inputs, (dense(cg), dense(cu)), outputs, N, M, N, name)
    return dg, du, h


def _fake_backward(dh, cg, cu, g, u, name, need):
    dg, du, h = (torch.empty(g.shape if n else (0,), dtype=g.dtype, device=g.device) for n in need)
    return dg, du, h


BACKWARD = operator("triton_gated_mlp_backward", _launch_backward, _fake_backward)


def forward(x, wg, wu, wd, activation):
    g, u = F.linear(x, wg), F.linear(x, wu)  # *B H
    return F.linear(gated.FORWARD(g, u, activation), wd), g, u


def backward(dy, dg, du, x, wg, wu, wd, g, u, activation, need):
    return gradients(elementwise, dy, dg, du, x, wg, wu, wd, g, u, activation, need)


def elementwise(dh, cg, cu, g, u, activation, wanted):
    """As the eager rule's."""
    if dh is None:
        return cg, cu, gated.FORWARD(g, u, activation) if wanted[2] else None
    return gated.wanted(BACKWARD(dh, cg, cu, g, u, activation, list(wanted)), wanted)


def unsupported(x: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, activation: str) -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The backward at the shipped configurations: dg, du and h, at first and at second order."""
    every = []
    for t in ("bf16", "fp32"):
        for name, more in (("silu", ()), ("gelu", ()), ("gelu_tanh", ()), ("relu", ()), ("silu", ("ca", "cb"))):
            BM, BN, warps = tile(1, 1 << 20, warp)
            pointers = dict.fromkeys(("dy", "a", "b", "da", "db", "y", *more), f"*{t}")
            rows = ("dym", "am", "bm", "om")
            constants = {"dyn": 1, "an": 1, "bn": 1, "ca": None, "cb": None, "NAME": name, "BM": BM, "BN": BN}
            label = f"gated_mlp backward {name}{' second order' if more else ''} {t}"
            types = pointers | dict.fromkeys((*rows, "M", "N"), "i32")
            every.append(Spec(label, gated.backward_kernel, types, constants, (*pointers, *rows, "N"), warps))
    return every
