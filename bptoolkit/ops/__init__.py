"""The list of ops: one word per file. Importing it reads every op file and nothing else."""

from __future__ import annotations

from importlib import import_module

from bptoolkit.op import Op

NAMES = (
    "linear",
    "activation",
    "activation_leaky",
    "activation_hard",
    "activation_smooth",
    "gated",
    "softmax",
    "conv",
    "conv_transpose",
    "fold",
    "interpolate",
    "pad",
    "pixel_shuffle",
    "layer_norm",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "rms_norm",
    "add_norm",
    "normalize",
    "mse_loss",
    "cross_entropy",
    "linear_cross_entropy",
    "loss_regression",
    "loss_likelihood",
    "loss_probability",
    "binary_cross_entropy",
    "loss_hinge",
    "loss_multi_margin",
    "loss_embedding",
    "ctc_loss",
    "attention",
    "attention_varlen",
    "linear_attention",
    "multihead_attention",
    "lstm",
    "gru",
    "rnn",
    "linear_recurrence",
    "min_rnn",
    "max_pool",
    "avg_pool",
    "adaptive_pool",
    "lp_pool",
    "max_unpool",
    "dropout",
    "embedding",
    "embedding_bag",
    "bilinear",
    "similarity",
    "rotary",
)

OPS: dict[str, Op] = {op.name: op for name in NAMES for op in import_module(f"bptoolkit.ops.{name}").OPS}
