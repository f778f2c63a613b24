"""What `bptoolkit.verify` says of autograd functions by others: Liger-Kernel, entmax, sparsemax.

    python benchmarks/peers.py [NAME ...]     runs on those that can be imported and prints a table of the properties that fail

None of them is needed to use or to test bptoolkit: `pip install --no-deps --target DIR liger-kernel entmax sparsemax`, and DIR
on PYTHONPATH. Triton's kernels run in Triton's interpreter, on the CPU. docs/findings.md has what came of it, each confirmed by
a snippet without the verifier.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from importlib.metadata import version

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.nn.functional as F

import bptoolkit as bp

LOW = (torch.float32, torch.float16)  # what the interpreter computes as a GPU does


def interpreter() -> None:
    """Lets Triton's interpreter run kernels with Python floats as arguments, and with rsqrt and tanh of libdevice."""
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter as it

    convert = it._implicit_cvt

    def with_floats(arg):
        if isinstance(arg, float):
            return tl.tensor(it.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return convert(arg)

    def elementwise(f):
        def call(x, _semantic=None):
            data = f(x.handle.data).astype(x.handle.data.dtype)
            return tl.tensor(it.TensorHandle(data, x.handle.dtype), x.type)

        return call

    it._implicit_cvt = with_floats
    libdevice.rsqrt, libdevice.tanh = elementwise(lambda x: 1 / np.sqrt(x)), elementwise(np.tanh)


def kernel(module: str, name: str, *after, dtypes=LOW):
    """The `apply` of an autograd.Function, refusing dtypes that say nothing in the interpreter; `after` follows the tensors."""
    apply = getattr(import_module(module), name).apply

    def call(*args):
        if args[0].dtype not in dtypes:
            raise TypeError(f"{name} is not run in {args[0].dtype}")
        return apply(*args, *after)

    call.__qualname__ = name
    return call


def first(f):
    """The first output, the loss; the others are for logs."""

    def call(*args):
        out = f(*args)
        return out[0] if isinstance(out, tuple) else out

    call.__qualname__ = f.__qualname__
    return call


def in_range(f):
    """Refuses classes out of range, which the fused kernel does not: it reads and writes past the row."""

    def call(x, w, t):
        if t.numel() and int(t.max()) >= w.shape[0]:
            raise IndexError("target out of range")
        return f(x, w, t)

    call.__qualname__ = f.__qualname__
    return call


def sparsemax(x, dim=-1):
    """Plain torch: the projection on the simplex by sorting."""
    x = x.transpose(dim, -1)
    z = x.sort(-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    size = (1 + k * z > z.cumsum(-1)).sum(-1, keepdim=True)
    tau = (z.cumsum(-1).gather(-1, size - 1) - 1) / size
    return (x - tau).clamp(min=0).transpose(dim, -1)


def entmax15(x):
    """Plain torch: the support by bisection, then the threshold in closed form."""
    z = x / 2
    low, high = z.detach().amax(-1, keepdim=True) - 1, z.detach().amax(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        over = ((z.detach() - middle).clamp(min=0) ** 2).sum(-1, keepdim=True) >= 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    on = (z.detach() > low).to(z.dtype)
    n = on.sum(-1, keepdim=True)
    mean = (z * on).sum(-1, keepdim=True) / n
    tau = mean - ((1 - ((z - mean) ** 2 * on).sum(-1, keepdim=True)) / n).clamp(min=0).sqrt()
    return ((z - tau) * on) ** 2


def rms_norm(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w


def liger(target):
    """Name -> (function, inputs, reference)."""
    ops = "liger_kernel.ops."
    rows, pair = "x: B N -> B N", "a: B N, b: B N -> B N"
    p, q = torch.randn(5, 7).softmax(-1).requires_grad_(), torch.randn(5, 7).softmax(-1)
    ce = (None, -100, 0.0, 0.0, "mean", None, False, False, False)
    return {
        "softmax": (kernel(ops + "softmax", "LigerSoftmaxFunction"), rows, lambda x: torch.softmax(x, -1)),
        "swiglu": (kernel(ops + "swiglu", "LigerSiLUMulFunction"), pair, lambda a, b: F.silu(a) * b),
        "geglu": (kernel(ops + "geglu", "LigerGELUMulFunction"), pair, lambda a, b: F.gelu(a, approximate="tanh") * b),
        "relu_squared": (kernel(ops + "relu_squared", "LigerReLUSquaredFunction"), rows, lambda x: F.relu(x).square()),
        "rms_norm": (kernel(ops + "rms_norm", "LigerRMSNormFunction", 1e-6), "x: B N, w: N -> B N", rms_norm),
        "rms_norm in_place=False": (
            kernel(ops + "rms_norm", "LigerRMSNormFunction", 1e-6, 0.0, "llama", False),
            "x: B N, w: N -> B N",
            rms_norm,
        ),
        "layer_norm": (
            kernel(ops + "layer_norm", "LigerLayerNormFunction", 1e-6),
            "x: B N, w: N, b: N -> B N",
            lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-6),
        ),
        "group_norm": (
            kernel(ops + "group_norm", "LigerGroupNormFunction", 4, 2, 1e-6),
            "x: B 4 N, w: 4, b: 4 -> B 4 N",
            lambda x, w, b: F.group_norm(x, 2, w, b, 1e-6),
        ),
        "sparsemax": (kernel(ops + "sparsemax", "LigerSparsemaxFunction", -1), rows, sparsemax),
        "cross_entropy": (
            first(kernel(ops + "cross_entropy", "LigerCrossEntropyFunction", *ce)),
            (torch.randn(5, 7, requires_grad=True), target),
            F.cross_entropy,
        ),
        "fused_linear_cross_entropy": (
            first(in_range(kernel(ops + "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"))),
            (torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True), target),
            lambda x, w, t: F.cross_entropy(x @ w.T, t),
        ),
        "tvd": (
            kernel(ops + "tvd", "LigerTVDLossFunction"),
            (p, q),
            lambda x, y: (x - y).abs().sum() / 2 / x.shape[0],
        ),
        "embedding": (
            kernel(ops + "experimental.embedding", "LigerEmbeddingFunction"),
            (torch.randn(7, 3, requires_grad=True), target),
            lambda w, t: F.embedding(t, w),
        ),
    }


def pure(name, target):
    """Name -> (function, inputs, reference), of packages that are torch alone."""
    rows = "x: B N -> B N"
    if name == "entmax":
        from entmax import entmax15 as theirs
        from entmax import entmax15_loss, entmax_bisect, sparsemax_loss
        from entmax import sparsemax as sparse

        def loss(x, t):
            p = sparsemax(x)
            return (1 - p.square().sum(-1)) / 2 + ((p - F.one_hot(t, x.shape[-1])) * x).sum(-1)

        given = (torch.randn(5, 7, requires_grad=True), target)
        return {
            "sparsemax": (sparse, rows, sparsemax),
            "entmax15": (theirs, rows, entmax15),
            "entmax_bisect": (entmax_bisect, rows, entmax15),
            "sparsemax_loss": (sparsemax_loss, given, loss),
            "entmax15_loss": (entmax15_loss, given, None),
        }
    theirs = import_module("sparsemax").Sparsemax
    return {
        "Sparsemax": (lambda x: theirs(-1)(x), rows, sparsemax),
        "Sparsemax dim=0": (lambda x: theirs(0)(x), rows, lambda x: sparsemax(x, 0)),
        "Sparsemax 3-d": (lambda x: theirs(-1)(x), "x: A B N -> A B N", sparsemax),
    }


def main(names) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    target = torch.tensor([1, 0, 6, 3, 3])
    for package in ("liger_kernel", "entmax", "sparsemax"):
        try:
            import_module(package)
            if package == "liger_kernel":
                interpreter()
            cases = liger(target) if package == "liger_kernel" else pure(package, target)
        except ImportError as e:
            print(f"{package}: not here ({e})")
            continue
        for name, (fn, inputs, reference) in cases.items():
            if names and name not in names and package not in names:
                continue
            claims = {"kinks": "any"}
            report = bp.verify.check(fn, inputs, reference=reference, quick=True, budget=20, contract=claims)
            interpreted = package == "liger_kernel"  # the interpreter itself keeps the storage of its arguments in a cycle
            failures = [f for f in report.failures if not (interpreted and f.property == "memory")]
            found = "; ".join(f"{f.property}: {f.message}" for f in failures) or "ok"
            print(f"| {package} {version(package)} | {name} | {found} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
