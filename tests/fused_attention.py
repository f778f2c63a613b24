"""What the tests of attention's kernels share: both rules at sizes and options."""

from __future__ import annotations

import torch
from fused import both_rules, normal

from bptoolkit.ops.attention_rule import RULE
from bptoolkit.ops.attention_tiles import EVERYWHERE


def run(L, S, E=8, EV=None, *, B=(1, 2), shared=None, dtype=torch.float32, device="cpu", need="qkv", errors=40, **kw):
    """Both rules at sizes and options; shared: the batch dimensions of k and v."""
    q, k, v = (
        normal(*b, n, e, dtype=dtype, device=device, seed=s)
        for s, (b, n, e) in enumerate(((B, L, E), (shared or B, S, E), (shared or B, S, EV or E)))
    )
    return run_of(q, k, v, need=need, errors=errors, **kw)


def run_of(q, k, v, *, need="qkv", errors=40, m=None, slopes=None, lengths=None, window=EVERYWHERE, scale=None, cap=0.0, **kw):
    """need: letters of q, k, v, m, slopes."""
    wanted = [*(x in need for x in "qkvms"), *(False,) * 4]
    args = (q, k, v, m, slopes, lengths, None, None, None, window, scale, cap, 0.0)
    return both_rules(RULE, *args, need=wanted, errors=errors, cotangents=kw)
