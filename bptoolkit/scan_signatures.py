"""Signatures for the functions of a `Scan`, which take lists: operators are made from annotations, rules from names."""

from __future__ import annotations

import inspect
from typing import Any, Optional

from torch import Tensor


def names(letter: str, n: int) -> list[str]:
    return [f"{letter}{k}" for k in range(n)]


def signed(fn: Any, first: list[str], second: list[str], options: dict[str, Any], returns: int, more: Any = ()) -> Any:
    """`fn` with the signature that an operator is made from; cotangents, ends, y and lengths may be None."""
    maybe = {"lengths", "y", *more, *(n for n in first if n.startswith("d"))}
    P = inspect.Parameter
    kinds = [(n, Optional[Tensor] if n in maybe else Tensor) for n in (*first, *second, *more)]  # noqa: UP045
    parameters = [P(n, P.POSITIONAL_OR_KEYWORD, annotation=a) for n, a in (*kinds, *options.items())]

    def run(*args: Any) -> Any:
        return fn(*args)

    run.__signature__ = inspect.Signature(parameters, return_annotation=tuple[(Tensor,) * returns])  # type: ignore[attr-defined, misc]
    return run


def named(fn: Any, names: list[str]) -> Any:
    """`fn` with named parameters, as `Rule` reads them."""

    def run(*args: Any) -> Any:
        return fn(*args)

    P = inspect.Parameter
    run.__signature__ = inspect.Signature([P(n, P.POSITIONAL_OR_KEYWORD) for n in names])  # type: ignore[attr-defined]
    return run
