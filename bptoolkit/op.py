"""`Op`: all that is stated about an op, once. Tests, benchmarks, swap, the command line and the tables loop over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bptoolkit import kernels
from bptoolkit.cases import Case, Draw, from_shapes
from bptoolkit.choose import State, choose
from bptoolkit.function import Rule
from bptoolkit.shapes import Shapes
from bptoolkit.transforms import _transforms_active, vmap_active

LOW: Mapping[str, str] = {"cpu": "low", "cuda": "low"}  # autocast casts the inputs to its own dtype
FLOAT32: Mapping[str, str] = {"cpu": "float32", "cuda": "float32"}
FLOAT32_CUDA: Mapping[str, str] = {"cuda": "float32"}  # on the CPU autocast leaves this op alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """One op.

    Attributes:
        name: the public function's name.
        call: the public function.
        reference: plain torch, a function of the same arguments, differentiated by autograd in checks and benchmarks.
        shapes: the tensor arguments and the result, see `bptoolkit.shapes`.
        source: where the maths comes from.
        rules: the rules the function runs.
        module: the swap-in module or modules, each a subclass of the torch.nn class it replaces.
        replaces: the torch.nn class of each module, in the same order.
        autocast: per device type, "low" or "float32": the cast torch's own op gets under autocast.
        case: draws the arguments of one call, when `shapes` does not say enough.
        bench: label -> what draws the arguments of one row of the benchmark, at sizes where torch takes over 1 ms.
        peer: torch's own op, for benchmarks, where the reference is a slower plain form of it.
        twice: the op can be differentiated twice.
        random: it draws from torch's global generator; the reference draws the same from the same state.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: str
    source: str
    rules: tuple[Rule, ...] = ()
    module: tuple[type[nn.Module], ...] = ()
    replaces: tuple[type[nn.Module], ...] = ()
    autocast: Mapping[str, str] = field(default_factory=dict)
    case: Callable[[Draw], Case] | None = None
    bench: Mapping[str, Callable[[Draw], Case]] | Callable[[Draw], Case] | None = None
    peer: Callable[..., Any] | None = None
    twice: bool = True
    random: bool = False
    parsed: Shapes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed", Shapes(self.shapes))

    @property
    def kernel(self) -> bool:
        """Whether a fused kernel exists."""
        return any(rule.kernel for rule in self.rules)

    def draw(self, draw: Draw) -> Case:
        """The arguments of one call."""
        return self.case(draw) if self.case else from_shapes(self.parsed, draw)

    def check(self, *tensors: Tensor | None) -> None:
        """Check the tensor arguments, in the order of `shapes`; see `Shapes.check`."""
        self.parsed.check(self.name, *tensors)

    def cast(self, *tensors: Any) -> tuple[Any, ...]:
        """The casts torch's autocast gives this op's arguments, as differentiable `.to`; outside autocast, nothing."""
        if not torch._C._is_any_autocast_enabled():
            return tensors
        first = next((t for t in tensors if isinstance(t, Tensor)), None)
        if first is None or first.device.type == "meta" or not torch.is_autocast_enabled(first.device.type):
            return tensors
        policy = self.autocast.get(first.device.type)
        if policy is None:
            return tensors
        dtype = torch.float32 if policy == "float32" else torch.get_autocast_dtype(first.device.type)

        def to(t: Any) -> Any:  # autocast leaves float64 and everything that is not floating point alone
            return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t

        return tuple(to(t) for t in tensors)

    def pick(self, rule: Rule, backend: str, *args: Any) -> str:
        """Which rules run this call: "eager" or "triton". `args` are the rule's inputs and options.

        Raises:
            ValueError: the backend is not known, or was asked for by name and cannot run.
        """
        return pick(self.name, rule, backend, *args)


def pick(name: str, rule: Rule, backend: str, *args: Any) -> str:
    """`Op.pick`, for what is not an op of the catalogue; `name` is named in the errors."""
    by_name = rule.kernel is None or rule.on_request is not None
    if backend == "eager" or (backend == "auto" and (by_name or not kernels.runs_on(args[0].device.type))):
        return "eager"  # as choose() says; most calls end here
    on_device = rule.kernel is not None and all(kernels.runs_on(t.device.type) for t in args if isinstance(t, Tensor))
    unsupported = kernels.unsupported(rule, *args) if on_device else None
    watched = _transforms_active() or forward_ad._current_level >= 0
    if watched and on_device and rule.kernel is not None and rule.kernel().again is not None:
        watched = vmap_active()  # of all other transforms the kernel's forward sees nothing
    state = State(backend, "forward", rule.kernel is not None, on_device, watched, False, unsupported, rule.on_request)
    return choose(state, name).rule
