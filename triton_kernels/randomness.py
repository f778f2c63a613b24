"""The random masks of `bptoolkit.randomness` inside a kernel: the same bits for the same seed and place."""

import triton
import triton.language as tl


@triton.jit
def hashed(i, seed):
    """The hash, int32, of element i (int64). seed: pointer to two int32."""
    k0 = tl.load(seed).to(tl.uint32, bitcast=True)
    k1 = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    return mixed(i.to(tl.uint32), k0, k1 ^ ((i >> 32).to(tl.uint32) * 0x9E3779B9))


@triton.jit
def mixed(i, k0, k1):
    """The hash, int32, of i with two keys, all uint32."""
    h = i * 0x9E3779B9 + k0
    h = h ^ (h >> 17)
    h = (h * 0xED5AD4BB) ^ k1
    h = h ^ (h >> 11)
    h = h * 0xAC4C1B51
    h = h ^ (h >> 15)
    h = h * 0x31848BAB
    return h.to(tl.int32, bitcast=True)


@triton.jit
def keep(i, seed, threshold):
    """Whether element i (int64) is kept.

    seed: pointer to two int32. threshold: `bptoolkit.randomness.threshold(p)`, an int32; at p = 0 everything is kept, which the
    launcher sees to.
    """
    return hashed(i, seed) < threshold


@triton.jit
def keep_in_row(columns, keys, threshold):
    """Whether columns (int32) of rows with keys of `hashed` are kept: `bptoolkit.randomness.hashed_rows`."""
    k = keys.to(tl.uint32, bitcast=True)
    return mixed(columns.to(tl.uint32), k, k * 0x31848BAB) < threshold
