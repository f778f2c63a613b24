"""A candidate held to a reference by the error model, for the tests of it."""

import torch

from bptoolkit.verify.tolerance import compare, noise

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)


def up(x):
    return x if x.dtype is torch.float64 else x.float()


def pulled(f, n):
    """[n inputs, cotangent] -> [output, gradients]."""

    def run(tensors):
        xs = [t.detach().clone().requires_grad_() for t in tensors[:n]]
        y = f(*xs)
        return [y.detach(), *torch.autograd.grad(y, xs, tensors[n].detach())]

    return run


def drawn(f, shapes, dtype, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    xs = [(scale * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for s in shapes]
    y = f(*(x.double() for x in xs))
    return [*xs, torch.randn(y.shape, generator=g, dtype=torch.float64).to(dtype)]


def verdicts(reference, candidate, tensors, dtype, seed=0, native=True):
    n = len(tensors) - 1
    scales = noise(pulled(reference, n), tensors, dtype, seed=seed)
    floor = pulled(reference, n)(tensors) if native and dtype is not torch.float64 else [None] * (n + 1)
    return [compare(k, s, dtype, f) for k, s, f in zip(pulled(candidate, n)(tensors), scales, floor)]


def rms_norm(x, w):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w


def blocked_linear(x, w, b):
    y = torch.zeros(x.shape[0], w.shape[0], dtype=up(x).dtype)
    for k in range(0, x.shape[1], 7):
        y = y + up(x)[:, k : k + 7] @ up(w)[:, k : k + 7].T
    return (y + up(b)).to(x.dtype)
