"""Every op with the transforms and tools of torch that `bptoolkit.verify` does not judge: it equals the reference there, or
raises.

First and second order, forward mode, vmap, per-sample gradients, autocast, checkpointing and memory are in test_gradients.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import FEW, NAMES, SOME, draw_call, leaves_of, random_like, scalar
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from bptoolkit import OPS

close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)
close32 = functools.partial(torch.testing.assert_close, rtol=2e-4, atol=2e-5)
pytestmark = pytest.mark.usefixtures("one_seed")
each_op = pytest.mark.parametrize("name", NAMES)
one_a_file = pytest.mark.parametrize("name", SOME)
few = pytest.mark.parametrize("name", FEW)
SEEDS = (0, 1, 2)


def call_of(name, seed=0, **kw):
    return draw_call(OPS[name], seed, **kw)


def every(name):
    for seed in SEEDS:
        yield call_of(name, seed)


@each_op
def test_third_order(name):
    c = call_of(name)

    def third(fn):
        x = leaves_of(c.tensors)
        g = scalar(fn)(*x)
        for _ in range(2):
            grads = torch.autograd.grad(g, x, create_graph=True, allow_unused=True, materialize_grads=True)
            g = sum((t.sin() * r).sum() for t, r in zip(grads, random_like(grads)))
        return torch.autograd.grad(g, x, allow_unused=True, materialize_grads=True)

    close(third(c.ours), third(c.reference))


@each_op
def test_func_grad(name):
    for c in every(name):
        at = tuple(range(len(c.tensors)))
        close(grad(scalar(c.ours), at)(*c.tensors), grad(scalar(c.reference), at)(*c.tensors))


@each_op
def test_jacobians_and_hessian(name):
    for c in every(name):
        at = tuple(range(len(c.tensors)))
        want = jacrev(c.reference, at)(*c.tensors)
        close(jacrev(c.ours, at)(*c.tensors), want)
        close(jacfwd(c.ours, at)(*c.tensors), want)
    c = call_of(name)
    at = tuple(range(len(c.tensors)))
    want = jacrev(jacrev(scalar(c.reference), at), at)(*c.tensors)
    close(hessian(scalar(c.ours), at)(*c.tensors), want)
    close(jacrev(jacrev(scalar(c.ours), at), at)(*c.tensors), want)
    close(jacrev(jacfwd(scalar(c.ours), at), at)(*c.tensors), want)


@each_op
def test_jvp_of_some_inputs(name):
    """A tangent on one input alone, and vmap over tangents."""
    c = call_of(name, 1)
    for k, t in enumerate(c.tensors):
        tangents = torch.stack([torch.randn_like(t), torch.randn_like(t)])

        def push(fn, v, k=k):
            return jvp(lambda u: fn(*c.tensors[:k], u, *c.tensors[k + 1 :]), (c.tensors[k],), (v,))[1]

        def by_reverse(v, k=k):
            jac = jacrev(c.reference, k)(*c.tensors)
            return tuple((j * v).flatten(j.dim() - v.dim()).sum(-1) for j in jac)

        close(push(c.ours, tangents[0]), by_reverse(tangents[0]))
        close(
            vmap(lambda v: push(c.ours, v))(tangents),
            tuple(torch.stack(p) for p in zip(*(by_reverse(v) for v in tangents))),
        )


@each_op
def test_forward_mode_outside_vmap(name):
    """Jvp of vmap, where test_jvp_of_some_inputs has vmap of jvp."""
    c = call_of(name, 2)
    dims = (0, *[None] * (len(c.tensors) - 1))
    batch = torch.stack([c.tensors[0], c.tensors[0].cos()])
    tangents = tuple(torch.randn_like(t) for t in (batch, *c.tensors[1:]))
    got = jvp(vmap(c.ours, dims), (batch, *c.tensors[1:]), tangents)[1]
    loop = [jvp(c.ours, (x, *c.tensors[1:]), (v, *tangents[1:]))[1] for x, v in zip(batch, tangents[0])]
    close(got, tuple(torch.stack(o) for o in zip(*loop)))


@each_op
def test_forward_over_forward_is_refused(name):
    c = call_of(name)
    with pytest.raises(NotImplementedError, match=r"jacfwd\(torch.func.jacrev"):
        jacfwd(jacfwd(scalar(c.ours)))(*c.tensors)


@one_a_file
def test_maml(name):
    """Gradients through gradient steps."""
    c = call_of(name)

    def run(fn):
        x = leaves = leaves_of(c.tensors)
        for _ in range(3):
            g = torch.autograd.grad(scalar(fn)(*x), x, create_graph=True, allow_unused=True, materialize_grads=True)
            x = tuple(t - 0.01 * d for t, d in zip(x, g))
        return torch.autograd.grad(scalar(fn)(*x), leaves, allow_unused=True, materialize_grads=True)

    close(run(c.ours), run(c.reference))


def compiled_matches(c, backend, dynamic=None):
    torch._dynamo.reset()
    ours = torch.compile(lambda *t: tuple(o.sin() + 1 for o in c.ours(*t)), fullgraph=True, backend=backend, dynamic=dynamic)
    results = []
    for fn in (ours, lambda *t: tuple(o.sin() + 1 for o in c.reference(*t))):
        x = leaves_of(c.tensors)
        out = fn(*x)
        results.append((out, torch.autograd.grad(out, x, random_like(out), allow_unused=True, materialize_grads=True)))
    close32(*results)


@one_a_file
def test_compile_inductor(name):
    compiled_matches(call_of(name, dtype=torch.float32), "inductor")


@few
def test_compile_dynamic(name):  # test_recompile.py has every op at several sizes
    compiled_matches(call_of(name, dtype=torch.float32), "aot_eager", dynamic=True)


@few
def test_compile_of_transforms(name):
    c = call_of(name, dtype=torch.float32)
    at = tuple(range(len(c.tensors)))
    batch = torch.stack([c.tensors[0], c.tensors[0].cos()])
    dims = (0, *[None] * (len(c.tensors) - 1))
    tangents = tuple(torch.ones_like(t) for t in c.tensors)
    for fn, args in (
        (lambda f: grad(scalar(f), at), c.tensors),
        (lambda f: vmap(f, dims), (batch, *c.tensors[1:])),
        (lambda f: vmap(grad(scalar(f)), dims), (batch, *c.tensors[1:])),
        (lambda f: lambda *x: jvp(f, x, tangents), c.tensors),
    ):
        torch._dynamo.reset()
        close32(torch.compile(fn(c.ours), fullgraph=True, backend="aot_eager")(*args), fn(c.ours)(*args))


@few
def test_compiled_autograd(name):
    c = call_of(name, dtype=torch.float32)
    torch._dynamo.reset()
    x, y = leaves_of(c.tensors), leaves_of(c.tensors)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        scalar(c.ours)(*x).backward()
    scalar(c.reference)(*y).backward()
    close32([t.grad for t in x], [t.grad for t in y])


@one_a_file
@pytest.mark.parametrize("strict", [False, True])
def test_export(name, strict):
    c = call_of(name, dtype=torch.float32)

    class M(torch.nn.Module):
        def forward(self, *x):
            return c.ours(*x)

    program = torch.export.export(M(), c.tensors, strict=strict)
    close32(program.module()(*c.tensors), c.ours(*c.tensors))


@each_op
def test_saved_tensors_hooks(name):
    """Everything that is kept goes through the hooks: packed to float16, the gradients change."""
    c = call_of(name)
    packed = []

    def pack(t):
        packed.append(t)
        return t.clone()

    x = leaves_of(c.tensors)
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.clone):
        loss = scalar(c.ours)(*x)
    assert packed
    y = leaves_of(c.tensors)
    close(torch.autograd.grad(loss, x), torch.autograd.grad(scalar(c.reference)(*y), y))


@each_op
@pytest.mark.parametrize("device", ["meta", "fake"])
def test_meta_and_fake_tensors(name, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    c = call_of(name, dtype=torch.float32)
    if device == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = tuple(torch.empty(t.shape, dtype=t.dtype, requires_grad=True) for t in c.tensors)
            out = c.ours(*x)
            grads = torch.autograd.grad(out, x, tuple(torch.empty_like(o) for o in out), allow_unused=True)
    else:
        x = tuple(t.to("meta").requires_grad_() for t in c.tensors)
        moved = draw_call(OPS[name], 0, dtype=torch.float32, device="meta")
        out = moved.ours(*x)
        grads = torch.autograd.grad(out, x, tuple(torch.empty_like(o) for o in out), allow_unused=True)
    assert [o.shape for o in out] == [o.shape for o in c.reference(*c.tensors)]
    assert all(g is None or g.shape == t.shape for g, t in zip(grads, x))


@each_op
def test_no_grad_and_inference_mode(name):
    c = call_of(name)
    want = c.reference(*c.tensors)
    with torch.inference_mode():
        close(c.ours(*c.tensors), want)
    with torch.no_grad():
        close(c.ours(*leaves_of(c.tensors)), want)
