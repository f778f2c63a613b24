"""Swap torch's layers for bptoolkit's, in place, and back.

A module is swapped by giving it another class, `module.__class__ = Ours`: a subclass of its own that overrides `forward` and
nothing else. Everything it holds stays the very same object (parameters, buffers, hooks, children), hence so do ties, shared
instances, optimizers' references, state_dict keys, devices, dtypes, memory formats and the training flag.

Only exact types are swapped (`type(module) is nn.Linear`): a subclass may do something else in its forward.

What unswap needs is kept in the instance's `__dict__` so that deepcopy and pickle carry it along:

    _bptoolkit_was = nn.Linear                          the class of a swapped module
    _bptoolkit_was = {"activation_relu_or_gelu": 1}     the attributes of a module that was adjusted

    _bptoolkit_now = MyRMSNorm                          the class that `also` gave, beside the other
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bptoolkit.calls import hook, unhook
from bptoolkit.choose import BACKENDS
from bptoolkit.op import Op
from bptoolkit.ops import OPS
from bptoolkit.swap_report import Entry as Entry
from bptoolkit.swap_report import SwapReport as SwapReport

Which = str | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]  # one item of `only` and `exclude`

_WAS, _NOW = "_bptoolkit_was", "_bptoolkit_now"
_ABSENT: Any = object()
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_CONTAINERS = (nn.Sequential, *_NEVER_CALLED)

# Inference fast paths that read their children's weights and call none of them: the attribute that turns each off, and off.
_FAST_PATHS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def swap(
    model: nn.Module,
    *,
    only: Which | Iterable[Which] | None = None,
    exclude: Which | Iterable[Which] | None = None,
    also: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    functions: bool = False,
    backend: str = "auto",
    rules: None = None,
) -> SwapReport:
    """Give the layers of a model bptoolkit's hand-written backward passes, in place.

    Parameters, buffers, hooks, ties, shared instances, optimizer references and state_dict keys stay as they are; `unswap`
    restores the model exactly. If anything goes wrong on the way, nothing has changed.

    Modules are swapped, and with `functions=True` what a `forward` calls by name (`F.relu(x)`, `x @ w`; see
    `functional_calls`). What it does with a child's parameters rather than by calling the child is not seen. `only` and
    `exclude` may be, or be sequences of:

    - a name, or a pattern of names (`fnmatch`: "encoder.*.linear1"): those modules and all inside them;
    - a module class: its instances, those of its subclasses, and all inside them;
    - a module of the model: it and all inside it;
    - a function (name, module) -> bool, asked about every module: exactly those it accepts.

    Args:
        model: any module; it may itself be the layer to swap.
        only: swap nothing but this.
        exclude: leave this alone; stronger than `only`.
        also: class -> the class to give its instances: for layers of yours, or of a library, that an op can compute. It must be
            a subclass of the first that overrides `forward` alone.
        functions: run the ops for calls of torch's functions too, while the model (or a module of it, for
            `torch.utils.checkpoint`) runs its forward. Modules that are left alone get two hooks for it; `only` and `exclude`
            choose those, and a module inside one that was chosen is inside the block too.
        backend: what the swapped modules pass on to their op: "auto", "eager" or "triton". With "triton", modules whose op has
            no fused kernel are left alone.
        rules: reserved for other backward rules; None is each op's own.

    Returns:
        The report: for every module what happened to it, and why.

    Raises:
        TypeError: `model` is not a module, or `only`, `exclude` or `also` holds something else than the above.
        ValueError: the backend is not known, or a name, pattern, class or module matches nothing in the model.
        NotImplementedError: `rules` is not None.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 4))
        >>> swap(model, exclude="2").left["2"]
        'excluded'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model is a {type(model).__name__}, not a torch.nn.Module")
    if backend not in BACKENDS:
        raise ValueError(f"swap: backend={backend!r} is not known; choose from {', '.join(map(repr, BACKENDS))}")
    if rules is not None:
        raise NotImplementedError(f"swap: rules={rules!r}: other backward rules cannot be swapped in yet; only rules=None can")
    plan = _Plan(model, only, exclude, backend, _checked(also or {}))
    entries, changes = plan.decide()
    _make(changes)
    if functions:
        plan.hook()
    return SwapReport(tuple(entries))


def unswap(model: nn.Module) -> tuple[str, ...]:
    """Give every module that `swap` changed its class and attributes back, in place.

    Returns:
        The names of the modules restored. Modules made as bptoolkit's (`bp.nn.Linear(...)`) stay.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unswap: model is a {type(model).__name__}, not a torch.nn.Module")
    names, changes, ours = [], [], {new for new, _ in _table().values()}
    for name, module in model.named_modules():
        unhook(module)
        was = vars(module).get(_WAS, _ABSENT)
        if isinstance(was, dict):
            changes.append(_Change(module, type(module), {**was, _WAS: _ABSENT}))
        elif was is not _ABSENT:
            now = type(module)
            given = _base(now) in ours or _base(now) is vars(module).get(_NOW)
            taken = dict.fromkeys(("backend", _WAS, _NOW), _ABSENT)
            changes.append(_Change(module, _over(now, was) if given else now, taken))
        else:
            continue
        names.append(name)
    _make(changes)
    return tuple(names)


class _Change(NamedTuple):
    """A class and attributes to give a module."""

    module: nn.Module
    cls: type
    attributes: Mapping[str, Any]  # _ABSENT takes one off

    def inverse(self) -> _Change:
        now = {k: vars(self.module).get(k, _ABSENT) for k in self.attributes}
        return _Change(self.module, type(self.module), now)

    def make(self) -> None:
        for k, v in self.attributes.items():
            if v is _ABSENT:
                vars(self.module).pop(k, None)
            else:
                vars(self.module)[k] = v
        if type(self.module) is not self.cls:
            object.__setattr__(self.module, "__class__", self.cls)


def _make(changes: Iterable[_Change]) -> None:
    """All the changes, or none."""
    undo: list[_Change] = []
    try:
        for change in changes:
            undo.append(change.inverse())
            change.make()
    except BaseException:
        for change in reversed(undo):
            change.make()
        raise


def _table() -> dict[type[nn.Module], tuple[type[nn.Module], Op]]:
    """The class of torch -> ours, and its op."""
    table = {theirs: (ours, op) for op in OPS.values() for ours, theirs in zip(op.module, op.replaces)}
    if nn.Linear in table:  # it differs from Linear in its type alone, which tells quantization to keep off
        table[NonDynamicallyQuantizableLinear] = table[nn.Linear]
    return table


def _checked(also: Mapping[Any, Any]) -> Mapping[type[nn.Module], type[nn.Module]]:
    """Raise for a mapping of classes that cannot be."""
    if not isinstance(also, Mapping):
        raise TypeError(f"swap: also is a {type(also).__name__}, not a mapping from class to class")
    for theirs, new in also.items():
        if not all(isinstance(c, type) and issubclass(c, nn.Module) for c in (theirs, new)):
            raise TypeError(f"swap: also={{{theirs!r}: {new!r}}} does not map a class of modules to another")
        if theirs is new or not issubclass(new, theirs):
            raise TypeError(
                f"swap: also={{{theirs.__name__}: {new.__name__}}}: {new.__name__} must be a subclass of {theirs.__name__}"
            )
    return also


def _generated(cls: type) -> bool:
    """Whether torch.nn.utils.parametrize made this class, for one module."""
    return cls.__module__ == "torch.nn.utils.parametrize" and cls.__name__.startswith("Parametrized")


def _base(cls: type) -> type:
    """The class before parametrizations."""
    return cls.__bases__[0] if _generated(cls) else cls


def _over(cls: type, base: type) -> type:
    """The class `base`, with the properties of the parametrizations if `cls` has any.

    A new one each time: removing a parametrization edits the class, and deep copies share theirs.
    """
    if not _generated(cls):
        return base
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    return type(f"Parametrized{base.__name__}", (base,), own)


class _Plan:
    """Decides for every module; changes nothing."""

    def __init__(self, model: nn.Module, only: Any, exclude: Any, backend: str, also: Mapping[Any, Any]) -> None:
        self.backend, self.table, self.also = backend, _table(), also
        self.ours = {new: op for new, op in self.table.values()}
        self.by_name = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[nn.Module, list[str]] = {}
        self.parents: dict[nn.Module, list[nn.Module]] = {}
        for name, module in self.by_name.items():
            self.names.setdefault(module, []).append(name)
            if module is not model:
                self.parents.setdefault(module, []).append(self.by_name[name.rpartition(".")[0]])
        self.wanted = None if only is None else self.select("only", only)
        self.excluded = set() if exclude is None else self.select("exclude", exclude)

    def decide(self) -> tuple[list[Entry], list[_Change]]:
        fates = {module: self.fate(module) for module in self.names}
        ours = {m for m in fates if fates[m][0] in ("swapped", "already")}
        entries, changes = [], []
        for module, (what, why) in fates.items():
            name, *aliases = self.names[module]
            if what == "swapped":
                base = _base(type(module))
                attributes: dict[str, Any] = {_WAS: base}
                new = self.also[base] if base in self.also else self.table[base][0]
                if base in self.also:
                    attributes[_NOW] = new
                if self.backend != "auto" and hasattr(new, "backend"):
                    attributes["backend"] = self.backend
                changes.append(_Change(module, _over(type(module), new), attributes))
            elif any(inside in ours for inside in module.modules()):
                for cls, attribute, off in _FAST_PATHS:
                    if isinstance(module, cls) and _WAS in vars(module):
                        why += "; its inference fast path is off"
                    elif isinstance(module, cls) and vars(module).get(attribute):
                        what, why = (
                            "adjusted",
                            f"inference fast path off ({attribute}={off}): it would bypass the modules inside",
                        )
                        was = {attribute: vars(module)[attribute]}
                        changes.append(_Change(module, type(module), {attribute: off, _WAS: was}))
            if aliases:
                why += f"; also {', '.join(aliases)}"
            entries.append(Entry(name, type(module).__name__, what, why))
        return entries, changes

    def fate(self, module: nn.Module) -> tuple[str, str]:
        """What is to happen to a module, and why."""
        base = _base(type(module))
        if base is vars(module).get(_NOW):
            return "already", f"swapped before, for {base.__name__}"
        if base in self.also:
            obstacle = self.obstacle(module, base, None)
            return ("left alone", obstacle) if obstacle else ("swapped", f"{self.also[base].__name__}, by also")
        if base in self.ours:
            kept = "" if module.backend == self.backend else f"; keeps backend {module.backend!r}"
            return "already", ("swapped before" if _WAS in vars(module) else "made as a bptoolkit module") + kept
        if base not in self.table:
            return "left alone", self.foreign(module, base)
        op = self.table[base][1]
        if obstacle := self.obstacle(module, base, op):
            return "left alone", obstacle
        return "swapped", f"op {op.name}" + (f", backend {self.backend!r}" if self.backend != "auto" else "")

    def foreign(self, module: nn.Module, base: type) -> str:
        """Why a type that is not in the table is left alone."""
        if isinstance(module, torch.jit.ScriptModule):
            return "scripted by torch.jit, which runs a copy of the code"
        if isinstance(module, LazyModuleMixin):
            return "lazy, without parameters yet: run the model once, then swap"
        if any(c.__name__ == "FSDPModule" for c in base.__mro__) and any(c in self.table for c in base.__mro__):
            return "sharded by fully_shard: swap before sharding"
        if base.__module__.startswith(("torch.ao.", "torchao.")):
            return "a quantization module"
        for theirs in base.__mro__:
            if theirs in self.table:
                return f"a subclass of {theirs.__name__}, which may behave differently: only exact types are swapped"
        if isinstance(module, _CONTAINERS):
            return "container"
        if next(module.children(), None) is None:
            return f"no op for {base.__name__}"
        own = next(module.parameters(recurse=False), None) is not None
        return "container; what it does with its own parameters is not seen" if own else "container"

    def hook(self) -> None:
        """Put the hooks of `functions=True` on the modules chosen that have a forward of torch's or the user's."""
        for module in self.names:
            chosen = (self.wanted is None or module in self.wanted) and module not in self.excluded
            if (
                chosen
                and _base(type(module)) not in self.ours
                and not isinstance(module, (*_NEVER_CALLED, torch.jit.ScriptModule))
            ):
                hook(module, self.backend)

    def obstacle(self, module: nn.Module, base: Any, op: Op | None) -> str | None:
        """Why a module whose exact type is in the table (or, without an op, in `also`) is left alone all the same."""
        parents = self.parents.get(module, [])
        if parents and all(self.reads_only(p) for p in parents):
            return "part of MultiheadAttention, which reads its parameters and does not call it"
        if self.wanted is not None and module not in self.wanted:
            return "not in only"
        if module in self.excluded:
            return "excluded"
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
        if op is None:
            return None  # what its class can take is the user's to say
        if not base.forward.__module__.startswith(base.__module__.partition(".")[0] + "."):
            return f"the forward of the class {base.__name__} was replaced"
        if hasattr(module, "backend"):
            return "has an attribute 'backend' of its own, the name bptoolkit's modules use"
        for name, p in module.named_parameters():
            # DTensor is welcome: fully_shard shows forward plain tensors, tensor parallelism runs the rules on DTensors
            if is_traceable_wrapper_subclass(p) and type(p).__name__ != "DTensor":
                return f"{name} is a {type(p).__name__}, not a plain tensor"
            if not p.is_floating_point() or p.layout is not torch.strided:
                return f"{name} is {p.layout if p.is_floating_point() else p.dtype}: ops take dense floating-point tensors"
        if self.backend == "triton" and not op.kernel:
            return f"op {op.name} has no fused kernel for backend='triton'"
        return None

    def reads_only(self, parent: nn.Module) -> bool:
        """Whether a parent is a MultiheadAttention with torch's forward or ours, which reads `out_proj.weight` itself."""
        base = _base(type(parent))
        known = base is nn.MultiheadAttention or (base in self.ours and issubclass(base, nn.MultiheadAttention))
        return known and "forward" not in vars(parent)

    def select(self, argument: str, which: Any) -> set[nn.Module]:
        """The modules that `only` or `exclude` chooses."""
        single = isinstance(which, (str, type, nn.Module)) or not isinstance(which, Iterable)
        chosen: set[nn.Module] = set()
        for item in (which,) if single else which:
            if isinstance(item, type) and not issubclass(item, nn.Module):
                raise TypeError(f"swap: {argument}={item.__name__} is not a class of modules")
            if isinstance(item, (str, type, nn.Module)):
                roots = {name for name, module in self.by_name.items() if _named(item, name, module)}
                if not roots:
                    raise ValueError(f"swap: {argument}={_show(item)} matches no module; {self.near(item)}")
                chosen |= {m for name, m in self.by_name.items() if any(p in roots for p in _prefixes(name))}
            elif callable(item):
                chosen |= {module for name, module in self.by_name.items() if item(name, module)}
            else:
                takes = "names, module classes, modules or functions of (name, module)"
                raise TypeError(f"swap: {argument} takes {takes}, not {item!r}")
        return chosen

    def near(self, item: str | type | nn.Module) -> str:
        """What to write instead."""
        if isinstance(item, str):
            names = [n for n in self.by_name if n]
            return f"near names: {', '.join(get_close_matches(item, names, 5, 0.3) or names[:5]) or 'there are none'}"
        return f"the model has {', '.join(sorted({type(m).__name__ for m in self.names}))}"


def _named(item: str | type | nn.Module, name: str, module: nn.Module) -> bool:
    if isinstance(item, str):
        return fnmatchcase(name, item)
    return isinstance(module, item) if isinstance(item, type) else module is item


def _prefixes(name: str) -> Iterator[str]:
    """The name and those of the modules around it, up to the model's ''."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _show(item: str | type | nn.Module) -> str:
    if isinstance(item, str):
        return repr(item)
    return item.__name__ if isinstance(item, type) else f"<{type(item).__name__}>"
