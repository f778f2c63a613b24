"""Which rules run: the table of `choose`, all of it; and real calls at its cells, each equal to float64 truth or an error."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vmap

import bptoolkit as bp
from bptoolkit.choose import BACKENDS, State, choose

FALSE_TRUE = (False, True)
TABLE = [
    State(*cell)
    for cell in product(
        BACKENDS, ("forward", "backward"), *(FALSE_TRUE,) * 4, (None, "too long"), (None, "the vendor's is the default")
    )
]


def expected(s: State) -> str:
    """The rule, or the reason why a backend by name cannot run; stated on its own, in another order than `choose`."""
    differentiated = s.phase == "backward" and s.kernel and (s.grad_mode or s.transforms)
    if s.on_request and s.backend == "auto":
        return "eager"
    if s.backend != "eager" and s.kernel and s.on_device and not s.transforms and not s.unsupported and not differentiated:
        return "triton"
    if s.backend != "triton" or differentiated:
        return "eager"
    if not s.kernel:
        return "no fused kernel"
    if not s.on_device:
        return "on the GPU"
    return "functorch transform" if s.transforms else "too long"


@pytest.mark.parametrize("state", TABLE, ids=lambda s: "-".join(map(str, s)))
def test_table(state):
    want = expected(state)
    if want in ("eager", "triton"):
        rule, reason = choose(state)
        assert rule == want and reason
    else:
        with pytest.raises(ValueError, match=f"^op: backend='triton' cannot run here: .*{want}"):
            choose(state, "op")


def test_table_is_whole():
    assert len(set(TABLE)) == len(TABLE) == 3 * 2**7
    assert {choose(s).rule for s in TABLE if s.backend == "auto"} == {"eager", "triton"}


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_unknown_backend(phase):
    with pytest.raises(ValueError, match="op: backend='cuda' is not known; choose from 'auto', 'eager', 'triton'"):
        choose(State("cuda", phase, True, True, False, False, None), "op")


# ---- real calls

DEVICES = ["cpu"]
if importlib.util.find_spec("triton"):
    DEVICES += ["interpreter"]
if torch.cuda.is_available():
    DEVICES += ["cuda"]

N = 5
WEIGHTS = torch.linspace(-1, 1, N, dtype=torch.float64).exp()


def loss(fn, x):
    """A scalar with a curvature of its own."""
    y = fn(x, (N,), WEIGHTS.to(x))
    return (y.sin() * WEIGHTS.to(y)).sum()


# What is called: a function of one tensor to one tensor.
CALLS = {
    "none": lambda fn: lambda x: fn(x, (N,), WEIGHTS.to(x)).sin(),
    "vmap": lambda fn: vmap(lambda row: fn(row, (N,), WEIGHTS.to(row)).sin()),
    "grad": lambda fn: grad(lambda x: loss(fn, x)),
    "jvp": lambda fn: lambda x: jvp(lambda x: fn(x, (N,), WEIGHTS.to(x)).sin(), (x,), (x.cos(),))[1],
    "hessian": lambda fn: hessian(lambda x: loss(fn, x)),
}


def run(call, mode, x):
    """The call, and what is differentiated of it: nothing, once, or once with create_graph and again."""
    x = x.clone().requires_grad_()
    if mode == "no_grad":
        with torch.no_grad():
            return [call(x)]
    y = call(x)
    dy = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).cos().reshape(y.shape).to(y)
    if mode == "grad":
        return [y.detach(), torch.autograd.grad(y, x, dy)[0]]
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    return [y.detach(), dx.detach(), torch.autograd.grad((dx.sin() * WEIGHTS.to(dx)).sum(), x)[0]]


@pytest.fixture
def traced(monkeypatch):
    """Which of the kernel's rules ran or were traced; empty without Triton."""
    names = set()
    if "interpreter" in DEVICES:
        from bptoolkit.triton_kernels import layer_norm as file

        def watched(phase):
            real = getattr(file.KERNEL, phase)
            return lambda *a: (names.add(phase), real(*a))[1]

        rules = {phase: watched(phase) for phase in ("forward", "backward")}
        monkeypatch.setattr(file, "KERNEL", file.KERNEL._replace(**rules))
    return names


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["no_grad", "grad", "create_graph"])
@pytest.mark.parametrize("transform", CALLS)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_cell(device, backend, mode, transform, compiled, traced):
    on_device = device != "cpu"
    x = torch.linspace(-2, 3, 2 * N, dtype=torch.float64).sin().reshape(2, N) * 2
    ours = CALLS[transform](lambda *a: bp.functional.layer_norm(*a, backend=backend))
    if compiled:
        torch._dynamo.reset()
        ours = torch.compile(ours, fullgraph=True, backend="aot_eager")

    with interpreting() if device == "interpreter" else nullcontext():

        def call():
            return run(ours, mode, x.float().to("cuda" if device == "cuda" else "cpu"))

        if backend == "triton" and not (on_device and transform == "none"):
            reason = "functorch transform or forward mode" if on_device else "kernel needs every tensor on the GPU"
            with pytest.raises(torch._dynamo.exc.Unsupported if compiled else ValueError, match=reason):
                call()
            assert not traced
            return
        if compiled and mode == "create_graph":  # of no op: torch raises, or finds no way back to x
            with pytest.raises(RuntimeError, match=r"double backward|appears to not have been used|does not require grad"):
                call()
            return
        got = call()

    want = run(CALLS[transform](reference), mode, x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double().cpu(), w, rtol=1e-3, atol=1e-3 * float(w.abs().max()))

    kernel = on_device and backend != "eager" and transform == "none"
    assert ("forward" in traced) == kernel
    assert ("backward" in traced) == (kernel and mode != "no_grad")


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_backward_that_is_differentiated_again_is_eager(backend, traced):
    """A forward by name keeps its kernel; the last backward, of which nothing is kept, is the kernel's again."""
    if "interpreter" not in DEVICES:
        pytest.skip("Triton is not installed")
    x = torch.randn(2, N, requires_grad=True)
    with interpreting():
        y = bp.functional.layer_norm(x, (N,), backend=backend)
        assert traced == {"forward"}
        (dx,) = torch.autograd.grad(y, x, x.detach().cos(), create_graph=True)
        assert traced == {"forward"}
        torch.autograd.grad(dx, x, x.detach().sin())
        assert traced == {"forward", "backward"}


def interpreting():
    from bptoolkit.triton_kernels import interpret

    return interpret()


def reference(x, shape, w):
    """Plain torch, of which autograd gives third derivatives (of torch's own layer_norm they are wrong)."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w


def test_a_compiled_function_follows_the_device():
    """Inside interpret() and outside, one compiled function runs the rules of where it is called: nothing is baked in."""
    if "interpreter" not in DEVICES:
        pytest.skip("Triton is not installed")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, inputs):
            graphs.append({str(n.target) for n in graph.graph.nodes})
            return graph

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    f = torch.compile(lambda x: bp.functional.layer_norm(x, (N,)), fullgraph=True, backend=backend)
    x = torch.randn(3, N)
    for inside in (True, False, True):
        with interpreting() if inside else nullcontext():
            torch.testing.assert_close(f(x), F.layer_norm(x, (N,)))
    assert ["bptoolkit.triton_norm.default" in g for g in graphs] == [True, False]
