"""swap and unswap: what is kept, what is left alone, what is chosen, what is restored."""

import copy
import importlib
import io
import pickle
from types import MappingProxyType

import pytest
import torch
from swapping import LINEAR, same, state
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import bptoolkit as bp

module = importlib.import_module("bptoolkit.swap")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"in": nn.Linear(4, 6), "out": nn.Linear(6, 4)})
        self.same = nn.Identity()
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.head(self.same(self.encoder["out"](self.encoder["in"](x).tanh())))


# --- what is kept


def test_swapped_modules_hold_the_same_objects_and_unswap_restores():
    model = Net().eval().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, text, keys = state(model), repr(model), list(model.state_dict())
    report = bp.swap(model)
    assert set(report.swapped) == {"encoder.in", "encoder.out", "head"}
    for name, (_, held) in before.items():
        now = vars(model.get_submodule(name))
        assert all(now[k] is v for k, v in held.items()), name
        assert set(now) - set(held) <= {"_bptoolkit_was"}
    assert repr(model) == text and list(model.state_dict()) == keys
    assert type(model.head) is LINEAR and not model.head.training
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert bp.unswap(model) == ("encoder.in", "encoder.out", "head")
    same(before, state(model))
    assert bp.unswap(model) == ()


def test_checkpoints_go_both_ways():
    a, b = Net().eval(), Net().eval()
    bp.swap(a)
    b.load_state_dict(a.state_dict())
    x = torch.randn(3, 4)
    assert torch.allclose(a(x), b(x))
    a.load_state_dict(Net().state_dict())


def test_hooks_fire(ran):
    layer, fired = nn.Linear(3, 3), []
    layer.register_forward_pre_hook(lambda *_: fired.append("pre"))
    layer.register_forward_hook(lambda *_: fired.append("forward"))
    layer.register_full_backward_hook(lambda *_: fired.append("backward"))
    layer.register_state_dict_post_hook(lambda *_: fired.append("state"))
    bp.swap(layer)
    x = torch.randn(2, 3, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    layer.state_dict()
    assert fired == ["pre", "forward", "backward", "state"] and ran == ["linear"]


def test_ties_and_shared_instances():
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False), "tower": nn.Sequential()})
    model["head"].weight = model["emb"].weight
    model["tower"].append(model["head"])
    report = bp.swap(model)
    assert model["head"] is model["tower"][0] and type(model["head"]) is LINEAR
    assert model["head"].weight is model["emb"].weight
    assert "tower.0" in report.swapped["head"] and set(report.swapped) == {"emb", "head"}
    bp.unswap(model)
    report = bp.swap(model, only="tower.0")  # a shared module goes by any of its names
    assert list(report.swapped) == ["head"]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_swapped_and_can_be_unswapped(how, backend, ran):
    model = Net().eval()
    before = state(model)
    bp.swap(model, backend=backend)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    x = torch.randn(2, 4)
    assert torch.equal(other(x), model(x)) and ran == ["linear"] * 6
    assert type(other.head) is LINEAR and other.head.backend == backend
    bp.unswap(other)
    assert {n: (c, list(v)) for n, (c, v) in state(other).items()} == {n: (c, list(v)) for n, (c, v) in before.items()}
    assert type(model.head) is LINEAR


def test_swapping_twice_is_swapping_once():
    model = Net()
    before = state(model)
    first = bp.swap(model)
    second = bp.swap(model)
    assert not second.swapped and set(second.already) == set(first.swapped)
    assert "keeps backend 'auto'" in bp.swap(model, backend="eager").already["head"]
    bp.unswap(model)
    same(before, state(model))


def test_a_module_made_as_ours_stays():
    model = nn.Sequential(LINEAR(2, 2), nn.Linear(2, 2))
    assert list(bp.swap(model).already) == ["0"]
    bp.unswap(model)
    assert [type(m) for m in model] == [LINEAR, nn.Linear]


def test_a_half_way_failure_changes_nothing(monkeypatch):
    class Wide(nn.Tanh):
        __slots__ = ("other",)  # another layout: the class cannot be given to a Tanh

    fake = bp.Op(
        name="fake", call=torch.tanh, reference=torch.tanh, shapes="x: *B -> *B", source="", module=(Wide,), replaces=(nn.Tanh,)
    )
    monkeypatch.setattr(module, "OPS", MappingProxyType({"linear": bp.OPS["linear"], "fake": fake}))
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    before = state(model)
    with pytest.raises(TypeError, match="layout"):
        bp.swap(model, backend="eager")
    same(before, state(model))


# --- backend and rules


def test_backend_is_an_attribute_of_the_instance(monkeypatch):
    asked = []
    pick = bp.Op.pick
    monkeypatch.setattr(bp.Op, "pick", lambda op, rule, backend, *a: (asked.append(backend), pick(op, rule, backend, *a))[1])
    model, x = Net(), torch.randn(2, 4)
    bp.swap(model, only="head", backend="eager")
    bp.swap(model)
    model(x)
    assert asked == ["auto", "auto", "eager"]
    assert "backend" not in vars(model.encoder["in"]) and vars(model.head)["backend"] == "eager"
    assert "backend" not in repr(model) and not any("backend" in k for k in model.state_dict())
    bp.unswap(model)
    assert not hasattr(model.head, "backend")


def test_backend_triton_leaves_ops_without_a_kernel():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    report = bp.swap(model, backend="triton")
    assert list(report.swapped) == ["1"] and model[1].backend == "triton"
    assert "no fused kernel" in report.left["0"]


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (ValueError, "backend='cuda' is not known; choose from 'auto', 'eager', 'triton'", {"backend": "cuda"}),
        (NotImplementedError, "only rules=None", {"rules": "feedback_alignment"}),
        (ValueError, r"only='encoder\.inn' matches no module; near names: encoder\.in", {"only": "encoder.inn"}),
        (ValueError, "exclude='decoder.*' matches no module", {"exclude": ["head", "decoder.*"]}),
        (ValueError, "exclude=Conv2d matches no module; the model has Identity, Linear", {"exclude": nn.Conv2d}),
        (ValueError, "only=<Linear> matches no module", {"only": nn.Linear(2, 2)}),
        (TypeError, "only=int is not a class of modules", {"only": int}),
        (TypeError, "exclude takes names, module classes, modules or functions", {"exclude": ["head", 3]}),
        (ZeroDivisionError, "division", {"exclude": lambda name, module: 1 / 0}),
    ],
)
def test_refused_before_any_change(error, match, kwargs):
    model = Net()
    before = state(model)
    with pytest.raises(error, match=match):
        bp.swap(model, **kwargs)
    same(before, state(model))


def test_not_a_module():
    for call in (bp.swap, bp.unswap):
        with pytest.raises(TypeError, match="is a list, not a torch"):
            call([nn.Linear(2, 2)])


# --- only and exclude


@pytest.mark.parametrize(
    ("kwargs", "chosen"),
    [
        ({"only": "head"}, {"head"}),
        ({"only": "*.out"}, {"encoder.out"}),
        ({"only": "encoder"}, {"encoder.in", "encoder.out"}),
        ({"only": nn.ModuleDict}, {"encoder.in", "encoder.out"}),
        ({"only": [nn.Identity, "head"]}, {"head"}),
        ({"only": lambda name, m: isinstance(m, nn.Linear) and m.bias is None}, {"head"}),
        (
            {"only": lambda name, m: "head" not in name},
            {"encoder.in", "encoder.out"},
        ),  # asked of each, not of what is around it
        ({"only": []}, set()),
        ({"exclude": nn.Linear}, set()),
        ({"exclude": ["head", lambda name, m: name.endswith("in")]}, {"encoder.out"}),
        ({"only": "encoder", "exclude": "encoder.in"}, {"encoder.out"}),
        ({"exclude": "*"}, set()),
    ],
)
def test_only_and_exclude(kwargs, chosen):
    report = bp.swap(model := Net(), **kwargs)
    assert set(report.swapped) == chosen
    assert {n for n, m in model.named_modules() if type(m) is LINEAR} == chosen
    rest = {"head", "encoder.in", "encoder.out"} - chosen
    assert {report.left[n] for n in rest} <= {"not in only", "excluded"}


def test_a_module_can_be_named_by_itself():
    model = Net()
    assert set(bp.swap(model, exclude=model.encoder).swapped) == {"head"}


# --- the report


def test_report_names_every_module():
    model = Net()
    report = bp.swap(model, exclude="head")
    assert [e.name for e in report.entries] == [n for n, _ in model.named_modules()]
    assert report.left == {"": "container", "encoder": "container", "same": report.left["same"], "head": "excluded"}
    lines = str(report).splitlines()
    assert len({line.index(e.what) for line, e in zip(lines[1:], report.entries)}) == 1  # aligned
    assert lines[1].startswith("(model)") and lines[-1].startswith("2 swapped (2 Linear); ")
    assert pickle.loads(pickle.dumps(report)) == report


# --- the classes


@pytest.mark.parametrize("theirs", list(module._table()), ids=lambda c: c.__name__)
def test_the_classes_of_the_ops(theirs):
    ours, _ = module._table()[theirs]
    assert issubclass(ours, theirs) or theirs is NonDynamicallyQuantizableLinear
    assert "__init__" not in vars(ours) and ours.backend == "auto"  # __init__ does not run when a module is swapped
    assert pickle.loads(pickle.dumps(ours)) is ours and getattr(bp.nn, ours.__name__) is ours
    assert ours.__name__ == theirs.__name__ or theirs is NonDynamicallyQuantizableLinear


def test_every_module_of_an_op_has_a_class_to_replace():
    for op in bp.OPS.values():
        assert len(op.module) == len(op.replaces), op.name
    assert bp.nn.Linear in {ours for ours, _ in module._table().values()}
