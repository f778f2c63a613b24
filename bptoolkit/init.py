"""Initialisers that torch.nn.init lacks. All work in place without gradients, and return what they were given.

lecun_normal_, lecun_uniform_     variance 1/fan_in: for selu, tanh and linear layers
orthogonal_recurrent_             each gate's block of weight_hh orthogonal
identity_recurrent_               weight_hh = s I: relu RNNs that remember
forget_bias_, chrono_             how long an LSTM or GRU remembers before it has learnt to
zero_last_, fixup_                residual networks without normalisation
lsuv_                             unit variance in every layer, measured on a batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

_WEIGHTED = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def lecun_normal_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Normal values of variance 1/fan_in (LeCun et al. 1998, eq. 16; Klambauer et al. 2017 for selu).

    Args:
        tensor: a weight of two dimensions or more, as `torch.nn.init` takes them.
        generator: what the values are drawn from.

    Raises:
        ValueError: the tensor has fewer than two dimensions.
    """
    with torch.no_grad():
        return tensor.normal_(0.0, _fan_in("lecun_normal_", tensor) ** -0.5, generator=generator)


def lecun_uniform_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform values of variance 1/fan_in, between ±√(3/fan_in); arguments and errors as `lecun_normal_`."""
    bound = (3.0 / _fan_in("lecun_uniform_", tensor)) ** 0.5
    with torch.no_grad():
        return tensor.uniform_(-bound, bound, generator=generator)


def _fan_in(name: str, tensor: Tensor) -> int:
    if tensor.dim() < 2:
        raise ValueError(f"{name}: the tensor has shape {tuple(tensor.shape)}; fan_in needs two dimensions or more")
    return max(tensor[0].numel() if tensor.shape[0] else 1, 1)


# --- recurrent layers

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}  # i f g o; r z n


def orthogonal_recurrent_(target: Any, gain: float = 1.0) -> Any:
    """Each gate's block of the recurrent weights orthogonal (Saxe et al. 2014): no direction of the state grows or dies.

    `torch.nn.init.orthogonal_` over the whole of weight_hh makes its columns orthonormal over all gates together, so that
    each gate gets a matrix of norm less than 1.

    Args:
        target: an nn.RNN, nn.GRU, nn.LSTM or one of their cells, or one weight of shape (gates · H, H).
        gain: what each block is multiplied by.

    Raises:
        TypeError: the target is something else.
        ValueError: the rows of a weight are no multiple of its columns.
    """
    if isinstance(target, Tensor):
        rows, H = target.shape if target.dim() == 2 else (1, 0)
        if H == 0 or rows % H:
            raise ValueError(f"orthogonal_recurrent_: weight has shape {tuple(target.shape)}; it needs (gates · H, H)")
        _orthogonal_blocks(target, H, gain)
        return target
    for name, weight in _recurrent("orthogonal_recurrent_", target):
        if name.startswith("weight_hh"):
            _orthogonal_blocks(weight, target.hidden_size, gain)
    return target


def _orthogonal_blocks(weight: Tensor, H: int, gain: float) -> None:
    with torch.no_grad():
        for block in weight.split(H):
            block.copy_(nn.init.orthogonal_(torch.empty_like(block), gain))


def identity_recurrent_(module: nn.Module, scale: float = 1.0, input_std: float | None = None) -> nn.Module:
    """weight_hh = scale · I in every gate and all biases 0: with relu, a state that stays (Le, Jaitly & Hinton 2015).

    Args:
        module: an nn.RNN, nn.GRU, nn.LSTM or one of their cells.
        scale: 1, or less where shorter memories are wanted (0.01 in the paper's speech experiment).
        input_std: the standard deviation of normal input weights (0.001 in the paper); None leaves them as they are.

    Raises:
        TypeError: the module is something else.
    """
    with torch.no_grad():
        for name, p in _recurrent("identity_recurrent_", module):
            if name.startswith("bias"):
                p.zero_()
            elif name.startswith("weight_hh"):
                for block in p.split(module.hidden_size):  # type: ignore[arg-type]
                    block.copy_(torch.eye(*block.shape, dtype=p.dtype, device=p.device) * scale)
            elif name.startswith("weight_ih") and input_std is not None:
                p.normal_(0.0, input_std)
    return module


def forget_bias_(module: nn.Module, value: float = 1.0) -> nn.Module:
    """The bias of every forget gate of an LSTM, in sum over its two biases, is the value (Gers et al. 2000).

    torch has two biases that are added, so setting each to 1 makes 2. The first gets the value and the second 0; the gates
    lie in the order i f g o.

    Args:
        module: an nn.LSTM or nn.LSTMCell with biases.
        value: 1 by Jozefowicz et al. 2015.

    Raises:
        TypeError: the module is something else.
        ValueError: it has no biases.
    """
    if _kind("forget_bias_", module) != "LSTM":
        raise TypeError(f"forget_bias_: a {type(module).__name__} has no forget gate; it needs an LSTM or LSTMCell")
    for ih, hh in _biases("forget_bias_", module):
        _set_gate(ih, hh, 1, module, torch.full_like(ih[: module.hidden_size], value))  # type: ignore[misc]
    return module


def chrono_(module: nn.Module, longest: float, generator: torch.Generator | None = None) -> nn.Module:
    """Biases of gates that remember for times spread over 1 ... longest steps (Tallec & Ollivier 2018, eq. 16).

    LSTM    b_f = log u, b_i = −b_f        GRU    b_z = log u, the gate that keeps        u ~ U(1, longest − 1), a unit each

    A unit whose gate is σ(log u) forgets over about u + 1 steps. Other gates' biases become 0.

    Args:
        module: an nn.LSTM, nn.GRU or one of their cells, with biases.
        longest: the longest dependency, in steps; more than 2.
        generator: what u is drawn from.

    Raises:
        TypeError: the module is something else.
        ValueError: it has no biases, or `longest` is 2 or less.
    """
    kind = _kind("chrono_", module)
    if kind == "RNN":
        raise TypeError(f"chrono_: a {type(module).__name__} has no gates; it needs an LSTM or a GRU, or one of their cells")
    if not longest > 2:
        raise ValueError(f"chrono_: longest={longest} must be more than 2 steps")
    for ih, hh in _biases("chrono_", module):
        with torch.no_grad():
            ih.zero_()
            hh.zero_()
            log = torch.empty_like(ih[: module.hidden_size]).uniform_(1, longest - 1, generator=generator).log()  # type: ignore[misc]
        _set_gate(ih, hh, 1, module, log)
        if kind == "LSTM":
            _set_gate(ih, hh, 0, module, -log)
    return module


def _kind(name: str, module: Any) -> str:
    for kind in GATES:
        if isinstance(module, (getattr(nn, kind), getattr(nn, kind + "Cell"))):
            return kind
    raise TypeError(f"{name}: takes an nn.RNN, nn.GRU, nn.LSTM or one of their cells, not a {type(module).__name__}")


def _recurrent(name: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    _kind(name, module)
    return module.named_parameters(recurse=False)


def _biases(name: str, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The pairs of biases, one pair a layer and direction."""
    found = dict(module.named_parameters(recurse=False))
    pairs: list[tuple[Tensor, Tensor]] = [
        (p, found[n.replace("_ih", "_hh")]) for n, p in found.items() if n.startswith("bias_ih")
    ]
    if not pairs:
        raise ValueError(f"{name}: the {type(module).__name__} has no biases (bias=False)")
    return pairs


def _set_gate(ih: Tensor, hh: Tensor, gate: int, module: Any, value: Tensor) -> None:
    H = module.hidden_size
    with torch.no_grad():
        ih[gate * H : (gate + 1) * H] = value
        hh[gate * H : (gate + 1) * H] = 0


# --- residual networks


def zero_last_(branch: nn.Module) -> nn.Module:
    """The last layer of a residual branch to zero, so that x + f(x) begins as x (Goyal et al. 2017, §5.1; Zhang et al. 2019).

    Args:
        branch: the module whose output is added; of it, the last linear, convolutional or normalisation layer in the order of
            `modules()`: weight and bias become 0.

    Raises:
        ValueError: the branch has no such layer.
    """
    layers = [m for m in branch.modules() if isinstance(m, (*_WEIGHTED, *_NORMS)) and m.weight is not None]
    if not layers:
        raise ValueError(f"zero_last_: the {type(branch).__name__} has no linear, convolutional or normalisation layer")
    for p in layers[-1].parameters(recurse=False):
        nn.init.zeros_(p)
    return branch


def fixup_(branches: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """Fixup (Zhang, Dauphin & Ma 2019, §3): a deep residual network that trains without normalisation.

    In each of L branches of m weight layers the last is 0 and the others are He's, times L^(−1/(2m−2)); biases are 0. The
    scalar multipliers and biases of the paper's third rule belong to the model: `bptoolkit.nn.Residual(..., scale=1.0)` has
    the multiplier.

    Args:
        branches: every residual branch of the network.

    Raises:
        ValueError: a branch has no linear or convolutional layer.
    """
    for k, branch in enumerate(branches):
        layers: list[Any] = [m for m in branch.modules() if isinstance(m, _WEIGHTED)]
        if not layers:
            raise ValueError(f"fixup_: branch {k}, a {type(branch).__name__}, has no linear or convolutional layer")
        m = len(layers)
        for layer in layers:
            if layer is layers[-1]:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                with torch.no_grad():
                    layer.weight.mul_(len(branches) ** (-1 / (2 * m - 2)))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return branches


# --- from data


class Scaled(NamedTuple):
    """What `lsuv_` did to a layer."""

    variance: float  # of its output, at the end
    iterations: int  # how many times its weight was divided


class _Reached(Exception):
    """The layer's output is known; the rest of the forward is not needed."""


def lsuv_(
    model: nn.Module,
    *batch: Any,
    tolerance: float = 0.1,
    iterations: int = 10,
    layers: Iterable[nn.Module] | None = None,
    orthogonal: bool = True,
    **kwargs: Any,
) -> dict[str, Scaled]:
    """Layer-sequential unit variance (Mishkin & Matas 2016, algorithm 1).

    Layer by layer, in the order in which the model first calls them: the weight becomes orthogonal, then it is divided by the
    standard deviation of the layer's output on the batch until the variance is 1 within the tolerance. Where a layer is called
    several times, its first output counts. Buffers (running statistics) and the mode are as they were afterwards; so are
    biases.

    Args:
        model: any module; `model(*batch, **kwargs)` is called without gradients, several times a layer.
        batch: its arguments: some tens of samples.
        tolerance: how far the variance may be from 1.
        iterations: the most divisions a layer gets. One is enough where the output has no bias.
        layers: which; by default every linear and convolutional layer that the model calls.
        orthogonal: whether to begin with orthogonal weights.
        kwargs: keyword arguments of the model.

    Returns:
        The layers' names -> the variance reached, and the number of divisions.

    Raises:
        TypeError: one of `layers` is not linear or convolutional.
        ValueError: the tolerance or `iterations` is not positive; a layer of `layers` is not in the model, or not called by it;
            the model calls no layer; a weight is parametrized.
        RuntimeError: the variance of a layer is zero or not finite, or still not 1 after all iterations.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> list(lsuv_(model, torch.randn(64, 8)))
        ['0', '2']
    """
    if not tolerance > 0:
        raise ValueError(f"lsuv_: tolerance={tolerance} must be more than 0")
    if iterations < 1:
        raise ValueError(f"lsuv_: iterations={iterations} must be 1 or more")
    names = {module: name for name, module in model.named_modules()}
    chosen = list(layers) if layers is not None else [m for m in names if isinstance(m, _WEIGHTED)]
    for layer in chosen:
        if layer not in names:
            raise ValueError(f"lsuv_: layers has a {type(layer).__name__} that is not in the model")
        if not isinstance(layer, _WEIGHTED):
            raise TypeError(f"lsuv_: layer {names[layer]!r} is a {type(layer).__name__}, neither linear nor convolutional")
        if is_parametrized(layer, "weight"):
            raise ValueError(f"lsuv_: the weight of layer {names[layer]!r} is parametrized: initialise before parametrizing")

    buffers = [(b, b.clone()) for b in model.buffers()]

    def run(*hooked: nn.Module, hook: Callable[..., Any]) -> None:
        handles = [m.register_forward_hook(hook) for m in hooked]
        try:
            with torch.no_grad():
                model(*batch, **kwargs)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for b, was in buffers:
                    b.copy_(was)

    order: dict[nn.Module, None] = {}
    run(*chosen, hook=lambda module, _, output: order.setdefault(module))
    if layers is not None and (missed := [names[m] or "(model)" for m in chosen if m not in order]):
        raise ValueError(f"lsuv_: the model does not call {', '.join(missed)} on this batch")
    if not order:
        raise ValueError("lsuv_: the model calls no linear or convolutional layer on this batch")

    def variance(layer: nn.Module) -> float:
        seen: list[float] = []

        def hook(module: Any, _: Any, output: Tensor) -> None:
            seen.append(float(output.detach().double().var(correction=0)))
            raise _Reached

        run(layer, hook=hook)
        return seen[0]

    done = {}
    for layer in order:
        weight, name = layer.weight, names[layer]
        assert isinstance(weight, Tensor)
        if orthogonal:
            nn.init.orthogonal_(weight)
        v, k = variance(layer), 0
        while not abs(v - 1) <= tolerance:
            if not 0 < v < float("inf"):
                raise RuntimeError(f"lsuv_: the output of layer {name!r} has variance {v}: its input or weight is degenerate")
            if k == iterations:
                raise RuntimeError(f"lsuv_: layer {name!r} has variance {v:.4g} after {k} iterations, not 1 ± {tolerance}")
            with torch.no_grad():
                weight.div_(v**0.5)
            v, k = variance(layer), k + 1
        done[name] = Scaled(v, k)
    return done
