"""The strategies: they draw what they say, elements from a seed; they shrink to what is simplest; bad input is named."""

from __future__ import annotations

import doctest

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import find, given, settings
from hypothesis import strategies as st

import bptoolkit as bp
from bptoolkit.verify import strategies as s
from bptoolkit.verify.layouts import COTANGENTS, KINKS, LAYOUTS, VALUES
from bptoolkit.verify.point import DTYPES, Axes, Point

many = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
AXES = Axes(
    {"B": (2, 1, 0, 17), "*L": ("2", "-", "2x3")},
    {
        "dtype": tuple(DTYPES),
        "layout": tuple(LAYOUTS),
        "cotangent": tuple(COTANGENTS),
        "need": ("1", "10"),
        "values": tuple(VALUES),
    },
)


def smallest(strategy, holds=lambda drawn: True):
    return find(strategy, holds, settings=many)


def seen(strategy, key, count=150):
    """The keys of what a strategy draws."""
    found = set()

    @settings(many, max_examples=count)
    @given(strategy)
    def collect(drawn):
        found.add(key(drawn))

    collect()
    return found


@many
@given(s.shapes("x: *B I, w: O I, b: O"))
def test_arguments_agree_in_their_letters(args):
    x, w, b = args
    assert x.shape[-1] == w.shape[1] and w.shape[0] == b.shape[0]
    assert F.linear(x, w, b).shape == (*x.shape[:-1], w.shape[0])
    assert all(t.dtype == torch.float64 and not t.requires_grad for t in args)


@many
@given(s.shapes("x: B 3, y: B 1", dtype=s.dtypes(("float32", "bfloat16")), layout=None, regime=s.values(), requires_grad=True))
def test_fixed_sizes_one_dtype_and_leaves(args):
    x, y = args
    assert x.shape[1:] == (3,) and y.shape == (x.shape[0], 1)
    assert x.dtype == y.dtype and x.dtype in (torch.float32, torch.bfloat16)
    assert all(t.is_leaf and t.requires_grad for t in args)


@many
@given(s.tensors((3, 4), layout=s.layouts(), dtype=s.dtypes(), regime=s.values()))
def test_a_tensor_is_of_its_shape(t):
    assert (t.shape == (3, 4) and bool(t.isfinite().all())) or t.dtype == torch.float16


@many
@given(s.tensors(st.tuples(s.sizes(around=()), s.sizes(around=()))))
def test_shapes_may_be_drawn(t):
    assert t.dim() == 2


def test_what_is_drawn_is_varied():
    strides = seen(s.tensors((3, 4), layout=s.layouts()), lambda t: (t.stride(), t.storage_offset()))
    assert len(strides) >= 5 and any(0 in stride for stride, _ in strides)
    assert seen(s.dtypes(), lambda d: d) == set(DTYPES.values())
    assert seen(s.layouts(), lambda n: n) == set(LAYOUTS)
    assert seen(s.values(), lambda n: n) == set(VALUES)
    assert seen(s.kinks(), lambda n: n) <= set(KINKS)
    assert {0, 1, 15, 16, 17, 127, 128, 129} <= seen(s.sizes(), lambda n: n, 400)


def test_sizes_leave_out_what_they_are_told_to():
    drawn = seen(s.sizes(around=(8,), zero=False, one=False, small=3), lambda n: n)
    assert drawn == {2, 3, 7, 8, 9}


def test_elements_come_from_a_seed():
    """No element is drawn: a million of them do not exceed what an example may hold, and they differ from seed to seed."""
    drawn = seen(s.tensors((1000, 1000), layout="contiguous"), lambda t: float(t.sum()), 5)
    assert len(drawn) > 1


def test_the_same_draw_gives_the_same_elements():
    first, second = (smallest(s.tensors((3, 4)), lambda t: float(t[0, 0]) > 0.5) for _ in range(2))
    assert torch.equal(first, second)


def test_everything_shrinks_to_what_is_simplest():
    t = smallest(s.tensors(st.tuples(s.sizes(), s.sizes()), layout=s.layouts(), dtype=s.dtypes(), regime=s.values()))
    assert t.shape == (2, 2) and t.is_contiguous() and t.dtype == torch.float64 and bool((t != 0).all())
    x, w = smallest(s.shapes("x: *B I, w: O I"))
    assert x.shape == (2,) and w.shape == (2, 2)
    assert smallest(s.points(AXES)) == AXES.base
    assert smallest(s.layouts()) == "contiguous" and smallest(s.values()) == "normal" and smallest(s.sizes()) == 2


def test_one_axis_that_matters_is_all_that_stays():
    assert smallest(s.points(AXES), lambda p: p.layout == "step") == AXES.base.having("layout", "step")
    found = smallest(s.points(AXES), lambda p: p.values in ("huge", "large") and p.get("B") > 2)
    assert found == AXES.base.having("values", "large").having("B", 17)


@many
@given(s.points(AXES))
def test_points_are_legal_and_can_be_parsed(point):
    assert all(point.get(axis) in values for axis, values in AXES.all.items())
    assert 0 <= point.seed < 2**16 and Point.parse(str(point)) == point


OUTPUTS = (torch.zeros(3, 4, dtype=torch.float32), torch.zeros((), dtype=torch.float64), torch.zeros(0, 2))


@many
@given(s.cotangents(OUTPUTS))
def test_cotangents_fit_their_outputs(cotangents):
    assert [(c.shape, c.dtype) for c in cotangents] == [(o.shape, o.dtype) for o in OUTPUTS]


def test_cotangents_are_of_every_kind():
    kinds = seen(
        s.cotangents(torch.zeros(3, 4)), lambda c: (c[0].stride(), bool((c[0] == 0).all()), int((c[0] != 0).sum()) == 1), 200
    )
    assert any(0 in stride for stride, _, _ in kinds) and any(zero for _, zero, _ in kinds) and any(one for _, _, one in kinds)
    assert smallest(s.cotangents(torch.zeros(3, 4)))[0].is_contiguous()
    (only,) = smallest(s.cotangents(torch.zeros(3, 4), kinds=("ones",)))
    assert only.stride() == (0, 0) and bool((only == 1).all())


def test_they_compose_with_the_checker():
    args = s.shapes("x: B I, w: O I", size=s.sizes(around=(8,), zero=False))
    assert bp.verify.check(F.linear, args, reference=F.linear, quick=True, examples=0).ok


def test_a_strategy_with_nothing_to_differentiate_by():
    with pytest.raises(ValueError, match="nothing to differentiate by"):
        bp.verify.check(F.linear, st.tuples(st.integers(), st.integers()), quick=True)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: s.layouts(("contiguous", "diagonal")), "'diagonal'.*contiguous, transposed"),
        (lambda: s.values(("odd",)), "'odd'.*normal, kinks"),
        (lambda: s.dtypes(("float8",)), "'float8'.*float64, float32"),
        (lambda: s.sizes(around=(1,)), r"around=\(1,\)"),
        (lambda: smallest(s.tensors((2,), layout="odd")), "'odd'"),
        (lambda: smallest(s.tensors((2,), regime="odd")), "'odd'"),
        (lambda: smallest(s.shapes("B I")), "'B I' is not a shapes string"),
        (lambda: smallest(s.cotangents(torch.zeros(2), kinds=("odd",))), "'odd'"),
    ],
)
def test_bad_input_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_importing_the_toolkit_does_not_import_hypothesis():
    import subprocess
    import sys

    code = "import sys, bptoolkit, bptoolkit.verify; sys.exit('hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(s)
    assert result.attempted >= 6 and result.failed == 0
