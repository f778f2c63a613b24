"""What the character model is printed beside: general compressors, and an n-gram model."""

from __future__ import annotations

import bz2
import lzma
import math
import zlib

import numpy as np


def bits_per_character(train: np.ndarray, text: np.ndarray, classes: int) -> dict[str, float]:
    """Name -> bits per character of `text`; only the 5-gram sees `train`. Both are arrays of classes below 256."""
    raw, n = text.astype(np.uint8).tobytes(), len(text)
    return {
        "zlib": 8 * len(zlib.compress(raw, 9)) / n,
        "bz2": 8 * len(bz2.compress(raw, 9)) / n,
        "xz": 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / n,
        "5-gram": ngram(train, text, classes, 5),
    }


def ngram(train: np.ndarray, text: np.ndarray, classes: int, order: int) -> float:
    """Bits per character of an interpolated n-gram model with Witten-Bell smoothing.

    p(c | h) = (N(hc) + T(h) p(c | h')) / (N(h) + T(h)): N counts in `train`, T(h) is how many different characters followed
    h there, h' is h without its oldest character, and the empty history backs off to 1 / classes.

    Source: Witten & Bell, "The zero-frequency problem", 1991, method C; interpolated as in Chen & Goodman 1998, §2.6.
    """
    p = np.full(len(text), 1 / classes)
    for k in range(1, order + 1):
        grams, N = np.unique(_codes(train, k, classes), return_counts=True)
        starts = np.flatnonzero(np.diff(grams // classes, prepend=-1))  # grams of one history are neighbours
        histories, N_h = grams[starts] // classes, np.add.reduceat(N, starts)
        T_h = np.diff(starts, append=len(grams))
        here = _codes(text, k, classes)
        n, n_h, t_h = _at(grams, N, here), _at(histories, N_h, here // classes), _at(histories, T_h, here // classes)
        seen, longer = n_h > 0, p[k - 1 :]  # the first k - 1 characters have no history so long
        longer[seen] = (n[seen] + t_h[seen] * longer[seen]) / (n_h[seen] + t_h[seen])
    return float(-np.log(p).mean() / math.log(2))


def _codes(text: np.ndarray, k: int, classes: int) -> np.ndarray:
    """Each run of k characters as one number."""
    codes = np.zeros(max(len(text) - k + 1, 0), np.int64)
    for j in range(k):
        codes = codes * classes + text[j : len(text) - k + 1 + j]
    return codes


def _at(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The count of each wanted key; 0 if it is not there. `keys` are sorted."""
    k = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[k] == wanted, counts[k], 0)
