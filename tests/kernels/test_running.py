"""Where kernels run and where they do not: inside interpret(), outside it, after an error, without Triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused import normal

import bptoolkit as bp
from bptoolkit import kernels
from bptoolkit.triton_kernels import aot, interpret, norm_operators, norms
from bptoolkit.triton_kernels import layer_norm as file


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
        return [type(f) for f in (triton.language.sum, norms.forward_kernel, norms.backward_kernel)] == [JITFunction] * 3

    with interpret():
        with interpret():
            file.KERNEL.forward(normal(2, 3), None, None, 1, 1e-5)
        assert kernels.INTERPRETING and compiled() and not triton.knobs.runtime.interpret
        monkeypatch.setattr(norm_operators, "tile", lambda N, warp: (1, 3, 4))  # not a power of two
        with pytest.raises(triton.runtime.errors.InterpreterError, match="power of 2"):
            file.KERNEL.forward(normal(2, 3), None, None, 1, 1e-5)
    assert not kernels.INTERPRETING and compiled() and not triton.knobs.runtime.interpret
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    target = aot.TARGETS["sm_80"]
    spec = file.specs(target.warp)[0]
    assert not aot.problems(spec, target, aot.compile_for(spec, target))


def test_out_of_memory_leaves_no_state_behind(monkeypatch):
    """Whichever allocation of batch_norm's forward fails, the running statistics stay; with memory it then runs."""
    from bptoolkit.triton_kernels import batch_norm

    x, running, plain = normal(6, 3, 5), (torch.zeros(3), torch.ones(3)), batch_norm.torch

    class Scarce:
        left = 0

        def __getattr__(self, name):
            return getattr(plain, name)

        def empty(self, *args, **kw):
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("no memory is left")
            return plain.empty(*args, **kw)

    scarce = Scarce()
    monkeypatch.setattr(batch_norm, "torch", scarce)
    failures = 0
    while True:
        scarce.left = failures
        try:
            with interpret():
                y = bp.functional.batch_norm(x, *running, training=True, backend="triton")
            break
        except torch.OutOfMemoryError:
            failures += 1
        assert not kernels.INTERPRETING and torch.equal(running[0], torch.zeros(3)) and torch.equal(running[1], torch.ones(3))
    assert failures >= 5  # y, m, r and the new statistics at least
    mean, var = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(y, F.batch_norm(x, mean, var, training=True))
    torch.testing.assert_close(running, (mean, var))
