"""log(1 + x), eˣ − 1 and tanh of float32 values, right to the last digits near 0 too; Triton has them in libdevice alone."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """For x ≥ 0. The rounding of 1 + x is that of the logarithm's argument and of the divisor alike, and cancels."""
    y = 1 + x
    near = tl.where(y == 1, 1.0, y - 1)
    return tl.where(y == 1, x, tl.where(y == float("inf"), y, tl.log(y) * (x / near)))


@triton.jit
def expm1(x):
    """For x ≤ 0. By the same trick, of the exponential."""
    y = tl.exp(x)
    log = tl.where((y == 1) | (y == 0), 1.0, tl.log(y))
    return tl.where(y == 1, x, tl.where(y < 0.5, y - 1, (y - 1) * (x / log)))


@triton.jit
def tanh(x):
    """A polynomial near 0 (Cephes' tanhf), and by e^−2|x| elsewhere."""
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    far = (1 - e) / (1 + e)
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1
    return tl.where(a < 0.625, x + x * (z * p), tl.where(x < 0, -far, far))


@triton.jit
def tanh_slope(x):
    """1 − tanh², which does not vanish by rounding where tanh is almost 1."""
    e = tl.exp(-2 * tl.abs(x))
    return 4 * e / ((1 + e) * (1 + e))
