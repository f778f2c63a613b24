"""The second order of backpropagation through time, in segments: Hessian-vector products in memory that grows with √T.

Maths     backward is ∇φ of φ(p) = ⟨dy, y(p)⟩ + ⟨dcₙ, cₙ(p)⟩, p the initial states, x and the weights. Its vjp at a cotangent v:
          by p          ∇²φ v = d/dε ∇φ(p + εv) at ε = 0, since a Hessian is symmetric
          by dy, dcₙ    d/dε y(p + εv)    d/dε cₙ(p + εv)
          So one pass forward with tangents along v, and one back with tangents, give all of it; and the jvp of backward along
          (ddy, ddcₙ, v) is the same for v, and backward itself at (ddy, ddcₙ), in which it is linear.
Letters   see `bptt_run`; K = ⌈√T⌉ steps in a segment
Saving    states and their tangents at the ends of the segments; a segment is run again before it is gone back over
Source    Pearlmutter 1994 (the R-operator); Chen et al., arXiv 1604.06174 (segments)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.ops.bptt_pieces import Core, Job, added, go_back
from bptoolkit.ops.recurrent import within

Pair = tuple[Any, Any]  # a value and its tangent; each may be None


def symmetric(s: Tensor | None, k1: int, cut: bool) -> bool:
    """Whether backward is the gradient of something: not where paths are cut."""
    return s is None and not k1 and not cut


def along(f: Callable[..., Any], values: Sequence[Any], tangents: Sequence[Any]) -> list[Pair]:
    """The outputs of f, and their tangents. A value or an output may be None; a tangent of None is zero."""
    at = [k for k, t in enumerate(tangents) if t is not None]
    there: list[int] = []

    def of_moving(*moving: Tensor) -> tuple[Tensor, ...]:
        filled = list(values)
        for k, t in zip(at, moving):
            filled[k] = t
        out = f(*filled)
        there[:] = [k for k, t in enumerate(out) if t is not None]
        pairs[:] = [(None, None)] * len(out)
        return tuple(out[k] for k in there)

    pairs: list[Pair] = []
    found = torch.func.jvp(of_moving, tuple(values[k] for k in at), tuple(tangents[k] for k in at))
    for k, value, tangent in zip(there, *found):
        pairs[k] = value, tangent
    return pairs


def in_segments(
    core: Core, v: Sequence[Any], need: Any, outputs: bool, job: Job, dy: Tensor, dcn: Any, h0: Any, c0: Any
) -> tuple[Any, ...]:
    """The vjp of backward at the cotangents v of x, h0, c0 and the weights.

    Args:
        need: what of x, h0, c0, wi, wh, b, bh, wr is wanted, as go_back takes it.
        outputs: whether those of dy and dcn are wanted.
        job: the layer; its x is zero past the lengths.

    Returns:
        The gradients of dy, dcn, x, h0, c0, and of the weights.
    """
    T, weights, reverse = job.x.shape[0], job.weights, job.reverse
    vx, vh, vc, *vw = v
    vx = within(vx, job.lengths)
    K = isqrt(max(T - 1, 0)) + 1
    edges = [(lo, min(lo + K, T)) for lo in range(0, T, K)]

    def part(x: Tensor, w: Sequence[Any], n: Any) -> Job:
        return Job(core, x, tuple(w), n, reverse, None, False)

    def steps(x: Tensor, h: Any, c: Any, w: Sequence[Any], n: Any) -> tuple[Any, Any, Any]:
        return core.loop(F.linear(x, w[0], w[2]), h, c, w[1], w[3], w[4], n, None, reverse, False)

    starts: list[tuple[Pair, Pair]] = []
    h, c, ty = (h0, vh), (c0, vc), torch.zeros_like(dy) if outputs else None
    for lo, hi in edges:
        starts.append((h, c))
        if hi == T and not outputs:
            break
        place, n = job.at(lo, hi)

        def forward(x: Any, h: Any, c: Any, *w: Any, n: Any = n, size: int = hi - lo) -> tuple[Any, Any, Any]:
            y, cs, _ = steps(x, h, c, w, n)
            return (y, *part(x, w, n).end(0, size, h, c, y, cs))

        tangents = (vx if vx is None else vx[place], h[1], c[1], *vw)
        (_, t), h, c = along(forward, (job.x[place], h[0], c[0], *weights), tangents)
        if ty is not None:
            ty[place] = t
    tcn, dh, dc = c[1], (None, None), (dcn, None)
    gx, gw = torch.zeros_like(job.x) if need.x else None, [None] * 5
    for lo, hi in reversed(edges):
        h, c = starts.pop()
        place, n = job.at(lo, hi)

        def back(x: Any, h: Any, c: Any, dh: Any, dc: Any, *w: Any, n: Any = n, hi: int = hi - lo, at: Any = place) -> Any:
            dx, dh, dc, dw = go_back(part(x, w, n), need, False, 0, hi, h, c, steps(x, h, c, w, n), dy[at], dh, dc)
            return dh, dc, dx, *dw

        tangents = (vx if vx is None else vx[place], h[1], c[1], dh[1], dc[1], *vw)
        dh, dc, (_, t), *more = along(back, (job.x[place], h[0], c[0], dh[0], dc[0], *weights), tangents)
        if gx is not None:
            gx[place] = t
        gw[:] = [added(g, t) for g, (_, t) in zip(gw, more)]
    return ty, tcn, gx, dh[1], dc[1], *gw
