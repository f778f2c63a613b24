"""No alarm: the properties of transforms and tools on torch's own functions, on correct Functions, at small sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from trials import expect, new, once, outcome, plain

from bptoolkit.verify.properties import tools, transforms

BOTH = (transforms.double_backward, transforms.forward_mode, transforms.vmap, transforms.per_sample_gradients)
ALL = (*BOTH, tools.compile, tools.autocast, tools.fake_tensors, tools.checkpoint)


# plain torch and correct Functions: no alarm, anywhere


def several(x):
    return x.sin(), x.detach() * 2, x.cos().sum()


TORCH = {
    "linear": (F.linear, (2, 3), (4, 3), (4,)),
    "softmax": (lambda x: F.softmax(x, -1), (3, 4)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), (3, 4), (4,), (4,)),
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=1), (2, 3, 4, 5), (2, 3, 3, 3)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (2, 3, 4, 4)),
    "einsum": (lambda x, w: torch.einsum("bij,bjk->bik", x, w), (2, 3, 4), (2, 4, 5)),
    "cumsum": (lambda x: x.cumsum(-1), (3, 4)),
    "several outputs": (several, (3,)),
    "an input that is not used": (lambda x, w: x.sin(), (3,), (2,)),
    "floor": (torch.floor, (3,)),
}
POINTS = [
    {},
    {"layout": "transposed", "cotangent": "ones"},
    {"layout": "sliced", "cotangent": "sliced", "dtype": "float32"},
    {"dtype": "bfloat16"},
    {"values": "kinks", "cotangent": "zeros"},
]


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("judge", ALL, ids=lambda f: f.__name__)
def test_no_alarm_on_torch(name, judge):
    fn, *shapes = TORCH[name]
    for point in POINTS[: 1 if judge is tools.compile else None]:
        got, why = outcome(judge, fn, *shapes, reference=fn, **point)
        assert got == "ok", (point, why)
        got, why = outcome(judge, fn, *shapes, **point)
        assert got != "wrong", (point, why)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (1, 1)])
@pytest.mark.parametrize("judge", [j for j in ALL if j is not tools.compile], ids=lambda f: f.__name__)
def test_no_alarm_on_small_sizes(shape, judge):
    for fn in (torch.sin, lambda x: x.softmax(-1), lambda x: x.mean(), new):
        for reference in (torch.sin if fn is new else fn, None):
            assert outcome(judge, fn, shape, reference=reference)[0] != "wrong"


@pytest.mark.parametrize("fn", [plain, new, once], ids=["old style", "new style", "once differentiable"])
@pytest.mark.parametrize("judge", ALL, ids=lambda f: f.__name__)
def test_no_alarm_on_correct_functions(fn, judge):
    for reference in (torch.sin, None):
        assert outcome(judge, fn, (3, 4), reference=reference)[0] != "wrong"


@pytest.mark.parametrize("judge", ALL, ids=lambda f: f.__name__)
def test_what_is_not_finite_or_not_differentiable_is_left_alone(judge):
    expect("n/a", judge, torch.log, (9,), reference=torch.log, says="not finite")
    expect("n/a", judge, lambda x: x.detach() * 1, (3,), reference=torch.sin, says="no output requires grad")

    def fails(x):
        raise RuntimeError("no such size")

    expect("n/a", judge, fails, (3,), reference=torch.sin, says="no such size")
