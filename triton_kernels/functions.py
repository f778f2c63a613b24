"""Elementwise functions that kernels share, of float32 values in registers. For the maths see `bptoolkit.ops.activation`."""

import triton
import triton.language as tl


@triton.jit
def sigmoid_slope(x):
    return tl.sigmoid(x) * tl.sigmoid(-x)  # not s (1 − s), which is 0 where s rounds to 1


@triton.jit
def tanh(x):
    """A polynomial near 0, where 1 − 2/(e²ˣ + 1) cancels: within two units in the last place."""
    a, x2 = tl.abs(x), x * x
    p = 0.0206390861421824 - 0.0057049868628383 * x2
    p = -0.33333280682563782 + x2 * (0.13331441581249237 + x2 * (-0.05373971536755562 + x2 * p))
    t = 1 - 2 / (tl.exp(2 * a) + 1)
    return tl.where(a < 0.625, x + x * (x2 * p), tl.where(x < 0, -t, t))


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_slope(x):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def gelu(x):
    return x * (0.5 * (1 + tl.erf(x * 0.7071067811865476)))  # 1/√2


@triton.jit
def gelu_slope(x):
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))  # 1/√(2π)


@triton.jit
def gelu_tanh(x):
    return x * tl.sigmoid(1.5957691216057308 * (x * (1 + 0.044715 * x * x)))  # 2√(2/π)


@triton.jit
def gelu_tanh_slope(x):
    x2 = x * x
    z = 1.5957691216057308 * (x * (1 + 0.044715 * x2))
    s, t = tl.sigmoid(z), tl.sigmoid(-z)  # t = 1 − s, which would lose digits just where the last factor is large
    return s * (1 + x * t * (1.5957691216057308 * (1 + 3 * 0.044715 * x2)))


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # lets NaN through


@triton.jit
def relu_slope(x):
    return tl.where(x <= 0, 0.0, 1.0)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of a name: "relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", or "identity"."""
    if NAME == "relu":
        x = relu(x)
    elif NAME == "silu":
        x = silu(x)
    elif NAME == "gelu":
        x = gelu(x)
    elif NAME == "gelu_tanh":
        x = gelu_tanh(x)
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "tanh":
        x = tanh(x)
    return x


@triton.jit
def chain(dy, x, NAME: tl.constexpr):
    """dx from dy at x. A relu that is off blocks any dy, infinite ones too."""
    if NAME == "relu":
        dy = tl.where(x <= 0, 0.0, dy)
    elif NAME == "silu":
        dy = dy * silu_slope(x)
    elif NAME == "gelu":
        dy = dy * gelu_slope(x)
    elif NAME == "gelu_tanh":
        dy = dy * gelu_tanh_slope(x)
    elif NAME == "sigmoid":
        dy = dy * sigmoid_slope(x)
    return dy
