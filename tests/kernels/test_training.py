"""Two small language models that are trained with the fused kernels and with the eager rules: the same loss curve."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bptoolkit as bp

VOCABULARY, WIDTH, CONTEXT, BATCH, STEPS = 23, 16, 12, 3, 8


class GPT(nn.Module):
    """Pre-norm blocks of causal attention and an MLP, learned positions, tied head."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.tokens, self.places = bp.nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(0.1 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block(backend) for _ in range(2))
        self.norm = bp.nn.LayerNorm(WIDTH)

    def forward(self, x, y):
        h = self.tokens(x) + self.places  # B L E
        for block in self.blocks:
            h = block(h)
        rows = self.norm(h).flatten(0, 1)
        return bp.functional.linear_cross_entropy(rows, self.tokens.weight, y.flatten(), backend=self.backend)


class Block(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # the gradient of a bias of keys is rounding alone
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.first, self.second = bp.nn.LayerNorm(WIDTH), bp.nn.RMSNorm(WIDTH)

    def forward(self, h):
        B, L, _ = h.shape
        q, k, v = self.qkv(self.first(h)).view(B, L, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)  # B H L E
        a = bp.functional.scaled_dot_product_attention(q, k, v, is_causal=True, backend=self.backend)
        h = h + self.out(a.transpose(1, 2).reshape(B, L, WIDTH))
        return h + self.down(bp.functional.gelu(self.up(self.second(h)), backend=self.backend))


class Recurrent(nn.Module):
    """Embedding, one recurrent layer, a linear head."""

    def __init__(self, kind: str, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.tokens, self.layer = bp.nn.Embedding(VOCABULARY, WIDTH), getattr(bp.nn, kind)(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x, y):
        h, _ = self.layer(self.tokens(x.mT))  # T B E
        return bp.functional.cross_entropy(self.head(h).flatten(0, 1), y.mT.flatten(), backend=self.backend)


MODELS = {
    "GPT": (
        GPT,
        "norm norm_backward attention attention_backward activation activation_backward linear_cross_entropy "
        "embedding_backward",
    ),
    "LSTM": (lambda backend: Recurrent("LSTM", backend), "lstm lstm_backward cross_entropy embedding_backward"),
    "MinGRU": (lambda backend: Recurrent("MinGRU", backend), "min_rnn min_rnn_backward cross_entropy embedding_backward"),
}


class Calls(TorchDispatchMode):
    """How often each operator of a kernel ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("bptoolkit::")
        if name.startswith("triton_"):
            self.count[name.removeprefix("triton_")] += 1
        return func(*args, **(kwargs or {}))


def text(step: int, device: str) -> torch.Tensor:
    """Rows that count upwards, from anywhere and by one or two: something to learn."""
    generator = torch.Generator().manual_seed(step)
    first, stride = (torch.randint(low, high, (BATCH, 1), generator=generator) for low, high in ((0, VOCABULARY), (1, 3)))
    return ((first + stride * torch.arange(CONTEXT + 1)) % VOCABULARY).to(device)


def train(name: str, device: str, backend: str, calls: Calls) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name][0](backend).to(device)
    for m in model.modules():
        m.backend = backend
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for step in range(STEPS):
        tokens = text(step, device)
        with calls:
            loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses += [loss.item(), norm.item()]
    return losses, [*model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_loss_curve(device, name):
    """Losses, norms of the gradients and the parameters after some steps; every kernel that is named did run."""
    fused, eager = Calls(), Calls()
    got, parameters = train(name, device, "auto", fused)
    want, like = train(name, device, "eager", eager)
    assert not eager.count
    missing = [k for k in MODELS[name][1].split() if fused.count[k] < STEPS]
    assert not missing, (missing, fused.count)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(parameters, like, rtol=2e-3, atol=2e-4)
    assert got[-2] < got[0]
