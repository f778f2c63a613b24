"""Monte Carlo arithmetic: a mode under which every rounding of a torch program is drawn at random.

A correct implementation in a dtype of unit roundoff u makes a relative error of at most u in every operation. Under
`Arithmetic` each floating-point result t becomes t + a·xi·t, with xi uniform in (-1, 1) and a an amplitude of the caller's
choice, so that the spread of a few runs shows how such errors travel to the outputs: through cancellation, conditioning and
composition, element by element, with nothing known about the function. [Parker, Monte Carlo Arithmetic, UCLA CSD-970002, 1997]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Results that are some of the operands' elements, or computed from them without rounding.
EXACT = _names(
    """
    abs absolute alias amax amin aminmax arange as_strided as_strided_scatter atleast_1d bernoulli broadcast_tensors
    cat ceil chunk clamp clamp_max clamp_min clone col2im constant_pad_nd contiguous copy copysign cummax cummin
    detach diag diag_embed diagonal diagonal_backward diagonal_scatter dropout embedding embedding_renorm empty
    empty_like empty_strided expand expand_copy eye fill fill_diagonal flip floor fmax fmin frac full full_like gather
    hardtanh hardtanh_backward heaviside hstack im2col index index_copy index_fill index_select is_same_size isclose
    kthvalue lift lift_fresh lift_fresh_copy masked_fill masked_scatter masked_select max maximum median min minimum
    mode movedim nan_to_num nanmedian narrow_copy neg negative new_empty new_empty_strided new_full new_ones new_zeros
    nonzero one_hot ones ones_like permute_copy pixel_shuffle pixel_unshuffle positive rand rand_like randint
    randint_like randn randn_like randperm reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d resize_ roll round scalar_tensor scatter
    select_backward select_copy select_scatter set_ sgn sign slice_backward slice_copy slice_scatter sort split_copy
    split_with_sizes_copy squeeze_copy stack t_copy take threshold threshold_backward topk transpose_copy tril triu
    trunc unfold_backward unsafe_split unsafe_split_with_sizes unsqueeze_copy upsample_nearest1d upsample_nearest2d
    upsample_nearest3d view_copy _unsafe_view _to_copy _adaptive_max_pool2d adaptive_max_pool2d adaptive_max_pool3d
    max_pool2d_with_indices max_pool3d_with_indices _unsafe_index _unsafe_masked_index _reshape_copy
    _local_scalar_dense _copy_from where zero zeros zeros_like _index_put_impl _fused_dropout logical_not equal copy_
    zero_ fill_
    """
)

# Fused formulas without kinks, which are taken apart so that the roundings inside them count.
FUSED = _names(
    """
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm
    native_batch_norm_backward _native_batch_norm_legit _native_batch_norm_legit_functional cudnn_batch_norm
    _fused_rms_norm _fused_rms_norm_backward _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data
    _safe_softmax logsumexp gelu gelu_backward silu silu_backward mish mish_backward softplus softplus_backward
    log_sigmoid_forward log_sigmoid_backward glu glu_backward mse_loss mse_loss_backward binary_cross_entropy
    binary_cross_entropy_backward binary_cross_entropy_with_logits soft_margin_loss soft_margin_loss_backward
    tanh_backward sigmoid_backward logit_backward addcmul addcdiv lerp _euclidean_dist std var_mean std_mean
    _scaled_dot_product_flash_attention_for_cpu baddbmm addmv addbmm addr
    """
)
SHORT = 16  # below this length the error of a sum is that of its terms
LONGEST = 4096  # sums are blocked: no running sum is longer than this

_kinds: dict[Any, tuple[str, Any]] = {}


def _odd(seed: int, number: int) -> int:
    """A pseudorandom odd number of 63 bits. [Steele, Lea, Flood, splitmix64, OOPSLA 2014]"""
    z = (seed * 0xD1342543DE82EF95 + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1 | 1


class Arithmetic(TorchDispatchMode):
    """Perturb every floating-point result.

    Args:
        seed: of the xi; the global generator is not touched.
        amplitude: the relative error, a.
        tiny: below this magnitude the error no longer shrinks with the result (gradual underflow); 0 for none.
        wide_sums: sums are accumulated in a wider dtype than the results have, so that their length does not matter.
        grid: round to the numbers of this dtype as well: ties are common there, and have no chance among the reals.

    Attributes:
        narrowed: the coarsest eps of the dtypes that the program casts wider tensors to, or 0.0.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        seed: int,
        amplitude: float,
        tiny: float = 0.0,
        wide_sums: bool = True,
        grid: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self._seed, self.amplitude, self.tiny, self.wide_sums = seed, amplitude, tiny, wide_sums
        self._drawn = 0  # how many xi
        self.narrowed = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = _kinds.get(func)
        if known is None:
            known = _kinds[func] = _kind(func)
        kind, formula = known
        if kind == "apart":
            drawn = self._drawn
            try:
                with self:
                    result = formula(*args, **kwargs)
            except (RuntimeError, TypeError, AttributeError, AssertionError, ValueError, LookupError, ArithmeticError):
                result = NotImplemented
            if result is not NotImplemented:
                return result
            kind, self._drawn = "rounds", drawn
        result = func(*args, **kwargs)
        if kind == "exact":
            return result
        if kind == "rounds":
            return self.perturbed(result)
        if kind == "sums":
            return self.perturbed(result) if self.wide_sums else self._summed(formula, func, args, kwargs, result)
        if kind == "writes":
            for where in formula:
                target = args[where] if isinstance(where, int) and where < len(args) else kwargs.get(where)
                for t in target if isinstance(target, (list, tuple)) else (target,):
                    if isinstance(t, Tensor):
                        self._perturb_(t)
            return result
        self._cast(args[0], result)
        return result

    def perturbed(self, result: Any) -> Any:
        """A result with its rounding error: a tensor, or tensors in a tuple or list; anything else comes back as it is."""
        if isinstance(result, Tensor):
            if not result.is_floating_point() or not result.numel() or result._is_zerotensor():
                return result
            moved = torch.addcmul(result, self._reach(result), self.xi(result), value=self.amplitude)
            return moved if self.grid is None else moved.to(self.grid).to(moved.dtype)
        if isinstance(result, (tuple, list)):
            return type(result)(self.perturbed(r) for r in result) if type(result) in (tuple, list) else result
        return result

    def xi(self, t: Tensor) -> Tensor:
        """Uniform in (-1, 1), of the shape of a tensor, and a function of its values: what is equal is rounded alike.

        A hash of the leading 22 bits of the mantissa and the exponent, so that it stays the same when the amplitude changes.
        """
        self._drawn += 1
        wide = t if t.dtype is torch.float64 else t.double()
        bits = wide.view(torch.int64).add(1 << 29).bitwise_right_shift_(30).mul_(_odd(self._seed, self._drawn))
        return bits.to(torch.float64).mul_(2.0**-63).to(t.dtype)

    def _reach(self, t: Tensor) -> Tensor:
        """The error of a result at xi = 1, over the amplitude: the result, and for one that is not 0 at least `tiny`.

        Finite, so that infinity stays what it is: -inf is what a mask writes, and -inf + inf would be NaN.
        """
        most = torch.finfo(t.dtype).max
        reach = t.clamp(-most, most)
        return reach.add_(t.sign(), alpha=self.tiny) if self.tiny else reach

    def _perturb_(self, t: Tensor) -> None:
        if t.is_floating_point() and t.numel() and not t._is_zerotensor():
            t.addcmul_(self._reach(t), self.xi(t), value=self.amplitude)

    def _summed(self, growth: Callable[..., Any], func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """The result of a sum of K terms with the errors of its running sums: sqrt(K/2) times that of a single addition."""
        extra = growth(func, args, kwargs, result)
        result = self.perturbed(result)
        if extra is None:
            return result
        if isinstance(result, Tensor):
            return result.addcmul_(extra[0], self.xi(result), value=self.amplitude)
        for r, e in zip(result, extra):
            if isinstance(r, Tensor) and e is not None:
                r.addcmul_(e, self.xi(r), value=self.amplitude)
        return result

    def _cast(self, source: Any, result: Any) -> None:
        """Note a cast of a floating-point tensor to a narrower dtype: the program is then no more exact than that."""
        if (
            isinstance(source, Tensor)
            and isinstance(result, Tensor)
            and source.is_floating_point()
            and result.is_floating_point()
        ):
            eps = torch.finfo(result.dtype).eps
            if eps > torch.finfo(source.dtype).eps:
                self.narrowed = max(self.narrowed, eps)


def _kind(func: Any) -> tuple[str, Any]:
    """How an operator is treated: apart (with its formula), exact, writes (to which arguments), sums, casts, or rounds."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return "exact", None  # a higher-order operator: what it calls comes here by itself
    space, name = schema.name.split("::", 1)
    if space == "aten" and name == "_to_copy":
        return "casts", None
    base = name.removesuffix("_") if name not in EXACT else name
    if torch.Tag.nondeterministic_seeded in func.tags or (space == "aten" and (name in EXACT or base in EXACT)):
        return "exact", None
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return "exact", None  # a view
    if space == "aten" and name in ("index_put", "index_put_", "scatter_reduce"):
        return ("writes", (0,)) if name.endswith("_") else ("rounds", None)
    written = [k for k, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if written:
        arguments = schema.arguments
        return "writes", tuple(arguments[k].name if arguments[k].kwarg_only else k for k in written)
    if space == "aten" and name in FUSED:
        from torch._decomp import decomposition_table

        formula = decomposition_table.get(func)
        if formula is not None:
            return "apart", formula
    if space == "aten" and name in _GROWTH:
        return "sums", _GROWTH[name]
    return "rounds", None


def _scale(squares: Tensor, result: Tensor, length: int) -> Tensor:
    """sqrt(K/2)·sqrt(sum of the squared terms + result²): the root of the sum of the squares of the K running sums."""
    return squares.add_(result.square()).mul_(min(length, LONGEST) / 2).sqrt_()


def _product(first: int) -> Callable[..., Any]:
    def growth(func: Any, args: Any, kwargs: Any, result: Tensor) -> Any:
        a, b = args[first], args[first + 1]
        if a.shape[-1] < SHORT or not result.numel():
            return None
        return (_scale(torch.matmul(a.square(), b.square()), result, a.shape[-1]),)

    return growth


def _sum(func: Any, args: Any, kwargs: Any, result: Tensor) -> Any:
    x = args[0]
    length = x.numel() // max(result.numel(), 1)
    if length < SHORT or not x.is_floating_point():
        return None
    squares = func(x.square(), *args[1:], **kwargs)
    return (_scale(squares / length if func._schema.name == "aten::mean" else squares, result, length),)


def _convolution(func: Any, args: Any, kwargs: Any, result: Tensor) -> Any:
    x, w = args[0], args[1]
    length = w.numel() // max(w.shape[0], 1)
    if length < SHORT or not result.numel():
        return None
    return (_scale(func(x.square(), w.square(), None, *args[3:], **kwargs), result, length),)


def _convolution_backward(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    dy, x, w = args[:3]
    lengths = (w.numel() // max(min(w.shape[:2]), 1), dy.numel() // max(dy.shape[1], 1), dy.numel() // max(dy.shape[1], 1))
    if max(lengths) < SHORT or not dy.numel():
        return None
    squares = func(dy.square(), x.square(), w.square(), *args[3:], **kwargs)
    return tuple(None if r is None else _scale(s, r, k) for s, r, k in zip(squares, result, lengths))


_GROWTH: dict[str, Callable[..., Any]] = {
    "mm": _product(0),
    "bmm": _product(0),
    "mv": _product(0),
    "dot": _product(0),
    "addmm": _product(1),
    "sum": _sum,
    "mean": _sum,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
