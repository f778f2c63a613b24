"""Truncated backpropagation through time: which steps a gradient passes, for lstm, gru and rnn.

Maths     (k1, k2)  window w owns the steps w k1 … (w+1) k1 - 1, counted from each row's first, and begins k2 steps before its
                    end. The losses it owns go back to its beginning and no further; windows that begin at h0 reach it
          e-prop    the path h -> Wh h is cut in every step; what a cell carries by itself (c of an LSTM, z h of a GRU) is not
          ARTBP     dsₜ₋₁ = ξₜ (∂sₜ/∂sₜ₋₁)ᵀ dsₜ,  ξₜ = 0 with probability p, else 1/(1 - p): E ξₜ = 1 and the ξₜ are independent
                    of each other and of the states, so the mean of the product of Jacobians is the product: no bias
Letters   see `recurrent`; s the state, h or (h, c); W windows, M steps in each
Meaning   to all orders the op is the plain loop with `detach` where a path is cut: its second derivatives are those of that
          loop, and its forward mode is the transpose of its backward. The states are those of the whole forward pass
Source    (k1, k2): Williams & Peng 1990; e-prop: Bellec et al. 2020; the LSTM of 1997 was trained with that cut;
          ARTBP: Tallec & Ollivier, arXiv 1705.08209
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bptoolkit import randomness


class ARTBP(NamedTuple):
    """Truncation at random points that leaves the gradient unbiased.

    Attributes:
        p: the probability of a cut between two steps of a row, in [0, 1). Pieces are 1/p steps long on average.
        seed: (2,) int32 that the cuts follow from; None draws one from torch's generator in every call.
    """

    p: float
    seed: Tensor | None = None


class Truncation(NamedTuple):
    """A truncation as the rules take it."""

    k1: int = 0  # 0: no windows
    k2: int = 0
    p: float = 0.0
    cut: bool = False  # e-prop


def truncation(op: str, truncate: Any) -> Truncation:
    """What the public argument says.

    Raises:
        ValueError: a number is out of range, or the word is not known.
        TypeError: it is nothing of the kind.
    """
    if truncate is None:
        return Truncation()
    if isinstance(truncate, ARTBP):
        if not 0 <= truncate.p < 1:
            raise ValueError(f"{op}: truncate=ARTBP(p={truncate.p}); the probability of a cut lies in [0, 1)")
        return Truncation(p=float(truncate.p))
    if isinstance(truncate, str):
        if truncate != "eprop":
            raise ValueError(f"{op}: truncate={truncate!r} is not known; choose None, k, (k1, k2), 'eprop' or ARTBP(p)")
        return Truncation(cut=True)
    pair = (truncate, truncate) if type(truncate) is int else truncate
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(type(k) is int for k in pair):
        raise TypeError(f"{op}: truncate={truncate!r} must be None, k, (k1, k2), 'eprop' or ARTBP(p)")
    k1, k2 = pair
    if not 1 <= k1 <= k2:
        raise ValueError(f"{op}: truncate=({k1}, {k2}); it needs 1 <= k1 <= k2")
    return Truncation(k1, k2)


def seeds_of(truncate: Any, like: Tensor, n: int) -> list[Tensor | None]:
    """A seed of cuts for each of n layers and directions; None where nothing is drawn."""
    if not isinstance(truncate, ARTBP) or truncate.p == 0:
        return [None] * n
    if truncate.seed is None:
        return [randomness.draw_seed(like) for _ in range(n)]
    return [truncate.seed.to(like.device) + k for k in range(n)]


def factors(
    seed: Tensor | None, p: float, T: int, B: int, lengths: Tensor | None, reverse: bool, dtype: torch.dtype
) -> Tensor | None:
    """ξ, for the way from each step to the one before it: T B 1; 1 for the way to h0."""
    if seed is None or p == 0:
        return None
    xi = randomness.keep(seed, (T, B), p).to(dtype) / (1 - p)
    steps = torch.arange(T, device=xi.device).unsqueeze(-1)  # T 1
    first = 0 if not reverse else T - 1 if lengths is None else lengths - 1
    return torch.where(steps == first, 1, xi).unsqueeze(-1)


def slack(t: Tensor, xi: Tensor | None = None, cut: bool = False) -> Tensor:
    """t, whose gradient is multiplied by ξ, or cut."""
    if cut:
        return t.detach()
    return t if xi is None else t + (xi - 1) * (t - t.detach())


class Windows(NamedTuple):
    """The windows of (k1, k2) side by side, as one batch of W·B rows of M steps, all in forward direction."""

    rows: Tensor  # M·W·B: which of the T·B rows of a sequence each is
    lengths: Tensor | None  # W·B; None where all windows are whole
    owned: Tensor | None  # M W·B 1: whether the window owns the step and the row has it; None where all are and do
    last: Tensor  # M W B: whether it is the last step of its row, in the window that owns it
    before: Tensor  # W·B: which of the T·B rows of a sequence holds the state that the window starts from
    initial: int  # how many of them start from h0
    W: int
    M: int
    B: int

    def take(self, t: Tensor) -> Tensor:
        """T B · -> M W·B ·; past the windows' lengths, some other step."""
        return t.flatten(0, 1).index_select(0, self.rows).view(self.M, self.W * self.B, t.shape[-1])

    def put(self, t: Tensor, into: Tensor) -> Tensor:
        """Its adjoint, of what is zero past the lengths, added to a sequence: M W·B · -> T B ·."""
        return into.flatten(0, 1).index_add(0, self.rows, t.flatten(0, 1)).view_as(into)

    def starts(self, s0: Tensor, s: Tensor) -> Tensor:
        """The states that the windows start from, cut off from what led to them, but for s0: W·B ·."""
        there = s.detach().flatten(0, 1).index_select(0, self.before).view(self.W, self.B, s.shape[-1])
        return torch.cat([s0.expand(self.initial, *s0.shape), there[self.initial :]]).flatten(0, 1)

    def of_start(self, t: Tensor) -> Tensor:
        """The gradient of s0 from those of the windows' starts: W·B · -> B ·."""
        return t.view(self.W, self.B, t.shape[-1])[: self.initial].sum(0)

    def owned_only(self, t: Tensor) -> Tensor:
        """A cotangent of the windows' steps, M W·B ·, where the window owns the step; else zero."""
        return t if self.owned is None else torch.where(self.owned, t, 0)

    def at_last(self, t: Tensor) -> Tensor:
        """The cotangent of a last state, B ·, at the step that made it: M W·B ·."""
        return torch.where(self.last.unsqueeze(-1), t, 0).flatten(1, 2)


def windows(x: Tensor, k1: int, k2: int, lengths: Tensor | None, reverse: bool, group: int = 0) -> Iterator[Windows]:
    """The windows of a sequence like x, T B ·; so many at a time, or all at once."""
    W = -(-x.shape[0] // k1)
    for lo in range(0, W, group or W):
        yield _windows(x, k1, k2, lengths, reverse, lo, min(W, lo + (group or W)))


def _windows(x: Tensor, k1: int, k2: int, lengths: Tensor | None, reverse: bool, lo: int, hi: int) -> Windows:
    """The windows lo … hi - 1."""
    T, B, device = x.shape[0], x.shape[1], x.device
    M = min(k2, hi * k1)
    n = torch.full((B,), T, device=device) if lengths is None else lengths
    w = torch.arange(lo, hi, device=device)
    begin, end = ((w + 1) * k1 - k2).clamp(min=0), (w + 1) * k1  # W
    step = begin + torch.arange(M, device=device).unsqueeze(-1)  # M W: counted from the row's first
    owned = (step >= w * k1) & (step < end)
    row = torch.arange(B, device=device)

    def place(step: Tensor) -> Tensor:
        at = n - 1 - step.unsqueeze(-1) if reverse else step.unsqueeze(-1).expand(*step.shape, B)
        return (at.clamp(0, T - 1) * B + row).flatten()

    last = owned.unsqueeze(-1) & (step.unsqueeze(-1) == n - 1)
    common = place(begin - 1), max(0, min(hi, k2 // k1) - lo), hi - lo, M, B
    if lengths is None and k1 == k2 and hi * k1 <= T:
        return Windows(place(step), None, None, last, *common)
    inside = (torch.minimum(end.unsqueeze(-1), n) - begin.unsqueeze(-1)).clamp(min=0)  # W B
    there = torch.arange(M, device=device).view(M, 1, 1) < inside
    return Windows(place(step), inside.flatten(), (owned.unsqueeze(-1) & there).view(M, -1, 1), last, *common)
