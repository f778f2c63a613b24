"""What is asked of functorch: which transforms are active, what they have wrapped, and how arguments pass through them."""

from __future__ import annotations

from typing import Any

import torch

_transforms_active = torch._C._are_functorch_transforms_active
_unwrap = torch._C._functorch.unwrap_if_dead


class Whole(tuple):
    """A tuple that pytrees take for one leaf: functorch's vmap of a `jvp` miscounts arguments that are tuples."""


def whole(args: Any) -> list[Any]:
    """The arguments, for functorch."""
    return [Whole(a) if type(a) is tuple or type(a) is list else a for a in args]


def unwrap_dead(args: Any) -> list[Any]:
    """The arguments, each unwrapped if it is left over from a transform that has ended."""
    return [_unwrap(a) if isinstance(a, torch.Tensor) else a for a in args]


def _legacy_batched(args: Any) -> bool:
    """Whether autograd.grad(is_grads_batched=True) batches any of them; it does so by torch's older vmap."""
    if torch.compiler.is_compiling():  # compiled autograd traces backward, and Dynamo does not know the question below
        return False
    return any(isinstance(t, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(t) for t in args)


def vmap_active() -> bool:
    """Whether a transform that is active may batch tensors; under torch.compile, where one cannot ask, any may."""
    if not _transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    return any(i.key() == TransformType.Vmap for i in retrieve_all_functorch_interpreters())


def refuse_nested_forward_mode(name: str) -> None:
    """Raise where torch would silently return zeros: forward mode over forward mode of a custom Function."""
    if not _transforms_active():
        return
    from torch._C._functorch import TransformType
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    if sum(i.key() == TransformType.Jvp for i in retrieve_all_functorch_interpreters()) > 1:
        raise NotImplementedError(
            f"{name}: forward mode over forward mode is not supported (torch returns zeros for it in every custom "
            "Function); use torch.func.jacfwd(torch.func.jacrev(f)), torch.func.jacrev(torch.func.jacfwd(f)) or "
            "torch.func.hessian(f)"
        )


def primals(tensors: Any) -> list[Any]:
    """Saved tensors without their tangents: what `jvp` runs on them is not itself to be pushed forward."""
    return [None if t is None else _primal(t) for t in unwrap_dead(tensors)]


def _primal(t: torch.Tensor) -> torch.Tensor:
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(t):  # vmap has no rule for unpack_dual: reach inside
        level = functorch.maybe_get_level(t)
        value, dim = functorch._unwrap_batched(t, level)
        return functorch._add_batch_dim(_primal(value), dim, level)  # type: ignore[arg-type]
    # not forward_ad.unpack_dual, which goes by a Python counter that a compiled jvp does not set; 0 is the only level there is
    return torch._VF._unpack_dual(t, level=0)[0]  # type: ignore[attr-defined]


def batched_alike(outputs: Any, args: Any, constants: Any) -> tuple[torch.Tensor, ...]:
    """All differentiable outputs batched by the innermost vmap, or none.

    torch's vmap of a Function sums gradients over the batch, and with them the cotangent of an output that is not batched,
    which has been summed already.
    """
    functorch = torch._C._functorch
    batched = [a for a in args if isinstance(a, torch.Tensor) and functorch.is_batchedtensor(a)]
    if not batched:
        return tuple(outputs)
    level = max(functorch.maybe_get_level(a) for a in batched)
    value, dim = functorch._unwrap_batched(next(a for a in batched if functorch.maybe_get_level(a) == level), level)
    assert dim is not None

    def alike(o: torch.Tensor) -> torch.Tensor:
        if functorch.is_batchedtensor(o) and functorch.maybe_get_level(o) == level:
            return o
        return functorch._add_batch_dim(o.expand(value.shape[dim], *o.shape), 0, level)  # type: ignore[arg-type]

    return tuple(o if k in constants else alike(o) for k, o in enumerate(outputs))
