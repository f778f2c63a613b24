"""swap of modules that are not plain: parametrized, pruned, attention, fast paths, subclasses, compiled, distributed."""

import copy
import re

import pytest
import torch
import torch.nn.utils.parametrize as P
from swapping import LINEAR, same, state
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune

import bptoolkit as bp

# --- parametrizations, pruning


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


def double(layer):
    P.register_parametrization(layer, "weight", Double())
    return layer


PARAMETRIZE = {
    "custom": double,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZE)
def test_parametrized(name, ran):
    layer = PARAMETRIZE[name](nn.Linear(4, 4)).eval()
    x = torch.randn(3, 4)
    y, keys = layer(x), list(layer.state_dict())
    assert "swapped" in bp.swap(layer).summary()
    assert torch.allclose(layer(x), y) and ran == ["linear"]
    assert list(layer.state_dict()) == keys and P.type_before_parametrizations(layer) is LINEAR
    twin = copy.deepcopy(layer)  # shares the generated class
    bp.unswap(layer)
    assert torch.allclose(layer(x), y) and ran == ["linear"]
    assert type(layer).__name__ == "ParametrizedLinear" and P.type_before_parametrizations(layer) is nn.Linear
    assert P.type_before_parametrizations(twin) is LINEAR
    P.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    P.remove_parametrizations(twin, "weight")
    assert type(twin) is LINEAR and torch.allclose(twin(x), y)


def test_parametrized_after_the_swap():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    names = set(vars(layer))
    bp.swap(layer)
    y = double(layer)(x)
    assert P.type_before_parametrizations(layer) is LINEAR
    assert list(bp.swap(layer).already) == [""]
    bp.unswap(layer)
    assert P.type_before_parametrizations(layer) is nn.Linear and torch.allclose(layer(x), y)
    P.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear and set(vars(layer)) == names


def test_parametrized_twice_on_one_module(ran):
    layer = double(double(nn.Linear(4, 4)))
    P.register_parametrization(layer, "bias", Double())
    x = torch.randn(3, 4)
    y = layer(x)
    bp.swap(layer)
    P.remove_parametrizations(layer, "bias")
    assert torch.allclose(layer(x), y) and ran == ["linear"]
    assert P.is_parametrized(layer, "weight") and type(layer).__name__ == "ParametrizedLinear"


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("cls", [nn.Linear, nn.LSTM])
@pytest.mark.parametrize("change", ["prune", "old weight_norm", "weight_norm"])
def test_weights_computed_on_the_way(change, cls, ran):
    layer, x, name = cls(4, 4), torch.randn(3, 4), "weight" if cls is nn.Linear else "weight_hh_l0"
    if change == "prune":
        prune.l1_unstructured(layer, name, 0.5)
    else:
        (nn.utils if change.startswith("old") else parametrizations).weight_norm(layer, name)
    y, keys, held = first(layer(x)), list(layer.state_dict()), set(vars(layer))
    bp.swap(layer)
    assert torch.allclose(first(layer(x)), y, atol=1e-6) and ran
    assert list(layer.state_dict()) == keys
    bp.unswap(layer)
    assert set(vars(layer)) == held and isinstance(layer, cls) and torch.equal(first(layer(x)), y)
    bp.swap(layer)
    if change == "prune":
        prune.remove(layer, name)
        assert torch.allclose(first(layer(x)), y, atol=1e-6)


def first(out):
    return out[0] if isinstance(out, tuple) else out


# --- what is left alone


class Mine(nn.Linear):
    pass


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(())), nn.Identity()


def patched():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    return layer


def named_backend():
    layer = nn.Linear(2, 2)
    layer.backend = "nccl"
    return layer


def subclass_weight():
    from torch.testing._internal.two_tensor import TwoTensor

    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    return layer


LEFT = {
    "subclass": (lambda: Mine(2, 2), "subclass of Linear"),
    "parametrized subclass": (lambda: double(Mine(2, 2)), "subclass of Linear"),
    "lazy": (lambda: nn.LazyLinear(2), "lazy"),
    "scripted": (lambda: torch.jit.script(nn.Linear(2, 2)), "torch.jit"),
    "traced": (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(2)), "torch.jit"),
    "quantization-aware": (lambda: torch.ao.nn.qat.Linear(2, 2, qconfig=torch.ao.quantization.default_qconfig), "quantization"),
    "forward on the instance": (patched, "forward was replaced"),
    "an attribute named backend": (named_backend, "'backend'"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
    "tensor subclass": (subclass_weight, "TwoTensor"),
    "no op": (lambda: nn.Identity(), "no op for Identity"),
    "empty container": (nn.Sequential, "container"),
    "own parameters": (OwnParameter, "container; what it does with its own parameters is not seen"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    make, why = LEFT[name]
    model = nn.ModuleList([make()])
    before = state(model)
    report = bp.swap(model)
    assert re.search(why, report.left["0"]), report.left["0"]
    same(before, state(model))


def test_a_class_whose_forward_was_replaced(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert "forward of the class Linear was replaced" in bp.swap(nn.Linear(2, 2)).left[""]


def test_a_lazy_module_once_materialised():
    model = nn.Sequential(nn.LazyLinear(3))
    assert not bp.swap(model).swapped
    model(torch.ones(2, 4))
    assert list(bp.swap(model).swapped) == ["0"]


# --- attention and the fast paths of the encoder


def layer(**kwargs):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **kwargs)


def test_attention_is_swapped_as_a_whole(ran):
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    y, before = model(x, x, x), state(model)
    report = bp.swap(model)
    assert list(report.swapped) == [""] and "part of MultiheadAttention" in report.left["out_proj"]
    assert type(model.out_proj) is NonDynamicallyQuantizableLinear
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model(x, x, x), y)) and ran.count("linear") >= 2
    bp.unswap(model)
    same(before, state(model))
    assert "part of MultiheadAttention" in bp.swap(model, exclude="*").left["out_proj"]


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj.weight"])
def test_attention_with_a_parametrized_weight(name, ran):
    model, x = nn.MultiheadAttention(8, 2), torch.randn(3, 5, 8)
    owner, _, weight = name.rpartition(".")
    parametrizations.weight_norm(model.get_submodule(owner), weight)
    y = model(x, x, x)[0]
    bp.swap(model)
    assert torch.allclose(model(x, x, x)[0], y, atol=1e-6) and ran
    bp.unswap(model)
    P.remove_parametrizations(model.get_submodule(owner), weight)
    assert type(model) is nn.MultiheadAttention and type(model.out_proj) is NonDynamicallyQuantizableLinear


class CallsOutProj(nn.MultiheadAttention):
    def forward(self, x):
        return self.out_proj(x)


def test_an_output_projection_that_is_called(ran):
    model, x = CallsOutProj(8, 2), torch.randn(3, 8)
    y = model(x)
    report = bp.swap(model)
    assert (list(report.swapped) == ["out_proj"] and "subclass" in report.left[""]) or "own parameters" in report.left[""]
    assert torch.allclose(model(x), y) and ran == ["linear"]
    bp.unswap(model)
    assert type(model.out_proj) is NonDynamicallyQuantizableLinear


class MyLayer(nn.TransformerEncoderLayer):
    pass


@pytest.mark.parametrize("cls", [nn.TransformerEncoderLayer, MyLayer])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU()])
def test_inference_runs_the_swapped_modules(cls, activation, ran):
    model = cls(8, 2, 16, dropout=0.0, batch_first=True, activation=activation).eval()
    x, before = torch.randn(3, 5, 8), state(model)
    with torch.no_grad():
        y = model(x)
        report = bp.swap(model)
        assert torch.allclose(model(x), y, atol=1e-6)
    assert {"linear", "layer_norm", "attention"} <= set(ran)
    assert "fast path off" in report.adjusted[""]
    assert "fast path is off" in bp.swap(model).left[""]
    del ran[:]
    bp.unswap(model)
    same(before, state(model))
    with torch.no_grad():
        assert torch.equal(model(x), y)  # the fast path again
    assert not ran


def test_encoder_with_padding(ran):
    """Nested tensors would reach the swapped layers; torch writes zeros at padded positions on that path alone."""
    model = nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(8)).eval()
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    before = state(model)
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        report = bp.swap(model)
        assert torch.allclose(model(x, src_key_padding_mask=padding)[~padding], y[~padding], atol=1e-6)
    assert set(report.adjusted) == {"", "layers.0", "layers.1"} and ran.count("linear") >= 4
    bp.unswap(model)
    same(before, state(model))


def test_the_fast_path_stays_where_nothing_is_swapped():
    model = nn.ModuleList([layer(), layer()])
    report = bp.swap(model, only="1")
    assert list(report.adjusted) == ["1"] and model[0].activation_relu_or_gelu == 1
    both = nn.TransformerEncoder(layer(), 2)
    report = bp.swap(both, only="layers.1.linear1")
    assert set(report.adjusted) == {"", "layers.1"}
    assert not bp.swap(nn.TransformerEncoder(layer(), 2), only=[]).adjusted


def test_an_encoder_around_layers_swapped_before():
    model = nn.TransformerEncoder(layer(), 1).eval()
    bp.swap(model.layers[0])
    assert list(bp.swap(model).adjusted) == [""]
    with torch.no_grad():
        model(torch.randn(2, 3, 8), src_key_padding_mask=torch.tensor([[False] * 3, [False, False, True]]))
    bp.unswap(model)
    assert model.use_nested_tensor and model.layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("where", ["linear1", "dropout", "self_attn"])
def test_a_hook_on_a_module_that_the_fast_path_would_bypass(where):
    model, fired = layer().eval(), []
    bp.swap(model)
    model.get_submodule(where).register_forward_hook(lambda *_: fired.append(where))
    with torch.no_grad():
        model(torch.randn(2, 3, 8))
    assert fired == [where]


# --- wrappers


@pytest.fixture
def gloo():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_inside_ddp(gloo, ran):
    inner = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2))
    model, x = nn.parallel.DistributedDataParallel(inner), torch.randn(3, 4)
    dy = torch.randn(3, 2)
    model(x).backward(dy)
    grads = [p.grad.clone() for p in model.parameters()]
    assert list(bp.swap(model).swapped) == ["module.0", "module.2"]
    model.zero_grad()
    model(x).backward(dy)
    assert ran == ["linear"] * 2
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(model.parameters(), grads))
    bp.unswap(model)
    assert type(inner[0]) is nn.Linear


def test_fully_sharded(gloo, ran):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    y = model(x)
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    report = bp.swap(model)
    assert list(report.swapped) == ["0"] and "fully_shard" in report.left["1"]
    assert torch.allclose(model(x), y, atol=1e-6) and ran == ["linear"]
    model(x).backward(torch.randn(3, 2))


def test_tensor_parallel(gloo, ran):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    y = model(x)
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel(), "1": RowwiseParallel()})
    assert list(bp.swap(model).swapped) == ["0", "1"]
    assert torch.allclose(model(x), y, atol=1e-6) and ran == ["linear"] * 2
    model(x).backward(torch.randn(3, 2))


class Tanh(nn.Module):  # torch has nothing to compile in a model whose forwards are all its own
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).tanh()


@pytest.mark.parametrize("how", ["module.compile", "torch.compile"])
def test_compiled_before_the_swap(how):
    """The guards see the class change: the next call compiles again, with the rules in the graph."""
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    x, model = torch.randn(3, 4, requires_grad=True), Tanh()
    if how == "torch.compile":
        call = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=True)
        call = model
    y, before = call(x), state(model)
    bp.swap(model)
    assert torch.allclose(call(x), y)
    bp.unswap(model)
    assert torch.equal(call(x), y)
    assert ["in_graph" in " ".join(g) for g in graphs] == [False, True]
    same(before, state(model))
