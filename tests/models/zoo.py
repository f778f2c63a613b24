"""Models of `transformers`, tiny and random (nothing is downloaded), and what a user gives swap for their own layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba.modeling_mamba import MambaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

import bptoolkit as bp

hf.logging.set_verbosity_error()

WORDS, LENGTH = 31, 8
TEXT: dict[str, Any] = {"vocab_size": WORDS}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # masks of dropout differ from torch's by design
WIDTH: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2}
ENCODER: dict[str, Any] = {**WIDTH, **DRY, "num_attention_heads": 2, "intermediate_size": 24}


def gpt2() -> nn.Module:
    dry = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(**TEXT, **NO_ENDS, **dry, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    )


def llama() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **WIDTH, **heads, intermediate_size=24, use_cache=False))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**TEXT, **ENCODER, max_position_embeddings=16))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**ENCODER, image_size=16, patch_size=8, num_labels=5))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**TEXT, **sizes, **ends, dropout_rate=0.0, use_cache=False))


def whisper() -> nn.Module:
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
    }
    sizes = {"num_mel_bins": 8, "d_model": 16, "max_source_positions": 12, "max_target_positions": 12}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    dry = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**TEXT, **sides, **sizes, **ends, **dry, use_cache=False))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, layer_type="basic", num_labels=5))


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(**TEXT, **WIDTH, state_size=4, expand=2, time_step_rank=4, use_cache=False))


def rwkv() -> nn.Module:
    sizes = {"attention_hidden_size": 16, "context_length": 16, "intermediate_size": 24}
    return hf.RwkvForCausalLM(hf.RwkvConfig(**TEXT, **WIDTH, **NO_ENDS, **sizes, use_cache=False))


def words() -> dict[str, Tensor]:
    ids = torch.randint(3, WORDS, (2, LENGTH))
    return {"input_ids": ids, "labels": ids}


def pictures(side: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, side, side, dtype=torch.float64), "labels": torch.tensor([1, 3, 0, 2])}


def sounds() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 24, dtype=torch.float64), "labels": torch.randint(3, WORDS, (2, LENGTH))}


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "GPT-2": (gpt2, words),
    "Llama": (llama, words),
    "BERT": (bert, words),
    "ViT": (vit, lambda: pictures(16)),
    "T5": (t5, words),
    "Whisper": (whisper, sounds),
    "ResNet": (resnet, lambda: pictures(32)),
    "Mamba": (mamba, words),
    "RWKV": (rwkv, words),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in float64 and training mode, and the arguments of a call. No parameter is zero or one throughout."""
    torch.manual_seed(seed)
    make, inputs = ZOO[name]
    model = make().double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, inputs()


# --- what a user writes for the layers of a library


class FastConv1D(Conv1D):
    def forward(self, x):
        return bp.functional.linear(x, self.weight.mT, self.bias)


class FastNewGELU(NewGELUActivation):
    def forward(self, x):
        return bp.functional.gelu(x, approximate="tanh")


def rms(self, x):
    return bp.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.variance_epsilon)


class FastLlamaRMSNorm(LlamaRMSNorm):
    forward = rms


class FastT5LayerNorm(T5LayerNorm):
    forward = rms


class FastMambaRMSNorm(MambaRMSNorm):
    forward = rms


ALSO: dict[type[nn.Module], type[nn.Module]] = {
    Conv1D: FastConv1D,
    NewGELUActivation: FastNewGELU,
    LlamaRMSNorm: FastLlamaRMSNorm,
    T5LayerNorm: FastT5LayerNorm,
    MambaRMSNorm: FastMambaRMSNorm,
}


# --- comparisons


class Exact(TorchFunctionMode):
    """float64 stays float64: the models cast to float32 where they want half tensors to be wider."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = (args[0], *(torch.float64 if a is torch.float32 else a for a in args[1:]))
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


# --- counts

VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "transpose", "permute"),
    *("getitem", "split", "chunk", "contiguous", "cat", "stack", "mT", "to", "float"),
}


class Counts(NamedTuple):
    """What of a model runs our backward."""

    swapped: int  # modules of ours
    layers: int  # modules that are no containers
    types: Counter[str]  # of the layers that are not ours
    calls: Counter[str]  # calls of functions that ran an op
    left: Counter[str]  # arithmetic with a derivative that torch ran
    views: int  # views, copies and casts with a derivative


def count(name: str, also: dict[type[nn.Module], type[nn.Module]] | None = None) -> Counts:
    model, inputs = build(name)
    report = bp.swap(model, also=also)
    rest = [e for e in report.entries if e.what == "left alone" and not e.why.startswith("container")]
    with bp.functional_calls() as calls:
        model(**inputs)
    left = Counter[str]()
    for (function, _), n in calls.left.items():
        left[function] += n
    views = sum(n for function, n in left.items() if function in VIEWS)
    arithmetic = Counter({f: n for f, n in left.items() if f not in VIEWS})
    n = len(report.swapped)
    return Counts(n, n + len(rest), Counter(e.type for e in rest), calls.replaced, arithmetic, views)
