"""The walk with an operator of the user's, beside the recursion in plain torch."""

from __future__ import annotations

import pytest
import torch
from fused import DTYPES, LAYOUTS, each_dtype, normal

import bptoolkit as bp

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

# --- operators, in torch and for the kernel -------------------------------------------------------------------------------


def affine(f, g):
    return g[0] * f[0], g[0] * f[1] + g[1]


def affine_vjp(d, f, g):
    return (d[0] * g[0], d[1] * g[0]), (d[0] * f[0] + d[1] * f[1], d[1])


def log_add(f, g):
    """log(exp f + exp g), of one tensor."""
    return torch.logaddexp(f, g)


def log_add_vjp(d, f, g):
    return d * (f - g).sigmoid(), d * (g - f).sigmoid()


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def log_add_fused(f, g):
    return g + softplus(f - g)


@triton.jit
def log_add_vjp_fused(d, f, g):
    return d * tl.sigmoid(f - g), d * tl.sigmoid(g - f)


def moments(f, g):
    """Welford's: count, mean, sum of squares, of two sets of numbers."""
    n = f[0] + g[0]
    delta = g[1] - f[1]
    return n, f[1] + delta * g[0] / n, f[2] + g[2] + delta * delta * f[0] * g[0] / n


def moments_vjp(d, f, g):
    n = f[0] + g[0]
    delta, a, b = g[1] - f[1], f[0] / n, g[0] / n
    ddelta = d[1] * b + d[2] * 2 * delta * f[0] * b
    db = d[1] * delta + d[2] * delta * delta * f[0]  # of b, at fixed f[0]
    dn = d[0] - db * b / n
    return (dn + d[2] * delta * delta * b, d[1] - ddelta, d[2]), (dn + db / n, ddelta, d[2] + 0 * a)


AFFINE, LOG_ADD = (triton.jit(affine), triton.jit(affine_vjp)), (log_add_fused, log_add_vjp_fused)
MOMENTS = triton.jit(moments), triton.jit(moments_vjp)
OPERATORS = {
    "affine": (affine, affine_vjp, lambda: AFFINE, 2),
    "log_add": (log_add, log_add_vjp, lambda: LOG_ADD, 1),
    "moments": (moments, moments_vjp, lambda: MOMENTS, 3),
}
each = pytest.mark.parametrize("name", OPERATORS)


def drawn(name, *shape, dtype=torch.float32, device="cpu"):
    count = OPERATORS[name][3]
    xs = [normal(*shape, dtype=dtype, device=device, seed=k) for k in range(count)]
    if name == "affine":
        xs[0] = xs[0].tanh()
    if name == "moments":
        xs = [xs[0].abs() + 1, xs[1], xs[2].abs()]
    return xs


def run(name, xs, dim, backend, reverse=False, cotangents=None):
    """Results and gradients."""
    fn, vjp, kernel, count = OPERATORS[name]
    xs = [x.detach().requires_grad_() for x in xs]
    elements = xs[0] if count == 1 else tuple(xs)
    out = bp.associative_scan(fn, elements, dim, reverse=reverse, vjp=vjp, kernel=kernel, backend=backend)
    ys = [out] if count == 1 else list(out)
    dys = [normal(*y.shape, dtype=y.dtype, device=str(y.device), seed=9 + k) for k, y in enumerate(ys)]
    dys = dys if cotangents is None else cotangents(dys)
    return [*ys, *torch.autograd.grad(ys, xs, dys)]


def compare(name, xs, dim, reverse=False, cotangents=None, rtol=1e-5):
    got = run(name, xs, dim, "triton", reverse, cotangents)
    want = run(name, [x.double() for x in xs], dim, "eager", reverse, cotangents)
    for g, w, again in zip(got, want, run(name, xs, dim, "triton", reverse, cotangents)):
        assert g.dtype == xs[0].dtype and torch.equal(g, again)
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=rtol * float(w.detach().abs().max()))
    return got


# --- tests ----------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    "shape, dim", [((2, 3), 0), ((3, 2, 5), 1), ((13, 2), 0), ((14, 33), 0), ((2, 3, 130), 1), ((4, 6), -1)]
)
def test_sizes(device, name, shape, dim):
    compare(name, drawn(name, *shape, device=device), dim)


@each
def test_reverse(device, name):
    compare(name, drawn(name, 5, 3, device=device), 0, reverse=True)


@each
@each_dtype
def test_dtypes(device, name, dtype):
    """What is carried is float32: a result is rounded once. Backward reads the rounded results."""
    compare(name, drawn(name, 6, 4, dtype=dtype, device=device), 0, rtol=max(8 * torch.finfo(dtype).eps, 1e-5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    odd = LAYOUTS[layout]
    xs = [odd(x) for x in drawn("affine", 4, 3, 5, device=device)]
    for dim in range(3):
        dys = [odd(normal(4, 3, 5, device=device, seed=20 + k)) for k in range(2)]
        compare("affine", xs, dim, cotangents=lambda ys: [d.to(y.dtype) for d, y in zip(dys, ys)])  # noqa: B023


def test_no_elements(device):
    for shape, dim in (((3, 0), 0), ((0, 3), 1)):
        got = run("affine", drawn("affine", *shape, device=device), dim, "triton")
        assert all(t.shape == shape for t in got)


def test_an_output_without_a_gradient(device):
    fn, vjp, kernel, _ = OPERATORS["affine"]
    found = []
    for backend in ("triton", "eager"):
        xs = [x.requires_grad_() for x in drawn("affine", 5, 3, device=device)]
        y = bp.associative_scan(fn, tuple(xs), vjp=vjp, kernel=kernel, backend=backend)[1]
        found.append(torch.autograd.grad(y.sin().sum(), xs))
    torch.testing.assert_close(*found)


def test_as_the_linear_recurrence(device):
    a, b = drawn("affine", 9, 2, 3, device=device)
    _, h = run("affine", [a, b], 0, "triton")[:2]
    torch.testing.assert_close(h, bp.functional.linear_recurrence(a, b, backend="eager"))


def test_nan_and_infinity_stay_in_their_element(device):
    a, b = drawn("affine", 6, 4, device=device)
    a[2, 1], b[3, 2] = torch.nan, torch.inf
    got = run("affine", [a, b], 0, "triton")
    assert all(t[:, ::3].isfinite().all() for t in got) and got[1][2:, 1].isnan().all() and got[1][3:, 2].isinf().all()


def test_second_order_and_transforms(device):
    """By the recursion in plain torch."""
    fn, vjp, kernel, _ = OPERATORS["affine"]
    a, b = (x.double().float().requires_grad_() for x in drawn("affine", 5, 3, device=device))

    def second(backend):
        y = bp.associative_scan(fn, (a, b), vjp=vjp, kernel=kernel, backend=backend)[1]
        first = torch.autograd.grad(y.sin().sum(), (a, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))

    torch.testing.assert_close(second("auto"), second("eager"), rtol=1e-4, atol=1e-4)
    rows = torch.func.vmap(lambda a, b: bp.associative_scan(fn, (a, b), vjp=vjp, kernel=kernel)[1], in_dims=1, out_dims=1)
    torch.testing.assert_close(rows(a, b), run("affine", [a, b], 0, "eager")[1])


def test_compiled(device):
    fn, vjp, kernel, _ = OPERATORS["affine"]
    torch._dynamo.reset()
    a, b = (x.requires_grad_() for x in drawn("affine", 5, 3, device=device))

    def scan(a, b):
        return bp.associative_scan(fn, (a, b), vjp=vjp, kernel=kernel, backend="triton")[1]

    found = []
    for f in (scan, torch.compile(scan, fullgraph=True, backend="aot_eager")):
        y = f(a, b)
        found.append((y, *torch.autograd.grad(y.sin().sum(), (a, b))))
    torch.testing.assert_close(*found)


def test_what_the_kernel_cannot_take(device):
    fn, vjp, kernel, _ = OPERATORS["affine"]
    a, b = drawn("affine", 4, 3, device=device)

    def call(*elements, backend="triton", **options):
        options = {"vjp": vjp, "kernel": kernel} | options
        return bp.associative_scan(fn, elements, backend=backend, **options)

    for elements, options, match in (
        ((a.double(), b.double()), {}, "float32, not float64"),
        ((a[:, :1], b), {}, "all tensors must have one shape"),
        ((a, b), {"kernel": None}, "the operator has no fused form"),
        ((a, b), {"kernel": None, "vjp": None}, "there is no fused kernel"),
    ):
        with pytest.raises(ValueError, match=f"associative_scan: backend='triton' cannot run here: .*{match}"):
            call(*elements, **options)
    with pytest.raises(ValueError, match="associative_scan: backend='cuda' is not known"):
        call(a, b, backend="cuda")
    with pytest.raises(TypeError, match="kernel needs vjp"):
        call(a, b, vjp=None)
    with pytest.raises(TypeError, match=r"two triton\.jit functions"):
        call(a, b, kernel=lambda: (affine, affine_vjp))


def test_opcheck(device):
    """Torch's checks of the two operators."""
    from bptoolkit.triton_kernels.associative_scan import BACKWARD, FORWARD, key_of

    xs, key = drawn("affine", 4, 2, 3, device=device), key_of(OPERATORS["affine"][2])
    torch.library.opcheck(FORWARD, (xs, key))
    torch.library.opcheck(BACKWARD, (xs, xs, xs, key))
    assert DTYPES
