"""What a planted fault and a correct twin state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A function with one mistake in it.

    Attributes:
        name: unique, in words.
        family: linear, activation, softmax, norm, conv, attention, recurrent, multi, stochastic, library, module.
        kind: the class of mistake: value, shape, range, layout, mutation, state, contract, second order, precision, autocast,
            randomness, forward, transform.
        inputs: of `bp.verify.check`.
        fn: the function.
        reference: what it should be.
        caught_by: the properties that are right for it, the best first.
        history: the public issue or pull request it is a replica of, "" if none.
        contract: what is declared.
    """

    name: str
    family: str
    kind: str
    inputs: Any
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    caught_by: tuple[str, ...]
    history: str = ""
    contract: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A function in the style of the faults of its family, with nothing wrong in it."""

    name: str
    family: str
    inputs: Any
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    contract: Mapping[str, Any] = field(default_factory=dict)
