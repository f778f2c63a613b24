"""The fused kernels: in Triton's interpreter beside the eager rules, and compiled ahead of time for parts that are not here.

Where there is a GPU, all of it but the gate runs there too, compiled.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import bptoolkit as bp
from bptoolkit import OPS, kernels

pytest.importorskip("triton", reason="Triton is not installed")

from bptoolkit.ops.layer_norm import RULE
from bptoolkit.triton_kernels import aot, interpret
from bptoolkit.triton_kernels import layer_norm as file

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ["interpreter"] + (["cuda"] if torch.cuda.is_available() else [])
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(params=DEVICES)
def device(request):
    with interpret() if request.param == "interpreter" else nullcontext():
        yield "cpu" if request.param == "interpreter" else "cuda"


@pytest.fixture
def filled(monkeypatch):
    """What the kernel's module allocates is full of NaN, so that an element it does not write shows."""

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *args, **kw):
            return torch.full(*((args[0] if isinstance(args[0], (tuple, list, torch.Size)) else args), torch.nan), **kw)

    monkeypatch.setattr(file, "torch", Torch())


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def double(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def near(got, want, dtype):
    """got, in dtype, is the float64 value rounded once, up to float32 arithmetic of the size of the largest element."""
    assert (got is None) == (want is None)
    if got is None:
        return
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=8 * torch.finfo(torch.float32).eps * size)


def both_rules(x, w, b, D, *, need=(True, True, True), cotangents=(True, True, True), eps=1e-5, dy=None):
    """Kernel and eager rule, forward then backward, the latter from float64 of the same values; compares all of it."""
    out = file.forward(x, w, b, D, eps)
    exact = RULE.forward(*double((x, w, b)), D, eps)
    for got, want, dtype in zip(out, exact, (x.dtype, torch.float32, torch.float32)):
        near(got, want, dtype)
    _, m, r = out
    dy = normal(*x.shape, dtype=x.dtype, device=x.device, seed=1) if dy is None else dy
    dm, dr = (normal(*m.shape, device=x.device, seed=k) for k in (2, 3))
    cots = [c if given else None for c, given in zip((dy, dm, dr), cotangents)]
    need = RULE.Need(*need)
    before = [t.clone() for t in (x, dy, m, r)]
    got = file.backward(*cots, x, w, b, m, r, D, need)
    want = RULE.backward(*double((*cots, x, w, b, m, r)), D, need)
    for g, e, wanted, like in zip(got, want, need, (x, w, b)):
        if wanted and not (cots[0] is None and e is None):
            near(g, e, like.dtype)
    for t, old in zip((x, dy, m, r), before):
        assert torch.equal(t, old), "an input has been written to"


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kernel])
def test_same_two_rules(name):
    """A kernel's rules take what the eager rules take, under the same names."""
    for rule in OPS[name].rules:
        if rule.kernel:
            for ours, theirs in ((rule.kernel().forward, rule.forward), (rule.kernel().backward, rule.backward)):
                assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
            assert callable(rule.kernel().unsupported) and rule.kernel().specs(32)


# Rows and columns: either side of a tile, one and several tiles to a program (there are three programs in the interpreter).
SIZES = [
    *product((1, 31, 32, 33, 97, 200), (33, 64)),
    *product((1, 2, 7, 9), (1000, 1024, 1025)),
    *product((1, 5), (31, 32, file.LONGEST)),
    *product((3, 2049, 6200), (1,)),
]


@pytest.mark.parametrize("M, N", SIZES)
def test_sizes(device, filled, M, N):
    both_rules(normal(M, N, device=device), normal(N, device=device, seed=4), normal(N, device=device, seed=5), 1)


@each_dtype
@pytest.mark.parametrize("parameters", ["same", "float32", "none"])
@pytest.mark.parametrize("M, N", [(33, 65), (5, 1024)])
def test_dtypes(device, filled, dtype, parameters, M, N):
    """Without parameters too: beside float32 ones a half tensor that is not upcast on loading would be so by promotion."""
    w, b = (normal(N, dtype=DTYPES.get(parameters, dtype), device=device, seed=k) for k in (4, 5))
    w, b = (None, None) if parameters == "none" else (w, b)
    both_rules(normal(M, N, dtype=dtype, device=device) + 2, w, b, 1, need=(True, w is not None, b is not None))


@pytest.mark.parametrize("lead, shape", [((), (5,)), ((2, 3), (4, 5)), ((7,), (1, 3, 1)), ((), (2, 3))], ids=str)
def test_dimensions(device, filled, lead, shape):
    x, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((*lead, *shape), shape, shape)))
    both_rules(x, w, b, len(shape), eps=0.1)


@pytest.mark.parametrize("w", [True, False], ids=["weight", "-"])
@pytest.mark.parametrize("b", [True, False], ids=["bias", "-"])
@pytest.mark.parametrize(
    "need", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)], ids=str
)
@pytest.mark.parametrize("cotangents", [(True, False, False), (True, True, True), (False, True, False), (False, False, True)])
def test_what_is_given_and_needed(device, filled, w, b, need, cotangents):
    need = (need[0], need[1] and w, need[2] and b)
    if any(need):
        x = normal(37, 65, device=device)
        both_rules(
            x,
            normal(65, device=device, seed=4) if w else None,
            normal(65, device=device, seed=5) if b else None,
            1,
            need=need,
            cotangents=cotangents,
        )


LAYOUTS = {
    "columns two apart": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "rows three apart": lambda t: t.repeat_interleave(3, 0)[::3],
    "transposed": lambda t: t.t().contiguous().t(),
    "one row for all": lambda t: t[:1].expand_as(t),
    "one element for all": lambda t: t[:1, :1].expand_as(t),
    "off by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
}


@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(device, filled, of_x, of_dy):
    """Strides are arguments: nothing is read as if it were dense. (A row of one value has r = 1/√eps: eps is large here.)"""
    x, dy = LAYOUTS[of_x](normal(35, 20, device=device)), LAYOUTS[of_dy](normal(35, 20, device=device, seed=1))
    w, b = normal(40, 2, device=device, seed=2).t()[:, ::2]
    both_rules(x, w, b, 1, dy=dy, eps=0.5)


def test_layout_that_is_no_matrix(device, filled):
    x = normal(4, 3, 6, 5, device=device).transpose(0, 3)
    both_rules(x, normal(6, 4, device=device).t().contiguous().t(), normal(6, 4, device=device), 2, dy=x.cos())


@pytest.mark.parametrize("shape, D", [((0, 4), 1), ((3, 0), 1), ((0, 0), 1), ((2, 0, 3), 2), ((0, 2, 3), 2)], ids=str)
def test_zero_sizes(device, filled, shape, D):
    x, w, b = (normal(*s, device=device) for s in (shape, shape[-D:], shape[-D:]))
    y, m, r = file.forward(x, w, b, D, 1e-5)
    assert y.shape == x.shape and m.shape == r.shape == (*shape[:-D], *(1,) * D)
    dx, dw, db = file.backward(y, None, None, x, w, b, m, r, D, RULE.Need(True, True, True))
    assert dx.shape == x.shape and dw.shape == db.shape == w.shape and not dw.any() and not db.any()


def test_large_mean(device, filled):
    """The variance is that of x − mean, not the mean of squares less the square of the mean, which would be off by a tenth."""
    x = normal(7, 300, device=device) + 1000
    y, m, r = file.forward(x, None, None, 1, 1e-5)
    dx = file.backward(x.cos(), None, None, x, None, None, m, r, 1, RULE.Need(True, False, False))[0]
    x2 = x.double().requires_grad_()
    y2 = F.layer_norm(x2, (300,))
    for got, want in ((y, y2), (dx, torch.autograd.grad(y2, x2, x.cos().double())[0])):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * 1000 * torch.finfo(torch.float32).eps)


def test_one_row_of_nan(device):
    """It stays in its row, though other rows share its tile."""
    x = normal(6, 20, device=device)
    x[2, 3] = torch.nan
    y, m, r = file.forward(x, None, None, 1, 1e-5)
    dx, _, _ = file.backward(x.cos(), None, None, x, None, None, m, r, 1, RULE.Need(True, False, False))
    for t in (y, dx):
        assert t.isnan().all(1).tolist() == t.isnan().any(1).tolist() == [k == 2 for k in range(6)]


def test_the_same_bits_every_time(device):
    x, w, b, dy = (normal(*s, device=device, seed=k) for k, s in enumerate(((300, 33), (33,), (33,), (300, 33))))
    out = file.forward(x, w, b, 1, 1e-5)
    runs = [file.backward(dy, None, None, x, w, b, *out[1:], 1, RULE.Need(True, True, True)) for _ in range(2)]
    assert all(map(torch.equal, *runs)) and all(map(torch.equal, out, file.forward(x, w, b, 1, 1e-5)))


@each_dtype
def test_the_public_function(device, dtype):
    """First order by the kernel, second order by the eager rule and the kernel's own backward; float64 truth."""
    shape, tensors = (5,), [normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(((3, 4, 5), (5,), (5,)))]
    dy, weights = normal(3, 4, 5, dtype=dtype, device=device, seed=9), normal(3, 4, 5, device=device, seed=8)

    def run(fn, tensors):
        x, w, b = leaves = [t.detach().requires_grad_() for t in tensors]
        y = fn(x, shape, w, b)
        first = torch.autograd.grad(y, leaves, dy.to(y.dtype), retain_graph=True)
        (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype), create_graph=True)
        second = torch.autograd.grad((dx.to(weights.dtype).sin() * weights).sum().to(y.dtype), leaves[:2])
        return [y.detach(), *first, *second]

    got = run(lambda *a: bp.functional.layer_norm(*a, backend="triton"), tensors)
    want = run(F.layer_norm, double(tensors))
    tolerance = 20 * torch.finfo(dtype).eps
    for g, e in zip(got, want):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_gradients_batched_by_the_older_vmap(device):
    x = normal(4, 5, device=device).requires_grad_()
    batch = normal(3, 4, 5, device=device, seed=1)
    (got,) = torch.autograd.grad(bp.functional.layer_norm(x, (5,), backend="triton"), x, batch, is_grads_batched=True)
    want = [torch.autograd.grad(F.layer_norm(x, (5,)), x, dy)[0] for dy in batch]
    torch.testing.assert_close(got, torch.stack(want))


def test_module(device):
    """The module's `backend`, several dimensions, no bias."""
    ours, theirs = (cls((3, 4), bias=False, device=device) for cls in (bp.nn.LayerNorm, torch.nn.LayerNorm))
    ours.backend = "triton"
    x, y = (normal(5, 3, 4, device=device).requires_grad_() for _ in range(2))
    for m, t in ((ours, x), (theirs, y)):
        m(t).sin().sum().backward()
    torch.testing.assert_close((x.grad, ours.weight.grad), (y.grad, theirs.weight.grad))


@pytest.mark.parametrize("given", [True, False])
def test_opcheck(device, given):
    """Schema, fake kernels and tracing of the operators, static and dynamic."""
    x, m, r = normal(3, 2, 5, device=device), normal(3, 2, 1, device=device), normal(3, 2, 1, device=device)
    w = normal(5, device=device) if given else None
    need = [True, given, True]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(file.FORWARD, (x, w, w, 1, 1e-5), test_utils=tests)
    opcheck(file.BACKWARD, (x, m if given else None, r, x, w, m, r, 1, need), test_utils=tests)
    opcheck(file.BACKWARD, (None, m, None, x.transpose(0, 1), w, m, r, 1, need), test_utils=tests)


def test_tensors_that_require_grad_do_not_leak_a_graph(device):
    x = normal(3, 5, device=device).requires_grad_()
    y = file.FORWARD(x, None, None, 1, 1e-5)[0]
    assert y.grad_fn is None or "NotImplemented" in y.grad_fn.name() or "WarnNotImplemented" in y.grad_fn.name()


def test_what_the_kernel_cannot_take(device):
    """By name it raises and says why; "auto" runs the eager rule."""
    f = bp.functional.layer_norm
    wide = normal(2, file.LONGEST + 1, device=device)
    fine = normal(2, 3, device=device)

    class Own(torch.Tensor):
        pass

    for reason, x in (
        ("computes in float32, not float64", fine.double()),
        (f"a row of {file.LONGEST + 1} elements is too long", wide),
        ("takes plain tensors, not Own", fine.as_subclass(Own)),
    ):
        with pytest.raises(ValueError, match=f"layer_norm: backend='triton' cannot run here: .*{reason}"):
            f(x, x.shape[1:], backend="triton")
        torch.testing.assert_close(f(x, x.shape[1:]), F.layer_norm(x, x.shape[1:]))


def test_without_triton(device, monkeypatch):
    monkeypatch.setattr(kernels, "INSTALLED", False)
    x = normal(2, 3, device=device)
    torch.testing.assert_close(bp.functional.layer_norm(x, (3,)), F.layer_norm(x, (3,)))
    with pytest.raises(ValueError, match="layer_norm: backend='triton' cannot run here: Triton is not installed"):
        bp.functional.layer_norm(x, (3,), backend="triton")


def test_outside_interpret():
    """On the CPU there are no kernels; a backward that is called after interpret() has ended says what is wrong."""
    x = normal(2, 3).requires_grad_()
    with interpret():
        y = bp.functional.layer_norm(x, (3,), backend="triton")
    with pytest.raises(RuntimeError, match=r"only inside bptoolkit.triton_kernels.interpret\(\), its backward too"):
        y.sum().backward()
    with pytest.raises(ValueError, match="the fused kernel needs every tensor on the GPU"):
        bp.functional.layer_norm(x, (3,), backend="triton")


def test_interpret_leaves_nothing_behind(monkeypatch):
    """Neither after an error in a kernel: every function of Triton's is the compiled one again, and compiles."""
    import triton
    from triton.runtime.jit import JITFunction

    def compiled():
        return [type(f) for f in (triton.language.sum, file.forward_kernel, file.backward_kernel)] == [JITFunction] * 3

    with interpret():
        with interpret():
            file.forward(normal(2, 3), None, None, 1, 1e-5)
        assert kernels.INTERPRETING and compiled() and not triton.knobs.runtime.interpret
        monkeypatch.setattr(file, "tile", lambda N, warp: (1, 3, 4))  # not a power of two
        with pytest.raises(triton.runtime.errors.InterpreterError, match="power of 2"):
            file.forward(normal(2, 3), None, None, 1, 1e-5)
    assert not kernels.INTERPRETING and compiled() and not triton.knobs.runtime.interpret
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    target = aot.TARGETS["sm_80"]
    spec = file.specs(target.warp)[0]
    assert not aot.problems(spec, target, aot.compile_for(spec, target))


# ---- ahead of time

PARTS = [(part, spec) for part, target in aot.TARGETS.items() for m in aot.modules() for spec in m.specs(target.warp)]


@pytest.mark.parametrize("part, spec", PARTS, ids=[f"{part} {spec.label}" for part, spec in PARTS])
def test_ahead_of_time(part, spec):
    """Compiles; no register spills, shared memory within the part's, loads of 16 bytes, a matrix instruction for a dot."""
    target = aot.TARGETS[part]
    assert not aot.problems(spec, target, aot.compile_for(spec, target))


@pytest.mark.parametrize("part", aot.TARGETS)
def test_the_gate_sees_faults(part):
    """A tile that is too large for its registers, addresses of which nothing is known, too little shared memory, no dot."""
    target = aot.TARGETS[part]
    spec = next(s for s in file.specs(target.warp) if s.kernel is file.backward_kernel)
    good = aot.compile_for(spec, target)
    large = spec._replace(constants={**spec.constants, "BM": 1, "BN": 32768}, warps=4)
    assert "spill" in str(aot.problems(large, target, aot.compile_for(large, target)))
    assert "16 bytes" in str(aot.problems(spec, target, aot.compile_for(spec._replace(aligned=()), target)))
    assert "shared memory" in str(aot.problems(spec, target._replace(shared=good.shared - 1), good))
    assert "tensor-core" in str(aot.problems(spec._replace(dot=True), target, good))
