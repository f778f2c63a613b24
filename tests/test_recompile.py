"""Under dynamic=True one compiled graph serves every batch size and length."""

from __future__ import annotations

import pytest
import torch
from helpers import NAMES, floats, random_like
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_flatten

from bptoolkit import OPS


def r(*shape):
    return torch.randn(shape, requires_grad=True)


def recurrent(gates, *more):
    weights = [r(gates * 6, 11), r(gates * 6, 6), r(gates * 6), r(gates * 6), *(r(m * 6) for m in more)]
    return lambda n, s: (r(n, 20 + s, 11), None, weights)


def two(n, s):
    return r(20 + s, n), torch.rand(20 + s, n)


def cell(gates, states=1):
    def make(n, s):
        hx = tuple(r(20 + s, 6) for _ in range(states))
        return r(20 + s, 11), hx if states > 1 else hx[0], r(gates * 6, 11), r(gates * 6, 6), r(gates * 6), r(gates * 6)

    return make


OLD = tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 12)
CALLS = {  # (length, what is added to the batch) -> arguments; every size differs from the others, or duck shaping guards it
    "linear": lambda n, s: (r(20 + s, n, 3), r(5, 3), r(5)),
    "conv1d": lambda n, s: (r(20 + s, 3, n), r(5, 3, 2)),
    "conv2d": lambda n, s: (r(20 + s, 3, n, n + 40), r(5, 3, 2, 4)),
    "conv3d": lambda n, s: (r(20 + s, 3, n, n + 40, 19), r(5, 3, 2, 4, 6)),
    "conv2d_activation": lambda n, s: (r(20 + s, 3, n, n + 40), r(5, 3, 2, 4), r(5)),
    "causal_conv1d": lambda n, s: (r(20 + s, 3, n), r(3, 2), r(3), "silu"),
    "conv_transpose1d": lambda n, s: (r(20 + s, 3, n), r(3, 5, 2)),
    "conv_transpose2d": lambda n, s: (r(20 + s, 3, n, n + 40), r(3, 5, 2, 4), None, 2, 1),
    "conv_transpose3d": lambda n, s: (r(20 + s, 3, n, n + 40, 19), r(3, 5, 2, 4, 6)),
    "fold": lambda n, s: (r(20 + s, 12, n * (n + 40)), (n + 1, n + 41), 2),
    "unfold": lambda n, s: (r(20 + s, 3, n, n + 40), 2),
    "pad": lambda n, s: (r(20 + s, 3, n, n + 40), (2, 1, 1, 3), "reflect"),
    "interpolate": lambda n, s: (r(20 + s, 3, n, n + 40), None, 2.0, "bilinear"),
    "grid_sample": lambda n, s: (r(20 + s, 3, n, n + 40), r(20 + s, n + 5, 19, 2), "bilinear", "zeros", False),
    "affine_grid": lambda n, s: (r(20 + s, 2, 3), (20 + s, 3, n, n + 40), False),
    "pixel_shuffle": lambda n, s: (r(20 + s, 12, n, n + 40), 2),
    "pixel_unshuffle": lambda n, s: (r(20 + s, 3, 2 * n, 2 * n + 90), 2),
    "channel_shuffle": lambda n, s: (r(20 + s, 6, n), 2),
    "layer_norm": lambda n, s: (r(20 + s, n, 6), (6,), r(6), r(6)),
    "embedding": lambda n, s: (torch.zeros(20 + s, n, dtype=torch.int64), r(7, 5), 0),
    "embedding_bag": lambda n, s: (torch.zeros(20 + s, n, dtype=torch.int64), r(7, 5)),
    "bilinear": lambda n, s: (r(20 + s, n, 3), r(20 + s, n, 5), r(7, 3, 5), r(7)),
    "cosine_similarity": lambda n, s: (r(20 + s, n), r(20 + s, n)),
    "pairwise_distance": lambda n, s: (r(20 + s, n), r(20 + s, n)),
    "cdist": lambda n, s: (r(20 + s, n), r(40, n)),
    "pdist": lambda n, s: (r(20 + s, n),),
    "rotary_embedding": lambda n, s: (r(20 + s, n, 10), torch.ones(n, 4), torch.ones(n, 4)),
    "dropout2d": lambda n, s: (r(20 + s, 3, n, n + 40),),
    "dropout3d": lambda n, s: (r(20 + s, 3, n, n + 40, 19),),
    "dropout1d": lambda n, s: (r(20 + s, 3, n),),
    "alpha_dropout": lambda n, s: (r(20 + s, n), 0.5, True),
    "feature_alpha_dropout": lambda n, s: (r(20 + s, 3, n), 0.5, True),
    "softmax": lambda n, s: (r(20 + s, n), -1),
    "log_softmax": lambda n, s: (r(20 + s, n), -1),
    "softmin": lambda n, s: (r(20 + s, n), -1),
    "threshold": lambda n, s: (r(20 + s, n), 0.1, 0.0),
    "prelu": lambda n, s: (r(20 + s, 3, n), r(3)),
    "glu": lambda n, s: (r(20 + s, n, 6),),
    **dict.fromkeys(("swiglu", "geglu", "reglu"), lambda n, s: (r(20 + s, n), r(20 + s, n))),
    "bias_activation": lambda n, s: (r(20 + s, n, 6), r(6)),
    "gated_mlp": lambda n, s: (r(20 + s, n, 6), r(7, 6), r(7, 6), r(5, 7)),
    "mlp": lambda n, s: (r(20 + s, n, 6), r(7, 6), r(7), r(5, 7), r(5)),
    "rrelu": lambda n, s: (r(20 + s, n), 0.1, 0.3, False),
    "batch_norm": lambda n, s: (r(20 + s, 3, n), None, None, r(3), r(3), True),
    "batch_norm_relu": lambda n, s: (r(20 + s, 3, n), None, None, r(3), r(3), True),
    "conv2d_batch_norm_relu": lambda n, s: (r(20 + s, 3, n, n + 40), r(5, 3, 2, 4), *3 * (None,), r(5), r(5), 1, 0, 1, 1, True),
    "group_norm": lambda n, s: (r(20 + s, 6, n), 2, r(6), r(6)),
    "instance_norm": lambda n, s: (r(20 + s, 3, n), None, None, r(3), r(3)),
    "rms_norm": lambda n, s: (r(20 + s, n, 6), (6,), r(6)),
    "add_layer_norm": lambda n, s: (r(20 + s, n, 6), r(20 + s, n, 6), (6,), r(6), r(6)),
    "add_rms_norm": lambda n, s: (r(20 + s, n, 6), r(20 + s, n, 6), (6,), r(6)),
    "dropout_add_layer_norm": lambda n, s: (r(20 + s, n, 6), r(20 + s, n, 6), (6,), r(6), r(6)),
    "dropout_add_rms_norm": lambda n, s: (r(20 + s, n, 6), r(20 + s, n, 6), (6,), r(6)),
    "weight_norm": lambda n, s: (r(20 + s, n), r(20 + s, 1)),
    "spectral_norm": lambda n, s: (r(20 + s, n), torch.ones(20 + s), torch.ones(n)),
    "local_response_norm": lambda n, s: (r(20 + s, 6, n), 3),
    "linear_cross_entropy": lambda n, s: (r(20 + s, 6), r(7, 6), torch.zeros(20 + s, dtype=torch.int64)),
    **dict.fromkeys(("l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss", "hinge_embedding_loss"), two),
    **dict.fromkeys(("soft_margin_loss", "multilabel_soft_margin_loss", "binary_cross_entropy_with_logits", "kl_div"), two),
    "gaussian_nll_loss": lambda n, s: (r(20 + s, n), r(20 + s, n), torch.ones(20 + s, n)),
    "nll_loss": lambda n, s: (r(20 + s, 7, n), torch.zeros(20 + s, n, dtype=torch.int64)),
    "binary_cross_entropy": lambda n, s: (torch.rand(20 + s, n, requires_grad=True), torch.rand(20 + s, n)),
    "margin_ranking_loss": lambda n, s: (r(20 + s, n), r(20 + s, n), torch.ones(20 + s, n)),
    "multi_margin_loss": lambda n, s: (r(20 + s, 7), torch.zeros(20 + s, dtype=torch.int64)),
    "multilabel_margin_loss": lambda n, s: (r(20 + s, 7), torch.zeros(20 + s, 7, dtype=torch.int64)),
    "cosine_embedding_loss": lambda n, s: (r(20 + s, n), r(20 + s, n), torch.ones(20 + s)),
    "triplet_margin_loss": lambda n, s: (r(20 + s, n), r(20 + s, n), r(20 + s, n)),
    "triplet_margin_with_distance_loss": lambda n, s: (r(20 + s, n), r(20 + s, n), r(20 + s, n)),
    **{f"{kind}_pool1d": (lambda n, s: (r(20 + s, 3, n), 2)) for kind in ("max", "avg")},
    **{f"{kind}_pool2d": (lambda n, s: (r(20 + s, 3, n, n + 40), 2)) for kind in ("max", "avg")},
    **{f"{kind}_pool3d": (lambda n, s: (r(20 + s, 3, n, n + 40, 19), 2)) for kind in ("max", "avg")},
    "lp_pool1d": lambda n, s: (r(20 + s, 3, n), 2.0, 2),
    "lp_pool2d": lambda n, s: (r(20 + s, 3, n, n + 40), 2.0, 2),
    "lp_pool3d": lambda n, s: (r(20 + s, 3, n, n + 40, 19), 2.0, 2),
    **{f"adaptive_{kind}_pool1d": (lambda n, s: (r(20 + s, 3, n), 2)) for kind in ("max", "avg")},
    **{f"adaptive_{kind}_pool2d": (lambda n, s: (r(20 + s, 3, n, 30), (2, 3))) for kind in ("max", "avg")},
    **{f"adaptive_{kind}_pool3d": (lambda n, s: (r(20 + s, 3, n, 30, 19), (2, 3, 4))) for kind in ("max", "avg")},
    "fractional_max_pool2d": lambda n, s: (r(20 + s, 3, n, n + 40), 2, (4, 5), None, False, torch.rand(20 + s, 3, 2)),
    "fractional_max_pool3d": lambda n, s: (r(20 + s, 3, n, n + 40, 19), 2, (4, 5, 6), None, False, torch.rand(20 + s, 3, 3)),
    "max_unpool1d": lambda n, s: (r(20 + s, 3, n), torch.arange(n).mul(2).expand(20 + s, 3, n), 2),
    "max_unpool2d": lambda n, s: (r(20 + s, 3, n, 9), torch.arange(9 * n).reshape(n, 9).expand(20 + s, 3, n, 9), 2),
    "max_unpool3d": lambda n, s: (r(20 + s, 3, n, 9, 4), torch.arange(36 * n).reshape(n, 9, 4).expand(20 + s, 3, n, 9, 4), 2),
    "ctc_loss": lambda n, s: (r(n, 20 + s, 7), torch.ones(20 + s, 3).long(), *(torch.full((20 + s,), k) for k in (6, 3))),
    "mse_loss": lambda n, s: (r(20 + s, n), r(20 + s, n)),
    "cross_entropy": lambda n, s: (r(20 + s, 7, n), torch.zeros(20 + s, n, dtype=torch.int64)),
    "scaled_dot_product_attention": lambda n, s: (r(20 + s, 3, n, 4), r(20 + s, 3, n + 40, 4), r(20 + s, 3, n + 40, 6)),
    "varlen_attention": lambda n, s: (*(r(20 + s, n, 4) for _ in range(3)), torch.tensor([0, 7, 7, 20])),
    "linear_attention": lambda n, s: (r(20 + s, n, 4), r(20 + s, n + 40, 4), r(20 + s, n + 40, 6)),
    "lstm": recurrent(4),
    "gru": recurrent(3),
    "rnn": recurrent(1),
    "min_gru": lambda n, s: (r(n, 20 + s, 11), None, [r(12, 11), r(12)]),
    "min_lstm": lambda n, s: (r(n, 20 + s, 11), None, [r(18, 11), r(18)]),
    "linear_recurrence": lambda n, s: (torch.rand(n, 20 + s, 6, requires_grad=True), r(n, 20 + s, 6)),
    "peephole_lstm": recurrent(4, 3),
    "layer_norm_lstm": recurrent(4, 4, 4, 1, 1),
    "zoneout_lstm": recurrent(4),
    "lstm_cell": cell(4, 2),
    "gru_cell": cell(3),
    "rnn_tanh_cell": cell(1),
    "rnn_relu_cell": cell(1),
}


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize("name", NAMES)
def test_batch_sizes_and_lengths_do_not_recompile(name):
    if name == "multi_head_attention_forward":
        pytest.skip("a composition of linear and scaled_dot_product_attention, which are tested here")
    if name.startswith(("max_pool", "avg_pool", "lp_pool")) and OLD:
        pytest.skip("torch 2.11's own shape functions of pools guard on whether a size is even, F.avg_pool2d's too")
    make, op = CALLS.get(name, lambda n, s: (r(20 + s, n),)), OPS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: op.call(*args), fullgraph=True, dynamic=True, backend=counter)
    frames = []  # the first call may be traced twice, where Dynamo makes a float argument a constant
    for n, s in ((8, 1), (9, 1), (12, 4), (30, 7)):
        args = make(n, s)
        leaves = [t for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
        results = []
        for call in (compiled, op.call):
            out = floats(call(*args))
            results.append((out, torch.autograd.grad(out, leaves, random_like(out), materialize_grads=True, allow_unused=True)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4, f"{name}: compiled again for another size: {frames}"
