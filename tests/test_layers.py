"""Blocks against plain compositions of torch's layers, to second order; what the dense block keeps."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import LONG
from torch import nn
from torch.nn import functional as F

import bptoolkit as bp
from bptoolkit.layers.dense_block import dense_block

F64 = torch.float64


def draw(*shape):
    return torch.randn(shape, dtype=F64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- plain compositions


def residual(m, x):
    return m.shortcut(x) + m.scale * m.body(x)


def highway(m, x):
    t = torch.sigmoid(F.linear(x, m.gate.weight, m.gate.bias))
    return t * torch.tanh(F.linear(x, m.transform.weight, m.transform.bias)) + (1 - t) * x


def squeeze_excitation(m, x):
    z = x.mean((2, 3))
    s = torch.sigmoid(F.linear(F.relu(F.linear(z, m.squeeze.weight, m.squeeze.bias)), m.excite.weight, m.excite.bias))
    return x * s[:, :, None, None]


def self_normalizing(m, x):
    return F.selu(F.linear(x, m.linear.weight, m.linear.bias))


def normed(n, x):
    if isinstance(n, nn.RMSNorm):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + n.eps) * n.weight
    return F.layer_norm(x, n.normalized_shape, n.weight, n.bias, n.eps)


def transformer(m, x, mask=None):
    N, L, D = x.shape
    H, K, E = m.heads, m.kv_heads, D // m.heads
    qkv = F.linear(normed(m.norm1, x), m.qkv.weight, m.qkv.bias).view(N, L, H + 2 * K, E).transpose(1, 2)
    q, k, v = qkv[:, :H], qkv[:, H : H + K].repeat_interleave(H // K, 1), qkv[:, H + K :].repeat_interleave(H // K, 1)
    scores = q @ k.mT / E**0.5
    if m.causal:
        scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), float("-inf"))
    if mask is not None:
        scores = scores + mask
    o = (scores.softmax(-1) @ v).transpose(1, 2).reshape(N, L, D)
    s = x + F.linear(o, m.out.weight, m.out.bias)
    u = F.linear(normed(m.norm2, s), m.up.weight, m.up.bias)
    if m.activation == "gelu":
        u = F.gelu(u)
    else:
        g, u = u.chunk(2, -1)
        u = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}[m.activation](g) * u
    return s + F.linear(u, m.down.weight, m.down.bias)


def dense(m, x):
    features = [x]
    for layer in m.children():
        h = torch.cat(features, 1)
        for k in (1, 2)[: 1 + bool(m.bottleneck)]:
            n, c = getattr(layer, f"norm{k}"), getattr(layer, f"conv{k}")
            h = F.relu(F.batch_norm(h, n.running_mean, n.running_var, n.weight, n.bias, m.training, n.momentum, n.eps))
            h = F.conv2d(h, c.weight, padding=c.padding)
        features.append(h)
    return torch.cat(features, 1)


def block(*args, **kwargs):
    return lambda: bp.nn.PreNormTransformerBlock(*args, **kwargs)


BLOCKS = {
    "residual": (lambda: bp.nn.Residual(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(4, 6), 0.5), residual, (3, 4)),
    "highway": (lambda: bp.nn.Highway(4, torch.tanh, -1.0), highway, (2, 3, 4)),
    "squeeze-excitation": (lambda: bp.nn.SqueezeExcitation(6, 2), squeeze_excitation, (2, 6, 3, 4)),
    "self-normalizing": (lambda: bp.nn.SelfNormalizing(4, 5), self_normalizing, (3, 4)),
    "transformer": (block(8, 2, 12), transformer, (2, 5, 8)),
    "transformer gated": (
        block(8, 4, kv_heads=2, norm="rms_norm", activation="swiglu", causal=True, bias=False),
        transformer,
        (2, 5, 8),
    ),
    "transformer geglu": (block(6, 3, 5, norm="layer_norm", activation="geglu", causal=True), transformer, (1, 4, 6)),
    "transformer reglu": (block(6, 1, 5, norm="rms_norm", activation="reglu"), transformer, (2, 3, 6)),
    "dense": (lambda: bp.nn.DenseBlock(3, 2, 3, bottleneck=0), dense, (3, 3, 4, 5)),
    "dense bottleneck": (lambda: bp.nn.DenseBlock(3, 2, 3, bottleneck=2), dense, (2, 3, 4, 3)),
}


def build(name):
    make, reference, shape = BLOCKS[name]
    model = make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        for b in model.buffers():
            if b.is_floating_point():
                b.add_(torch.rand_like(b))
    return model, reference, draw(*shape)


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_first_and_second_order(name, mode):
    model, reference, x = build(name)
    model.train(mode == "train")
    other = copy.deepcopy(model)
    found = []
    for call, m in ((lambda x: model(x), model), (lambda x: reference(other, x), other)):
        at = [x, *m.parameters()]
        y = call(x)
        weights = torch.arange(y.numel(), dtype=F64).mul(1.7).cos().view(y.shape).requires_grad_()
        first = torch.autograd.grad(y, at, weights, create_graph=True)
        total = sum((g.sin() * (k + 1)).sum() for k, g in enumerate(first))
        second = torch.autograd.grad(total, [*at, weights], allow_unused=True)
        found.append([y, *first, *(torch.zeros_like(t) if g is None else g for g, t in zip(second, [*at, weights]))])
    close(*found)
    close(*([b for n, b in m.named_buffers() if "tracked" not in n] for m in (model, other)))


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_batched_and_forward_mode(name):
    model, reference, x = build(name)
    model.eval()
    want = reference(model, x)
    if LONG or name in ("highway", "transformer gated", "dense bottleneck"):  # seconds each
        torch._dynamo.reset()
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        close([y], [want])
        dy = torch.randn_like(want)
        close(torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy))
    xs = torch.stack((x, 2 * x)).detach()
    close([torch.func.vmap(model)(xs)], [torch.stack([reference(model, t) for t in xs])])
    t = torch.randn_like(x)
    close(*(torch.func.jvp(f, (x.detach(),), (t,)) for f in (model, lambda x: reference(model, x))))


def test_a_mask_in_the_transformer():
    model, reference, x = build("transformer")
    mask = torch.zeros(5, 5, dtype=F64).masked_fill(torch.rand(5, 5) < 0.4, float("-inf")).fill_diagonal_(0.0)
    close([model(x, mask)], [reference(model, x, mask)])


@pytest.mark.parametrize("cls", [bp.nn.PreNormTransformerBlock, bp.nn.SelfNormalizing])
def test_dropout_is_of_training_only(cls):
    model = cls(64, 64 if cls is bp.nn.SelfNormalizing else 4, dropout=0.3)
    x = torch.randn(50, 6, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_self_normalizing_layers_keep_mean_and_variance():
    model = nn.Sequential(*(bp.nn.SelfNormalizing(256, 256, 0.05) for _ in range(24)))
    y = model(torch.randn(512, 256))
    assert abs(y.mean()) < 0.15 and 0.75 < y.var() < 1.35


def test_what_layers_begin_as():
    x = torch.randn(3, 8)
    assert torch.equal(bp.nn.Residual(nn.Linear(8, 8), scale=0.0)(x), x)
    assert torch.allclose(bp.nn.Highway(8, carry=-40.0)(x), x)
    gated, plain = (block(48, 4, activation=a)() for a in ("swiglu", "gelu"))
    gated, plain = (sum(p.numel() for p in m.parameters()) for m in (gated, plain))
    assert abs(gated / plain - 1) < 0.01


# --- the dense block


def kept(call):
    """The bytes that autograd keeps for backward, each storage once, and the result."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    return sum(seen.values()), out


def test_the_dense_block_keeps_its_output_and_parameters_only():
    model = bp.nn.DenseBlock(16, 8, 6)
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    ours, y = kept(lambda: model(x))
    theirs, _ = kept(lambda: dense(model, x))
    parameters = sum(p.numel() for p in model.parameters()) * 4
    size = y.numel() * 4
    assert size < ours <= size + 1.05 * parameters
    assert theirs > 12 * size and theirs > 8 * ours  # concatenations, norms and relus of every layer


def test_the_dense_block_does_not_change_its_input_or_break_under_reuse():
    model, _, x = build("dense bottleneck")
    was, y = x.detach().clone(), model(x)
    assert torch.equal(x, was) and y[:, :3].equal(x)
    y.sum().backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.sum().backward()
    assert torch.equal(x.grad, first)
    y = model(x)
    y.mul_(2)  # what was written over is noticed
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_the_dense_block(layout):
    model, reference, _ = build("dense bottleneck")
    x = draw(2, 3, 4, 4).detach().to(memory_format=layout).requires_grad_()
    y = model(x)
    assert y.is_contiguous(memory_format=layout)
    close([y], [reference(model, x)])


def test_a_dense_block_loads_torchvisions_names():
    keys = set(bp.nn.DenseBlock(3, 2, 2).state_dict())
    assert {"denselayer1.norm1.weight", "denselayer2.conv2.weight", "denselayer1.norm2.running_var"} <= keys
    assert len(keys) == 2 * (2 * 5 + 2)


@pytest.mark.filterwarnings("ignore:var_mean")  # of one element
def test_the_dense_rule_by_the_verifier():
    """Dtypes, layouts, cotangents and transforms of the verifier, against a plain composition."""
    judged = [
        "gradient_value",
        "dtypes",
        "cotangent_layout",
        "grad_subsets",
        "memory",
        "version_counter",
        "per_sample_gradients",
    ]
    sizes = ([(3,), (3,), (2,), (2,)], [(2, 3, 1, 1), (2, 2, 3, 3)])

    def ours(x, g1, b1, g2, b2, w1, w2):
        return dense_block(x, [(g1, b1), (g2, b2)], [w1, w2], 2, 2)[0]

    def plain(x, g1, b1, g2, b2, w1, w2):
        def on(u, g, b):
            v, m = torch.var_mean(u, (0, 2, 3), correction=0, keepdim=True)
            return torch.relu((u - m) * torch.rsqrt(v + 1e-5) * g[:, None, None] + b[:, None, None])

        return torch.cat((x, F.conv2d(on(F.conv2d(on(x, g1, b1), w1), g2, b2), w2, padding=1)), 1)

    def example():
        return (
            draw(2, 3, 4, 3).detach(),
            *(1 + 0.3 * draw(*s).detach() for s in sizes[0]),
            *(draw(*s).detach() for s in sizes[1]),
        )

    report = bp.verify.check(ours, example(), reference=plain, quick=True, properties=judged, budget=5)
    assert report.ok, str(report)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 3, 1, 7), (5, 3, 1, 1)])
def test_small_and_empty_pictures(shape):
    model, reference, _ = build("dense bottleneck")
    model.train(0 not in shape)
    x = draw(*shape)
    y = model(x)
    want = reference(model, x) if 0 not in shape else x.new_zeros(shape[0], 9, *shape[2:])
    close([y], [want])
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *model.parameters()], dy)
    if 0 not in shape:
        close(grads, torch.autograd.grad(want, [x, *model.parameters()], dy))
    assert all(g.isfinite().all() for g in grads)


def test_half_and_autocast():
    model, _, x = build("dense bottleneck")
    exact = model(x)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() < 0.1 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = copy.deepcopy(model).float()(x.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"the body gives \(2, 3\) but the shortcut \(2, 1\)", lambda: bp.nn.Residual(nn.Linear(1, 3))(torch.ones(2, 1))),
        (r"needs \(N, 4, \*\)", lambda: bp.nn.SqueezeExcitation(4)(torch.ones(2, 3, 5))),
        ("heads=3 must divide features=8", lambda: bp.nn.PreNormTransformerBlock(8, 3)),
        ("kv_heads=3 must divide heads", lambda: bp.nn.PreNormTransformerBlock(8, 4, kv_heads=3)),
        ("norm='batch' is not known", lambda: bp.nn.PreNormTransformerBlock(8, 4, norm="batch")),
        ("activation='cube' is not known", lambda: bp.nn.PreNormTransformerBlock(8, 4, activation="cube")),
        ("dropout=2 must", lambda: bp.nn.PreNormTransformerBlock(8, 4, dropout=2)),
        (r"needs \(N, L, 8\)", lambda: bp.nn.PreNormTransformerBlock(8, 4)(torch.ones(2, 8))),
        ("layers=0, bottleneck=4; they must", lambda: bp.nn.DenseBlock(3, 2, 0)),
        (r"needs \(N, 3, H, W\)", lambda: bp.nn.DenseBlock(3, 2, 1)(torch.ones(2, 4, 3, 3))),
        (
            r"\(2, 3, 0, 4\); it needs \(N, 3, H, W\), H and W at least 1",
            lambda: bp.nn.DenseBlock(3, 2, 1)(torch.ones(2, 3, 0, 4)),
        ),
        ("one element in a channel", lambda: bp.nn.DenseBlock(3, 2, 1)(torch.ones(1, 3, 1, 1))),
    ],
)
def test_refused(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_the_snippets_of_the_page_run():
    page = (Path(__file__).parents[1] / "docs" / "blocks.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
