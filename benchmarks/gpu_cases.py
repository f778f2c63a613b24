"""The calls that `make gpu` times: op -> label -> what draws its arguments, at sizes at which a GPU is busy.

A tensor of 2²⁶ elements takes 128 MiB in bfloat16, more than an H200's cache. `toy` divides every size that may be divided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bptoolkit.cases import Case, Draw

ELEMENTS = 1 << 26
Make = Callable[[Draw, int], Case]


def rows(columns: int) -> int:
    return max(1, ELEMENTS // columns)


def toyed(n: int, toy: int) -> int:
    """N, or in a rehearsal a small part of it."""
    return max(2, n // toy)


def norm(columns: int, bias: bool, residual: bool = False, **kw: Any) -> Make:
    def make(d: Draw, toy: int) -> Case:
        M, N = toyed(rows(columns), toy * toy), toyed(columns, toy)
        summand = (d.tensor(M, N),) if residual else ()
        scale = (d.tensor(N), d.tensor(N)) if bias else (d.tensor(N),)
        return Case((d.tensor(M, N), *summand, (N,), *scale), dict(kw))

    return make


def matrix(columns: int, *args: Any, tensors: int = 1, **kw: Any) -> Make:
    def make(d: Draw, toy: int) -> Case:
        shape = toyed(rows(columns), toy * toy), toyed(columns, toy)
        return Case((*(d.tensor(*shape) for _ in range(tensors)), *args), dict(kw))

    return make


def each(make: Callable[..., Make], *columns: int, **kw: Any) -> dict[str, Make]:
    return {f"{n} columns": make(n, **kw) for n in columns}


def cross_entropy(d: Draw, toy: int, **kw: Any) -> Case:
    N, C = toyed(8192, toy * toy), toyed(131072, toy * toy)
    return Case((d.tensor(N, C), d.integers(0, C, N)), dict(kw))


def linear_cross_entropy(tokens: int) -> Make:
    def make(d: Draw, toy: int) -> Case:
        N, I, C = toyed(tokens, toy * toy), toyed(4096, toy * toy), toyed(131072, toy * toy)
        return Case((d.tensor(N, I), d.tensor(C, I, scale=I**-0.5), d.integers(0, C, N)), {})

    return make


def bias_activation(name: str) -> Make:
    def make(d: Draw, toy: int) -> Case:
        M, N = toyed(rows(4096), toy * toy), toyed(4096, toy)
        return Case((d.tensor(M, N), d.tensor(N), name), {})

    return make


def gated_mlp(d: Draw, toy: int) -> Case:
    N, I, H = toyed(8192, toy * toy), toyed(4096, toy * toy), toyed(14336, toy * toy)
    return Case((d.tensor(N, I), *(d.tensor(*s, scale=s[1] ** -0.5) for s in ((H, I), (H, I), (I, H)))), {})


def mlp(d: Draw, toy: int) -> Case:
    N, I, H = toyed(8192, toy * toy), toyed(4096, toy * toy), toyed(16384, toy * toy)
    return Case((d.tensor(N, I), d.tensor(H, I, scale=I**-0.5), d.tensor(H), d.tensor(I, H, scale=H**-0.5), d.tensor(I)), {})


def rotary(interleaved: bool) -> Make:
    def make(d: Draw, toy: int) -> Case:
        L, E = toyed(4096, toy * toy), 128 if toy == 1 else 8
        angle = d.tensor(L, E // 2, grad=False)
        return Case((d.tensor(toyed(4, toy), toyed(32, toy), L, E), angle.cos(), angle.sin()), {"interleaved": interleaved})

    return make


def images(n: int, c: int, h: int, *, last: bool = False) -> Callable[[Draw, int], Any]:
    def make(d: Draw, toy: int) -> Any:
        import torch

        x = d.tensor(toyed(n, toy), toyed(c, toy), toyed(h, toy), toyed(h, toy), grad=False)
        return (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()

    return make


def batch_norm(last: bool) -> Make:
    def make(d: Draw, toy: int) -> Case:
        x = images(64, 256, 56, last=last)(d, toy)
        C = x.shape[1]
        return Case((x, None, None, d.tensor(C), d.tensor(C)), {"training": True})

    return make


def group_norm(d: Draw, toy: int) -> Case:
    x = images(64, 256, 56)(d, toy)
    return Case((x, 2, d.tensor(x.shape[1]), d.tensor(x.shape[1])), {})


def depthwise(last: bool) -> Make:
    def make(d: Draw, toy: int) -> Case:
        x = images(64, 256, 56, last=last)(d, toy)
        return Case((x, d.tensor(x.shape[1], 1, 3, 3), d.tensor(x.shape[1])), {"padding": 1, "groups": x.shape[1]})

    return make


def convolution_activation(d: Draw, toy: int) -> Case:
    x = images(64, 256, 56, last=True)(d, toy)
    C = x.shape[1]
    return Case((x, d.tensor(C, C, 3, 3, scale=(9 * C) ** -0.5), d.tensor(C)), {"padding": 1})


def convolution_batch_norm_relu(d: Draw, toy: int) -> Case:
    x = images(64, 256, 56, last=True)(d, toy)
    C = x.shape[1]
    w = d.tensor(C, C, 3, 3, scale=(9 * C) ** -0.5)
    return Case((x, w, None, None, None, d.tensor(C), d.tensor(C), 1, 1), {"training": True})


def causal_conv1d(d: Draw, toy: int) -> Case:
    B, D, L = toyed(8, toy), toyed(4096, toy * toy), toyed(4096, toy * toy)
    return Case((d.tensor(B, D, L), d.tensor(D, 4), d.tensor(D)), {"activation": "silu"})


def max_pool2d(d: Draw, toy: int) -> Case:
    return Case((images(64, 64, 112)(d, toy), 3, 2, 1), {})


def embedding(d: Draw, toy: int) -> Case:
    V, E, N = toyed(131072, toy * toy), toyed(4096, toy * toy), toyed(16384, toy * toy)
    return Case((d.integers(0, V, N), d.tensor(V, E)), {})


def linear_recurrence(T: int, B: int, N: int) -> Make:
    def make(d: Draw, toy: int) -> Case:
        shape = toyed(T, toy * toy), toyed(B, toy) if B > 1 else 1, toyed(N, toy)
        return Case((d.tensor(*shape, scale=0.25), d.tensor(*shape)), {})

    return make


def min_rnn(blocks: int, T: int, B: int, H: int) -> Make:
    def make(d: Draw, toy: int) -> Case:
        T_, B_, H_ = toyed(T, toy * toy), toyed(B, toy), toyed(H, toy)
        return Case((d.tensor(T_, B_, H_), None, [d.tensor(blocks * H_, H_, scale=H_**-0.5), d.tensor(blocks * H_)]), {})

    return make


def recurrent(gates: int, H: int, ragged: bool = False) -> Make:
    """512 steps of 64 rows, I = H; ragged, rows of any length."""

    def make(d: Draw, toy: int) -> Case:
        T, B, N = toyed(512, toy * toy), toyed(64, toy), toyed(H, toy)
        shapes = ((gates * N, N), (gates * N, N), (gates * N,), (gates * N,))
        weights = [d.tensor(*s, scale=N**-0.5) for s in shapes]
        return Case((d.tensor(T, B, N), None, weights), {"lengths": d.integers(1, T + 1, B)} if ragged else {})

    return make


def attention(L: int, E: int, causal: bool) -> Make:
    def make(d: Draw, toy: int) -> Case:
        shape = toyed(16384 // L, toy), toyed(16, toy), toyed(L, toy), toyed(E, 4 if toy > 1 else 1)
        return Case(tuple(d.tensor(*shape) for _ in range(3)), {"is_causal": causal})

    return make


WIDTHS = (1024, 4096, 16384, 65536)
CASES: Mapping[str, Mapping[str, Make]] = {
    "layer_norm": each(norm, *WIDTHS, bias=True),
    "rms_norm": each(norm, *WIDTHS, bias=False),
    "add_layer_norm": each(norm, 4096, 16384, bias=True, residual=True),
    "add_rms_norm": each(norm, 4096, 16384, bias=False, residual=True),
    "dropout_add_layer_norm": each(norm, 4096, bias=True, residual=True, p=0.1),
    "dropout_add_rms_norm": each(norm, 4096, bias=False, residual=True, p=0.1),
    "group_norm": {"images": group_norm},
    "batch_norm": {"images": batch_norm(False), "channels last": batch_norm(True)},
    "batch_norm_relu": {"images": batch_norm(False), "channels last": batch_norm(True)},
    "softmax": {f"{n} columns": matrix(n, -1) for n in WIDTHS},
    "log_softmax": {f"{n} columns": matrix(n, -1) for n in WIDTHS},
    "softmin": {"4096 columns": matrix(4096, -1)},
    "cross_entropy": {
        "131072 classes": cross_entropy,
        "smoothed": lambda d, toy: cross_entropy(d, toy, label_smoothing=0.1),
        "z-loss, soft cap": lambda d, toy: cross_entropy(d, toy, z_loss=1e-4, softcap=30.0),
    },
    "linear_cross_entropy": {f"{n} tokens": linear_cross_entropy(n) for n in (4096, 16384, 32768)},
    "relu": {"4096 columns": matrix(4096)},
    "gelu": {"4096 columns": matrix(4096)},
    "silu": {"4096 columns": matrix(4096)},
    "tanh": {"4096 columns": matrix(4096)},
    "sigmoid": {"4096 columns": matrix(4096)},
    "glu": {"8192 columns": matrix(8192)},
    "swiglu": {"14336 columns": matrix(14336, tensors=2)},
    "geglu": {"14336 columns": matrix(14336, tensors=2)},
    "reglu": {"14336 columns": matrix(14336, tensors=2)},
    "bias_activation": {name: bias_activation(name) for name in ("relu", "gelu", "silu")},
    "gated_mlp": {"8192 tokens": gated_mlp},
    "mlp": {"8192 tokens": mlp},
    "rotary_embedding": {"halves": rotary(False), "interleaved": rotary(True)},
    "dropout": {"4096 columns": matrix(4096, 0.1, True)},
    "causal_conv1d": {"state-space model": causal_conv1d},
    "conv2d": {"depthwise": depthwise(False), "depthwise, channels last": depthwise(True)},
    "conv2d_activation": {"3 × 3": convolution_activation},
    "conv2d_batch_norm_relu": {"3 × 3": convolution_batch_norm_relu},
    "scaled_dot_product_attention": {
        f"L {L}, E {E}{', causal' * causal}": attention(L, E, causal)
        for L, E, causal in ((1024, 64, False), (4096, 128, False), (4096, 128, True), (16384, 128, True))
    },
    "max_pool2d": {"112 × 112": max_pool2d},
    "embedding": {"131072 rows": embedding},
    "linear_recurrence": {
        "4096 steps": linear_recurrence(4096, 8, 2048),
        "65536 steps of 64 elements": linear_recurrence(65536, 1, 64),
    },
    "min_gru": {"1024 steps": min_rnn(2, 1024, 32, 1024)},
    "min_lstm": {"1024 steps": min_rnn(3, 1024, 32, 1024)},
    **{
        name: {
            f"{H} units{', ragged' * ragged}": recurrent(gates, H, ragged)
            for H, ragged in ((64, False), (128, False), (128, True), (512, False), (512, True), (1024, False))
        }
        for name, gates in (("lstm", 4), ("gru", 3), ("rnn", 1))
    },
}
"""Ops that share a kernel with one that is here (softmin, dropout2d ...) need no row of their own."""
