"""What the tests share: a drawn call as a plain function of the tensors to differentiate by."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bptoolkit import OPS, Op
from bptoolkit.cases import Draw
from bptoolkit.ops import NAMES as FILES

SMALL = (1, 2, 3, 4, 5)


class Call(NamedTuple):
    """One drawn call: `ours(*tensors)` and `reference(*tensors)` return a tuple of the floating-point outputs."""

    ours: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]  # the ones to differentiate by


def draw_call(
    op: Op,
    seed: int,
    *,
    dtype: torch.dtype = torch.float64,
    sizes: Any = SMALL,
    random: Any = None,
    device: str = "cpu",
) -> Call:
    case = op.draw(Draw(random or Random(seed), dtype=dtype, sizes=sizes, device=device))
    leaves, spec = tree_flatten((case.args, case.kwargs))
    where = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]

    def bind(fn: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for k, t in zip(where, tensors):
                filled[k] = t
            args, kwargs = tree_unflatten(filled, spec)
            return floats(fn(*args, **kwargs))

        return call

    return Call(bind(op.call), bind(op.reference), tuple(leaves[k].detach() for k in where))


def floats(out: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.is_floating_point())


def leaves_of(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def random_like(outputs: tuple[Tensor, ...], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs)


def scalar(fn: Callable[..., tuple[Tensor, ...]], seed: int = 0) -> Callable[..., Tensor]:
    """A scalar function with a curvature of its own, so that second derivatives are not zero."""

    def loss(*tensors: Tensor) -> Tensor:
        total = 0.0
        for o in fn(*tensors):  # weights that Dynamo and vmap can trace: no generator
            weights = torch.arange(1, o.numel() + 1, dtype=o.dtype, device=o.device).mul(1.7 + seed).cos().reshape(o.shape)
            total = total + (o.sin() * weights).sum()
        return total  # type: ignore[return-value]

    return loss


NAMES = tuple(OPS)
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
FIRST = tuple(import_module(f"bptoolkit.ops.{file}").OPS[0].name for file in FILES)
SOME = NAMES if LONG else FIRST  # one op a file for what costs a second a test; all of them under `make fuzz`
FEW = NAMES if LONG else FIRST[::3]  # of every third file, for what costs several, and is the work of what all rules share
