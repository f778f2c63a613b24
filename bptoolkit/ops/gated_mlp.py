"""The gated block of a transformer: two products, a gate, a product, in one node that does not keep what it can compute again.

Maths     g = x W_gᵀ        u = x W_uᵀ        h = f(g) u        y = h W_dᵀ
          dh = dy W_d       dg = dh u f'(g)   du = dh f(g)      each plus what flows into the residual output of its name
          dx = dg W_g + du W_u        dW_g = Σₙ dgₙᵀ xₙ         dW_u = Σₙ duₙᵀ xₙ         dW_d = Σₙ dyₙᵀ hₙ
Letters   x (*B, I); g, u, h (*B, H); y (*B, O); n runs over all of *B; W_g, W_u (H, I) and W_d (O, H), wg, wu and wd in the
          code; f an activation, see activation.py; g and u are residual outputs, hidden by the public function; dt is the
          gradient of the loss by t
Numerics  kept are x, g and u, of which f(g) and h are made again: autograd keeps those two besides; half tensors: products as
          `linear` has them, h, dg and du computed in float32 and rounded once; a relu that is off blocks any cotangent
Source    Shazeer, arXiv 2002.05202, eq. 6; Touvron et al., "LLaMA", arXiv 2302.13971, §2.2
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.blocks import by_elements
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops.bias_activation import FUNCTIONS, chain, check_activation
from bptoolkit.ops.gated import gated_forward
from bptoolkit.ops.linear import rows
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

GATES = {name: FUNCTIONS[name] for name in ("silu", "gelu", "gelu_tanh", "relu")}


def forward(x, wg, wu, wd, activation):
    g, u = F.linear(x, wg), F.linear(x, wu)  # *B H
    return F.linear(gated_forward(GATES[activation], g, u), wd), g, u


def backward(dy, dg, du, x, wg, wu, wd, g, u, activation, need):
    return gradients(elementwise, dy, dg, du, x, wg, wu, wd, g, u, activation, need)


def gradients(elementwise, dy, dg, du, x, wg, wu, wd, g, u, activation, need):
    """The products around the elementwise part, which is given."""
    wanted = need.x or need.wg, need.x or need.wu, need.wd and dy is not None
    dh = dy @ wd if dy is not None and (wanted[0] or wanted[1]) else None  # *B H
    dg, du, h = elementwise(dh, dg, du, g, u, activation, wanted)  # *B H
    dx = None
    if need.x:
        dx = None if dg is None else rows(dg) @ wg  # N I
        if du is not None:
            dx = rows(du) @ wu if dx is None else torch.addmm(dx, rows(du), wu)
        dx = None if dx is None else dx.reshape(*g.shape[:-1], wg.shape[1])  # *B I; x need not have been kept
    dwg = rows(dg).mT @ rows(x) if need.wg and dg is not None else None  # H I
    dwu = rows(du).mT @ rows(x) if need.wu and du is not None else None  # H I
    return dx, dwg, dwu, rows(dy).mT @ rows(h) if wanted[2] else None


def elementwise(dh, cg, cu, g, u, activation, wanted):
    """Dg, du and h, those that are wanted; cg and cu are what flows into g and u. Without a dh there is nothing to add to."""
    dg, du, h = cg, cu, None
    if dh is not None and wanted[0]:

        def by_gate(g, u, dh, *c):
            return plus(chain(wide(dh) * wide(u), wide(g), activation), *c).to(g.dtype)

        dg = by_elements(by_gate, g, u, dh, *(() if cg is None else (cg,)))
    if dh is not None and wanted[1]:

        def by_up(g, dh, *c):
            return plus(wide(dh) * GATES[activation](wide(g)), *c).to(g.dtype)

        du = by_elements(by_up, g, dh, *(() if cu is None else (cu,)))
    if wanted[2]:
        h = gated_forward(GATES[activation], g, u)
    return dg, du, h


def plus(t, *c):
    return t + wide(c[0]) if c else t


def kernel():
    from bptoolkit.triton_kernels.gated_mlp import KERNEL

    return KERNEL


RULE = Rule(
    "gated_mlp",
    forward,
    backward,
    inputs="x wg wu wd",
    outputs="y g u",
    uses={"x": "wg wu wd g u", "wg": "x wd g u", "wu": "x wd g", "wd": "g u"},
    kernel=kernel,
)


def gated_mlp(
    input: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, activation: str = "silu", *, backend: str = "auto"
) -> Tensor:
    """y = (f(x W_gᵀ) · x W_uᵀ) W_dᵀ, keeping x and the two products for backward.

    Args:
        input: (*B, I), floating point.
        w_gate: (H, I), of the input's dtype.
        w_up: (H, I), likewise.
        w_down: (O, H), likewise.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`. The products are torch's in any case.

    Returns:
        (*B, O), of the input's dtype.

    Raises:
        TypeError: the tensors are not of one floating-point dtype.
        ValueError: shapes or devices disagree, the activation is not known, or the named backend cannot run the call.
    """
    input, w_gate, w_up, w_down = OP.cast(input, w_gate, w_up, w_down)
    for name, t in (("w_gate", w_gate), ("w_up", w_up), ("w_down", w_down)):
        check_floating("gated_mlp", name, t)
    OP.check(input, w_gate, w_up, w_down)
    check_activation("gated_mlp", activation, GATES)
    args = (input, w_gate, w_up, w_down, activation)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


def reference(input, w_gate, w_up, w_down, activation="silu"):
    g, u = F.linear(input, w_gate), F.linear(input, w_up)
    f = F.gelu(g, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(g)
    return F.linear(f * u, w_down)


def case(draw: Draw) -> Case:
    I, H, O = draw.size(), draw.size(), draw.size()
    x, *w = draw.tensor(*draw.batch(), I), *(draw.tensor(H, I, scale=max(I, 1) ** -0.5) for _ in range(2))
    kwargs = {"activation": draw.choice(tuple(GATES))} if draw.flag() else {}
    return Case((x, *w, draw.tensor(O, H, scale=max(H, 1) ** -0.5)), kwargs)


def bench(draw: Draw) -> Case:
    w = (draw.tensor(688, 256, scale=1 / 16) for _ in range(2))
    return Case((draw.tensor(16, 128, 256), *w, draw.tensor(256, 688, scale=688**-0.5)), {})


OP = Op(
    name="gated_mlp",
    call=gated_mlp,
    reference=reference,
    rules=(RULE,),
    shapes="input: *B I, w_gate: H I, w_up: H I, w_down: O H -> *B O",
    source="Shazeer 2020, eq. 6",
    autocast=LOW,
    case=case,
    bench=bench,
)
OPS = (OP,)
