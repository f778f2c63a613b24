"""Whole models compute the same before a swap, after it, and after its undoing."""

import copy
import importlib
import io

import pytest
import torch
from swapping import same, state
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bptoolkit as bp

swap_module = importlib.import_module("bptoolkit.swap")


class Chain(nn.Sequential):
    """A forward of our own: torch.compile wants one to begin with."""

    def forward(self, x):
        return super().forward(x)


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU in place, used twice, and a sum in place."""

    def __init__(self, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, stride, bias=False), nn.BatchNorm2d(2 * channels))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class Recurrent(nn.Module):
    def __init__(self, cls, *, packed=False, **kwargs):
        super().__init__()
        self.packed, self.rnn = packed, cls(3, 4, batch_first=True, **kwargs)
        self.head = nn.Linear(8 if kwargs.get("bidirectional") else 4, 2)

    def forward(self, x):
        if self.packed:
            x = pack_padded_sequence(x, torch.tensor([5, 2]), batch_first=True)
        y, state = self.rnn(x)
        if self.packed:
            y, _ = pad_packed_sequence(y, batch_first=True)
        state = state if isinstance(state, tuple) else (state,)
        return self.head(y), *state


class Tied(nn.Module):
    """A causal language model whose head shares its weight with the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=self.head.weight.dtype)
        y = self.head(self.encoder(self.embed(x), mask=mask, is_causal=True))
        return y, self.loss(y[:, :-1].flatten(0, 1), x[:, 1:].flatten())


class EncoderDecoder(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, **kwargs)

    def forward(self, x, y, mask=None):
        return self.model(x, y, tgt_mask=mask, tgt_is_causal=mask is not None)  # torch compiles no detection of it


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **kwargs)

    def forward(self, x, y):
        return self.attention(x, y, y)


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.mse, self.ce = nn.Linear(4, 3), nn.MSELoss(), nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x):
        y = self.body(x)
        return self.mse(y, x[..., :3]), self.ce(y, x[..., :3].detach().softmax(-1))


def mlp():
    return Chain(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3), nn.LogSoftmax(-1))


def cnn():
    body = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding="same", groups=2))
    return Chain(*body, nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))


def discriminator():
    s = parametrizations.spectral_norm
    return Chain(s(nn.Conv2d(3, 4, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(), s(nn.Linear(64, 4)), nn.Tanh(), nn.Linear(4, 1))


def waves():
    return Chain(nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular", dilation=1), nn.Sigmoid(), nn.Conv1d(6, 2, 2, stride=2))


def weight_normed():
    return Chain(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(4, 2)))


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


ZOO = {
    "mlp": (mlp, lambda: (draw(5, 4),)),
    "cnn": (cnn, lambda: (draw(2, 3, 8, 8),)),
    "cnn channels_last": (lambda: cnn().to(memory_format=torch.channels_last), lambda: (last(draw(2, 3, 8, 8)),)),
    "residual": (lambda: Block(4, 2), lambda: (draw(2, 4, 6, 6),)),
    "residual channels_last": (
        lambda: Block(4).to(memory_format=torch.channels_last),
        lambda: (last(draw(2, 4, 6, 6)),),
    ),
    "discriminator": (discriminator, lambda: (draw(2, 3, 8, 8),)),
    "conv1d": (waves, lambda: (draw(2, 3, 8),)),
    "conv3d": (lambda: Chain(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.Softmax(1)), lambda: (draw(2, 2, 3, 4, 3),)),
    "weight_norm": (weight_normed, lambda: (draw(3, 4),)),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), lambda: (draw(2, 5, 3),)),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), lambda: (draw(2, 5, 3),)),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), lambda: (draw(2, 5, 3),)),
    "lstm packed": (lambda: Recurrent(nn.LSTM, packed=True), lambda: (draw(2, 5, 3),)),
    "attention": (lambda: Attention(batch_first=True), lambda: (draw(2, 3, 8), draw(2, 4, 8))),
    "attention kdim": (lambda: Attention(kdim=6, vdim=6, add_bias_kv=True), lambda: (draw(3, 2, 8), draw(4, 2, 6))),
    "tied language model": (Tied, lambda: (torch.randint(11, (2, 6)),)),
    "encoder-decoder": (lambda: EncoderDecoder(batch_first=True), lambda: (draw(2, 5, 8), draw(2, 4, 8))),
    "encoder-decoder norm_first gelu": (
        lambda: EncoderDecoder(norm_first=True, activation=nn.GELU()),
        lambda: (draw(5, 2, 8), draw(4, 2, 8), nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)),
    ),
    "losses": (Losses, lambda: (draw(3, 4),)),
}


def last(x):
    return x.to(memory_format=torch.channels_last)


def build(name):
    torch.manual_seed(0)
    make, inputs = ZOO[name]
    return make().double(), inputs()


def run(model, inputs):
    """The outputs, and the gradients by the floating-point inputs and the parameters, for a cotangent of each output."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]  # clone keeps the memory format
    out = model(*inputs)
    out = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in out]
    at = [x for x in inputs if x.requires_grad] + list(model.parameters())
    return out, torch.autograd.grad(out, at, cotangents, allow_unused=True)


def close(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def swapped(model):
    """A swapped copy, in which every module that can be swapped has been."""
    ours = copy.deepcopy(model)
    report = bp.swap(ours)
    modules = dict(model.named_modules())  # get_submodule trips over TransformerDecoderLayer.activation
    table = swap_module._table()
    rest = [e for e in report.entries if type(modules[e.name]) in table and e.what != "swapped"]
    assert all(e.why.startswith("part of MultiheadAttention") for e in rest), rest
    assert report.swapped
    return ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_models_compute_the_same(name):
    model, inputs = build(name)
    ours = swapped(model)
    for mode in (True, False):
        model.train(mode), ours.train(mode)
        out, grads = run(ours, inputs)
        reference_out, reference_grads = run(model, inputs)
        close(out, reference_out)
        close(grads, reference_grads)
        assert [y.stride() for y in out] == [y.stride() for y in reference_out]
    with torch.no_grad():
        close(flat(ours(*inputs)), flat(model(*inputs)))
    close(list(ours.state_dict().values()), list(model.state_dict().values()))  # running statistics, power iterations
    bp.unswap(ours)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(flat(ours(*inputs)), flat(model(*inputs))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_copies_and_restoring(name):
    model, inputs = build(name)
    model.eval()
    before, parametrized = state(model), any(map(is_parametrized, model.modules()))
    bp.swap(model, backend="eager")
    with torch.no_grad():
        out = flat(model(*inputs))
        copies = [copy.deepcopy(model)]
        if not parametrized:  # torch pickles none of those
            torch.save(model, file := io.BytesIO())
            copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
        for other in copies:
            close(flat(other(*inputs)), out)
            assert list(bp.swap(other).already) == list(bp.swap(model).already) != []
            bp.unswap(other)
            close(flat(other(*inputs)), out)
    bp.unswap(model)
    if not parametrized:
        same(before, state(model))
    assert {n: list(h) for n, (_, h) in state(model).items()} == {n: list(h) for n, (_, h) in before.items()}


def flat(out):
    return [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in ZOO if n != "lstm packed"])  # torch cannot compile pack_padded_sequence
def test_swapped_models_compile_whole(name):
    model, inputs = build(name)
    ours = swapped(model)
    if any(type(m) in (nn.RNN, nn.GRU, nn.LSTM) for m in ours.modules()):
        pytest.skip("torch does not compile its own recurrent layers")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mode in (True, False) if name in ("mlp", "tied language model") else (True,):
        model.train(mode), ours.train(mode)
        out, grads = run(compiled, inputs)
        reference_out, reference_grads = run(model, inputs)
        close(out, reference_out)
        close(grads, reference_grads)


@pytest.mark.parametrize("name", ["mlp", "residual", "tied language model"])
def test_an_optimizer_made_before_the_swap_trains_the_swapped_model(name):
    model, inputs = build(name)
    ours = copy.deepcopy(model)
    optimizer = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, ours)]
    bp.swap(ours)
    for _ in range(3):
        for m, o in zip((model, ours), optimizer):
            o.zero_grad()
            torch.stack([y.square().mean() for y in flat(m(*inputs))]).sum().backward()
            o.step()
    close(list(ours.parameters()), list(model.parameters()))


def test_an_activation_in_place_writes_into_its_input():
    for cls in (nn.ReLU, nn.SiLU):
        ours, x = cls(inplace=True), draw(4)
        bp.swap(ours)
        y = ours(x)
        assert (y is x and torch.equal(x, x.clamp(min=0))) or cls is not nn.ReLU


def test_padding_and_masks_of_an_encoder():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2).double()
    ours = swapped(model)
    x, padding = draw(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    for mask in (None, nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)):
        key_mask = padding if mask is None else torch.zeros(3, 5, dtype=torch.float64).masked_fill(padding, float("-inf"))
        for mode in (True, False):
            model.train(mode), ours.train(mode)
            with torch.set_grad_enabled(mode):
                a, b = (m(x, mask=mask, src_key_padding_mask=key_mask)[~padding] for m in (ours, model))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_autocast():
    model, inputs = build("mlp")
    model, x = model.float(), inputs[0].float()
    ours = swapped(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = ours(x), model(x)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert F.mse_loss(a.float(), b.float()) < 1e-3
