"""Functions of torch.nn.functional that are held to be right: the verifier must raise no alarm on them.

Each is verified against itself, so that in float64 the values agree; what is tested is whether the error model takes torch's
own float32, bfloat16 and float16 arithmetic for rounding, and whether any property alarms on layouts, subsets, second order,
transforms. Inputs are a shapes string where any values will do, else example tensors that show their kind (probabilities,
indices, signs).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

G = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=G, dtype=torch.float64)


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=G)


def signs(*shape: int) -> torch.Tensor:
    return torch.where(rand(*shape) < 0.5, -1.0, 1.0).double()


def frozen(t: Any) -> Any:
    """An argument that is not differentiated by."""
    return t.detach()


def learnt(*shape: int) -> torch.Tensor:
    return randn(*shape).requires_grad_()


ELEMENTWISE = [
    F.relu,
    F.relu6,
    F.elu,
    F.selu,
    F.celu,
    F.gelu,
    F.silu,
    F.mish,
    F.softplus,
    F.softsign,
    F.tanhshrink,
    F.hardtanh,
    F.hardswish,
    F.hardsigmoid,
    F.logsigmoid,
    F.leaky_relu,
    F.tanh,
    F.sigmoid,
    F.hardshrink,
    F.softshrink,
    partial(F.gelu, approximate="tanh"),
    partial(F.threshold, threshold=0.1, value=20.0),
]
ROWS = [
    partial(F.softmax, dim=-1),
    partial(F.log_softmax, dim=-1),
    partial(F.softmin, dim=-1),
    partial(F.normalize, dim=-1),
]
FUNCTIONS: dict[str, tuple[Callable[..., Any], Any]] = {
    **{
        f"{f.func.__name__} {f.keywords}" if isinstance(f, partial) else f.__name__: (f, "x: *B N -> *B N") for f in ELEMENTWISE
    },
    **{f.func.__name__: (f, "x: B N -> B N") for f in ROWS},
    "glu": (F.glu, (learnt(3, 6),)),
    "prelu": (F.prelu, (learnt(3, 4), learnt(4))),
    "linear": (F.linear, "input: *B I, weight: O I, bias: O -> *B O"),
    "bilinear": (F.bilinear, "a: B I, b: B J, weight: O I J, bias: O -> B O"),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), "x: B N, w: N, b: N -> B N"),
    "rms_norm": (lambda x, w: F.rms_norm(x, x.shape[-1:], w, eps=1e-5), "x: B N, w: N -> B N"),
    "group_norm": (partial(F.group_norm, num_groups=2), (learnt(3, 4, 5),)),
    "instance_norm": (F.instance_norm, (learnt(3, 4, 5),)),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (learnt(6, 4), learnt(4), learnt(4))),
    "local_response_norm": (partial(F.local_response_norm, size=3), (learnt(2, 5, 4),)),
    "conv1d": (F.conv1d, (learnt(2, 3, 9), learnt(4, 3, 3), learnt(4))),
    "conv2d": (partial(F.conv2d, padding=1), (learnt(2, 3, 7, 6), learnt(4, 3, 3, 3), learnt(4))),
    "conv3d": (F.conv3d, (learnt(1, 2, 4, 5, 4), learnt(3, 2, 2, 3, 2))),
    "conv_transpose1d": (F.conv_transpose1d, (learnt(2, 3, 5), learnt(3, 4, 3))),
    "conv_transpose2d": (partial(F.conv_transpose2d, stride=2), (learnt(2, 3, 4, 5), learnt(3, 4, 3, 3))),
    "unfold": (partial(F.unfold, kernel_size=2), (learnt(2, 3, 5, 4),)),
    "fold": (partial(F.fold, output_size=(4, 5), kernel_size=(2, 2)), (learnt(2, 12, 12),)),
    "max_pool1d": (partial(F.max_pool1d, kernel_size=2), (learnt(2, 3, 8),)),
    "max_pool2d": (partial(F.max_pool2d, kernel_size=2), (learnt(2, 3, 6, 7),)),
    "avg_pool1d": (partial(F.avg_pool1d, kernel_size=3), (learnt(2, 3, 9),)),
    "avg_pool2d": (partial(F.avg_pool2d, kernel_size=2), (learnt(2, 3, 6, 7),)),
    "adaptive_avg_pool2d": (partial(F.adaptive_avg_pool2d, output_size=3), (learnt(2, 3, 7, 5),)),
    "adaptive_max_pool1d": (partial(F.adaptive_max_pool1d, output_size=3), (learnt(2, 3, 8),)),
    "lp_pool1d": (partial(F.lp_pool1d, norm_type=2.0, kernel_size=2), ((rand(2, 3, 8) + 0.5).requires_grad_(),)),
    "interpolate nearest": (partial(F.interpolate, scale_factor=2.0), (learnt(2, 3, 5),)),
    "interpolate bilinear": (partial(F.interpolate, size=(7, 6), mode="bilinear"), (learnt(2, 3, 4, 5),)),
    "pixel_shuffle": (partial(F.pixel_shuffle, upscale_factor=2), (learnt(2, 8, 3, 2),)),
    "pixel_unshuffle": (partial(F.pixel_unshuffle, downscale_factor=2), (learnt(2, 2, 4, 6),)),
    "channel_shuffle": (partial(F.channel_shuffle, groups=2), (learnt(2, 4, 3, 5),)),
    "pad constant": (partial(F.pad, pad=(1, 2)), "x: B N -> B N"),
    "pad reflect": (partial(F.pad, pad=(1, 2), mode="reflect"), (learnt(2, 3, 7),)),
    "pad replicate": (partial(F.pad, pad=(1, 2), mode="replicate"), (learnt(2, 3, 7),)),
    "embedding": (lambda w, i: F.embedding(i, w), (learnt(7, 4), ints(7, 3, 5))),
    "mse_loss": (F.mse_loss, "x: B N, y: B N ->"),
    "l1_loss": (F.l1_loss, "x: B N, y: B N ->"),
    "smooth_l1_loss": (F.smooth_l1_loss, "x: B N, y: B N ->"),
    "huber_loss": (F.huber_loss, "x: B N, y: B N ->"),
    "cross_entropy": (F.cross_entropy, (learnt(6, 5), ints(5, 6))),
    "nll_loss": (lambda x, t: F.nll_loss(F.log_softmax(x, -1), t), (learnt(6, 5), ints(5, 6))),
    "kl_div": (
        lambda x, t: F.kl_div(F.log_softmax(x, -1), t, reduction="batchmean"),
        (learnt(4, 5), frozen(F.softmax(randn(4, 5), -1))),
    ),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, (learnt(4, 5), frozen(rand(4, 5)))),
    "poisson_nll_loss": (F.poisson_nll_loss, (learnt(4, 5), frozen(ints(5, 4, 5).double()))),
    "gaussian_nll_loss": (F.gaussian_nll_loss, (learnt(4, 5), frozen(randn(4, 5)), (rand(4, 5) + 0.5).requires_grad_())),
    "soft_margin_loss": (F.soft_margin_loss, (learnt(4, 5), frozen(signs(4, 5)))),
    "hinge_embedding_loss": (F.hinge_embedding_loss, (learnt(4, 5), frozen(signs(4, 5)))),
    "margin_ranking_loss": (F.margin_ranking_loss, (learnt(6), learnt(6), frozen(signs(6)))),
    "triplet_margin_loss": (F.triplet_margin_loss, (learnt(4, 5), learnt(4, 5), learnt(4, 5))),
    "cosine_embedding_loss": (F.cosine_embedding_loss, (learnt(4, 5), learnt(4, 5), frozen(signs(4)))),
    "cosine_similarity": (F.cosine_similarity, (learnt(4, 5), learnt(4, 5))),
    "pairwise_distance": (F.pairwise_distance, (learnt(4, 5), learnt(4, 5))),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, "q: B L D, k: B S D, v: B S D -> B L D"),
    "affine_grid": (partial(F.affine_grid, size=[2, 1, 3, 4], align_corners=False), (learnt(2, 2, 3),)),
}
