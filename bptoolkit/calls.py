"""`functional_calls`: calls of torch's functions that have an op run the op, for as long as a block lasts.

A model calls much of what it computes by name: `F.gelu(x)`, `x.softmax(-1)`, `torch.addmm(b, x, w)`. Every such call, however
its name was bound, passes through the `TorchFunctionMode` below, which hands it to the op or lets it go on. What an op itself
calls is out of its sight: a rule is one call, as torch's own kernels are.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from bptoolkit import function
from bptoolkit.choose import BACKENDS
from bptoolkit.op import Op
from bptoolkit.ops import OPS

_REFUSALS = (TypeError, ValueError, NotImplementedError)  # what an op's checks raise, before any work
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_BACKWARD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class functional_calls(TorchFunctionMode):
    """Run bptoolkit's ops for calls of torch's functions: `torch.nn.functional`, their names in `torch`, methods of tensors.

    The functions are those of `torch.nn.functional` that share a name with an op, their aliases (`torch.softmax`,
    `Tensor.softmax`, `torch.special.softmax`, `torch.relu_`), and products with a matrix (`torch.addmm`, `x @ w`), which are
    linear(x, wᵀ, b). Left to torch, with the reason in `left`: functions without an op, tensors that are not dense and of
    floating point, `out=`, and what the op's checks refuse.

    A backward may run outside of the block: it is the op's all the same. Blocks may be nested, and left by an exception; each
    thread has its own. `torch.compile` goes into the block; it counts nothing.

    Args:
        backend: what is passed on to the ops: "auto", "eager" or "triton". With "triton", functions whose op has no fused
            kernel are left alone, and a call its kernel refuses raises.

    Attributes:
        replaced: name of the op -> how many calls ran it.
        left: (name, why) -> how many calls with a derivative torch ran.

    Raises:
        ValueError: the backend is not known.

    Example:
        >>> with functional_calls() as calls:
        ...     y = torch.softmax(torch.randn(2, 3, requires_grad=True) * 2, -1)
        >>> calls.replaced, calls.left
        (Counter({'softmax': 1}), Counter({('mul', 'no op'): 1}))
    """

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(
                f"functional_calls: backend={backend!r} is not known; choose from {', '.join(map(repr, BACKENDS))}"
            )
        self.backend = backend
        self.replaced: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> functional_calls:
        function.hidden(1)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        function.hidden(-1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = TABLE.get(func)
        if found is None:
            return self._torchs("no op", func, args, kwargs)
        op, adapt = found
        call = (args, kwargs) if adapt is None else adapt(*args, **kwargs)
        why = "not a product with a matrix" if call is None else _obstacle(op, self.backend, *call)
        if why is not None:
            return self._torchs(why, func, args, kwargs)
        given, named = call  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return op.call(*given, **named, backend=self.backend)
        try:
            out = op.call(*given, **named, backend=self.backend)
        except _REFUSALS as error:
            if self.backend == "triton":
                raise
            return self._torchs(f"refused: {error}", func, args, kwargs)
        for calls in {self, *_around()}:  # those around this one do not see the call
            calls.replaced[op.name] += 1
        return out

    def _torchs(self, why: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Torch's own function, counted if its result has a derivative."""
        out = func(*args, **kwargs)
        if torch.compiler.is_compiling() or func in _BACKWARD:
            return out
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, Tensor) and first.grad_fn is not None:
            name = _name(func)
            if (name.endswith("_") or not any(out is a for a in args)) and self not in _around():  # x.to(x.dtype) is x
                self.left[name, why] += 1
        return out


def _around() -> list[functional_calls]:
    """The open blocks around the one that is handling a call, outermost first."""
    return [m for m in _get_current_function_mode_stack() if isinstance(m, functional_calls)]


def _obstacle(op: Op, backend: str, args: Any, kwargs: Any) -> str | None:
    """Why a call is torch's, seen before the op is asked."""
    if backend == "triton" and not op.kernel:
        return "no fused kernel"
    if kwargs.get("out") is not None:
        return "writes into out="
    floating = False
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor):
            if type(t) not in _PLAIN:
                return f"{type(t).__name__}, not a plain tensor"
            if t.is_complex() or t.layout is not torch.strided:
                return "not dense and of floating point"
            floating = floating or t.is_floating_point()
    return None if floating else "not dense and of floating point"


def _name(func: Any) -> str:
    """The function's name; of what reads a property, the property's; of an operator (`__matmul__`), without underscores."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return getattr(func.__self__, "__name__", name)
    return name.strip("_") if name.startswith("__") else name


Adapter = Callable[..., "tuple[Any, Any] | None"]  # torch's arguments -> the op's, or None where they are no call of it


def _table() -> dict[Any, tuple[Op, Adapter | None]]:
    """The functions that are replaced: torch's function -> the op, and what turns its arguments into the op's."""
    found: dict[Any, tuple[Op, Adapter | None]] = {}

    def add(name: str, func: Any, adapter: Adapter | None = None) -> None:
        if func is not None and name in OPS:
            found.setdefault(func, (OPS[name], adapter))

    for name in OPS:
        add(
            name,
            getattr(F, name, None),
            _without("options") if name == "linear_cross_entropy" else _without("out") if name == "normalize" else None,
        )
    for name in ("relu", "tanh", "sigmoid", "prelu", "hardshrink"):
        add(name, getattr(torch, name))
        add(name, getattr(Tensor, name))
    for name in ("celu", "selu", "rrelu", "threshold", "rms_norm"):
        add(name, getattr(torch, name))
    for name in ("softmax", "log_softmax"):
        for home in (torch, Tensor, torch.special):
            add(name, getattr(home, name), _softmax)
    add("sigmoid", torch.special.expit)
    add("threshold", getattr(F, "_threshold", None))
    add("layer_norm", torch.layer_norm, _normalized)
    add("group_norm", torch.group_norm, _normalized)
    for name in ("dropout", "alpha_dropout", "feature_alpha_dropout"):
        add(name, getattr(torch, name), _dropped)
    for n in "123":
        add(f"max_pool{n}d", getattr(torch, f"max_pool{n}d", None))
        for kind in ("max_pool", "adaptive_max_pool"):
            add(f"{kind}{n}d", getattr(F, f"{kind}{n}d_with_indices", None), _with_indices)
            add(f"{kind}{n}d", getattr(F, f"_{kind}{n}d", None))
    for name, func in (("relu", torch.relu_), ("relu", Tensor.relu_), ("celu", torch.celu_), ("selu", torch.selu_)):
        add(name, func, _in_place)
    add("linear", torch.addmm, _addmm)
    add("linear", Tensor.addmm, _addmm)
    for product in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__):
        add("linear", product, _matmul)
    return found


def _without(option: str) -> Adapter:
    """For an option that ours lacks: no call of the op where it is given."""

    def adapt(*args: Any, **kwargs: Any) -> Any:
        return None if kwargs.get(option) is not None else (args, {k: v for k, v in kwargs.items() if k != option})

    return adapt


def _softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    return (input, dim), {"dtype": dtype, **kwargs}


def _normalized(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Without the last argument of torch's, which is about cuDNN."""
    return (input, *args[:4]), {k: v for k, v in kwargs.items() if not k.startswith("cudnn")}


def _dropped(input: Tensor, p: float, train: bool) -> Any:
    return (input, p, train), {}


def _with_indices(*args: Any, **kwargs: Any) -> Any:
    return args, {**kwargs, "return_indices": True}


def _in_place(*args: Any, **kwargs: Any) -> Any:
    return args, {**kwargs, "inplace": True}


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Any:
    scaled = any(kwargs.get(k, 1) != 1 for k in ("beta", "alpha"))
    unknown = kwargs.keys() - {"beta", "alpha"}
    return None if scaled or unknown or input.dim() != 1 or len(input) != mat2.shape[-1] else ((mat1, mat2.mT, input), {})


def _matmul(input: Tensor, other: Tensor, **kwargs: Any) -> Any:
    return None if kwargs or other.dim() != 2 or input.dim() < 1 else ((input, other.mT), {})


TABLE = _table()


class _Open(threading.local):
    """The modules of swap(functions=True) that are running in this thread, and the block each has opened, if any."""

    def __init__(self) -> None:
        self.modules: list[tuple[nn.Module, functional_calls | None]] = []


_open = _Open()


class Enter:
    """Forward pre-hook of a module: its calls, and those of all it calls, run the ops."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, module: nn.Module, args: Any) -> None:
        block = None if _around() else functional_calls(backend=self.backend)
        _open.modules.append((module, block))
        if block is not None:
            block.__enter__()


def leave(module: nn.Module, args: Any, output: Any) -> None:
    """The forward hook that ends it; called after an exception too, and then perhaps without the other."""
    if not any(m is module for m, _ in _open.modules):
        return
    last = None
    while last is not module:
        last, block = _open.modules.pop()
        if block is not None:
            block.__exit__(None, None, None)


_HOOKS = "_bptoolkit_hooks"  # in a module's __dict__: the keys of its two hooks


def hook(module: nn.Module, backend: str) -> None:
    """Let a module's calls run the ops whenever it runs its forward; once is enough."""
    if _HOOKS not in vars(module):
        before = module.register_forward_pre_hook(Enter(backend), prepend=True)
        after = module.register_forward_hook(leave, always_call=True)
        vars(module)[_HOOKS] = before.id, after.id


def unhook(module: nn.Module) -> None:
    """Take off what `hook` put on, if it did."""
    for key, hooks in zip(
        vars(module).pop(_HOOKS, ()),
        ((module._forward_pre_hooks,), (module._forward_hooks, module._forward_hooks_always_called)),
    ):
        for held in hooks:
            held.pop(key, None)
