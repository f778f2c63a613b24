"""What the tests of attention's kernels share: both rules at sizes and options."""

from __future__ import annotations

import torch
from fused import both_rules, normal

from bptoolkit.ops.attention_rule import PACKED_RULE, RULE
from bptoolkit.ops.attention_tiles import EVERYWHERE


def run(L, S, E=8, EV=None, *, B=(1, 2), shared=None, dtype=torch.float32, device="cpu", need="qkv", errors=40, **kw):
    """Both rules at sizes and options; shared: the batch dimensions of k and v."""
    q, k, v = (
        normal(*b, n, e, dtype=dtype, device=device, seed=s)
        for s, (b, n, e) in enumerate(((B, L, E), (shared or B, S, E), (shared or B, S, EV or E)))
    )
    return run_of(q, k, v, need=need, errors=errors, **kw)


def run_of(q, k, v, *, need="qkv", errors=40, window=EVERYWHERE, scale=None, cap=0.0, p=0.0, **given):
    """need: letters of q, k, v, m, slopes; given: further inputs of the rule by name, and cotangents."""
    wanted = [*(x in need for x in "qkvms"), *(False,) * 4]
    others = [given.pop(name, None) for name in ("m", "slopes", "lengths", "seed", "cu_q", "cu_k")]
    rule = RULE if others[4] is None else PACKED_RULE
    return both_rules(rule, q, k, v, *others, window, scale, cap, p, need=wanted, errors=errors, cotangents=given)
