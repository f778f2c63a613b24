"""bp.associative_scan: operators on several tensors, every small size, by autograd and by the operator's vjp."""

from __future__ import annotations

import doctest
import functools
import sys

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
DOUBLE = torch.float64


def affine(f, g):
    """x -> a x + b, f first."""
    return g[0] * f[0], g[0] * f[1] + g[1]


def affine_vjp(d, f, g):
    (da, db), (fa, fb), (ga, _) = d, f, g
    return (da * ga, db * ga), (da * fa + db * fb, db)


def product(f, g):
    return {"m": g["m"] @ f["m"]}


def product_vjp(d, f, g):
    return {"m": g["m"].mT @ d["m"]}, {"m": d["m"] @ f["m"].mT}


def times(f, g):
    return f * g


def times_vjp(d, f, g):
    return d * g, d * f


def draw(*shape, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * 0.9).requires_grad_()


OPERATORS = {
    "affine": (affine, affine_vjp, lambda T: ((draw(2, T, 3), draw(2, T, 3, seed=2)), 1)),
    "matrices": (product, product_vjp, lambda T: ({"m": draw(T, 3, 3)}, 0)),
    "product": (times, times_vjp, lambda T: (draw(2, T), -1)),
}
each = pytest.mark.parametrize("name", OPERATORS)
by = pytest.mark.parametrize("by", ["vjp", "autograd"])


def leaves_of(elements):
    return torch.utils._pytree.tree_leaves(elements)


def one_by_one(fn, elements, dim, reverse):
    """The definition."""
    leaves, spec = torch.utils._pytree.tree_flatten(elements)
    steps = [[t.narrow(dim, k, 1) for t in leaves] for k in range(leaves[0].shape[dim])]
    steps = steps[::-1] if reverse else steps
    out = steps[:1]
    build = functools.partial(torch.utils._pytree.tree_unflatten, treespec=spec)
    for s in steps[1:]:
        out.append(leaves_of(fn(build(out[-1]), build(s))))
    return build([torch.cat(parts[::-1] if reverse else parts, dim) for parts in zip(*out)])


def loss(out):
    return sum((o.sin() * torch.arange(1, o.numel() + 1, dtype=o.dtype).cos().reshape(o.shape)).sum() for o in leaves_of(out))


@each
@by
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31])
def test_against_the_definition(name, by, reverse, T):
    fn, vjp, make = OPERATORS[name]
    elements, dim = make(T)
    leaves, results = leaves_of(elements), []
    ours = bp.associative_scan(fn, elements, dim, reverse=reverse, vjp=vjp if by == "vjp" else None)
    for out in (ours, one_by_one(fn, elements, dim, reverse)):
        first = torch.autograd.grad(loss(out), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
        results.append((leaves_of(out), first, second))
    assert type(ours) is type(elements)
    close(*results)


@by
def test_transforms(by):
    elements = tuple(t.detach() for t in (draw(6, 2), draw(6, 2, seed=2)))
    run = functools.partial(bp.associative_scan, affine, vjp=affine_vjp if by == "vjp" else None)
    want = functools.partial(one_by_one, affine, dim=0, reverse=False)
    pair = [lambda a, b, f=f: f((a, b)) for f in (run, want)]
    close(*[jvp(f, elements, elements[::-1]) for f in pair])
    samples = tuple(torch.stack([t, -t, 2 * t]) for t in elements)
    close(*[vmap(f)(*samples) for f in pair])
    close(*[vmap(grad(lambda a, b, f=f: loss(f(a, b)), (0, 1)), (0, None))(samples[0], elements[1]) for f in pair])
    for transform in (lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        close(*[transform(lambda a, b, f=f: loss(f(a, b)))(*elements) for f in pair])


@by
def test_compile(by):
    torch._dynamo.reset()
    vjp = affine_vjp if by == "vjp" else None

    def call(a, b):
        return bp.associative_scan(affine, (a, b), vjp=vjp, reverse=True)

    args = draw(9, 2), draw(9, 2, seed=2)
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    want = call(*args)
    close(out, want)
    close(torch.autograd.grad(loss(out), args), torch.autograd.grad(loss(want), args))


def test_the_depth_is_logarithmic():
    calls = []

    def counted(f, g):
        calls.append(f.shape[0])
        return f * g

    bp.associative_scan(counted, torch.rand(1000))
    assert len(calls) <= 20 and sum(calls) <= 2000


def test_what_is_kept_and_that_the_vjp_is_used():
    a, b = draw(512, 8), draw(512, 8, seed=2)
    both = 2 * a.numel() * 8
    assert saved_bytes(lambda: bp.associative_scan(affine, (a, b), vjp=affine_vjp)) <= 2 * both
    assert saved_bytes(lambda: bp.associative_scan(affine, (a, b))) > 2 * both
    wrong = bp.associative_scan(times, a, vjp=lambda d, f, g: (d * g, 0 * d))
    assert not torch.allclose(torch.autograd.grad(wrong.sum(), a)[0], torch.autograd.grad(a.cumprod(0).sum(), a)[0])


def test_verify():
    def run(a, b):
        return bp.associative_scan(affine, (a, b), vjp=affine_vjp)

    def linear(a, b):
        return a.cumprod(0), bp.functional.linear_recurrence(a, b)

    report = bp.verify.check(run, "a: T N, b: T N -> T N, T N", reference=linear, quick=True, budget=5)
    assert report.ok, report

    def wrong(a, b):
        return bp.associative_scan(affine, (a, b), vjp=lambda d, f, g: affine_vjp((d[0], d[1] * 0.9), f, g))

    report = bp.verify.check(wrong, "a: T N, b: T N -> T N, T N", reference=linear, quick=True, properties=["gradient_value"])
    assert not report.ok


def test_the_example_in_the_docstring():
    result = doctest.testmod(sys.modules["bptoolkit.associative_scan"])
    assert result.failed == 0 and result.attempted >= 3


def test_refusals():
    x = torch.ones(4, 2)
    scan = bp.associative_scan
    with pytest.raises(ValueError, match=r"fn returns shape \(2,\) for leaf 0; its arguments have \(2, 2\)"):
        scan(lambda f, g: (f * g).sum(-1), x)
    with pytest.raises(TypeError, match=r"fn returns torch.float64 for leaf 0 of the elements, which is torch.float32"):
        scan(lambda f, g: (f * g).double(), x)
    with pytest.raises(TypeError, match="fn returns something built as"):
        scan(lambda f, g: (f, g), x)
    with pytest.raises(ValueError, match="dimension 0 is 4 and 3"):
        scan(affine, (x, x[:3]))
    with pytest.raises(ValueError, match="dim=2 is out of range"):
        scan(times, x, 2)
    with pytest.raises(TypeError, match="elements must be tensors, not list"):
        scan(times, [1.0, 2.0])
    with pytest.raises(TypeError, match=r"vjp must return \(dleft, dright\)"):
        scan(times, x.requires_grad_(), vjp=lambda d, f, g: d * g).sum().backward()
