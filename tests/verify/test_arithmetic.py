"""The dispatch mode behind the error model: what it leaves alone, and what it notices."""

import pytest
import torch
import torch.nn.functional as F
from judging import DTYPES, blocked_linear, drawn, pulled, rms_norm, verdicts

from bptoolkit.verify.tolerance import compare, noise


def test_the_mode_survives_and_leaves_the_generator_alone():
    @torch.library.custom_op("bptoolkit_test_tolerance::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, dy):
            return dy * 3 * ctx.saved_tensors[0] ** 2

    def run(tensors):
        x = tensors[0].clone().requires_grad_()
        index = tensors[1]
        y = Cube.apply(x[index]).view(-1).sgn() + twice(x.detach()).sum()
        y = y.clone().add_(1).mul_(x.sum()).sort().values
        y[0] = 3.0
        mean, var = torch.var_mean(x, -1)
        y = F.dropout(y, 0.5) + mean + var + torch.rand(()) + torch._foreach_mul([x.sum(), x.prod()], 2.0)[0]
        a, b = torch.cat([x, x]).chunk(2)
        y = y + torch.nn.functional.layer_norm(a, a.shape).sum() + torch.cummax(b, 0).values.sum() + (x > 0).sum()
        return [y.detach(), None, *torch.autograd.grad(y.sum(), x)]

    inputs = [torch.randn(7), torch.tensor([0, 2, 4, 4])]
    before = torch.get_rng_state()
    first, second = noise(run, inputs, torch.float32, seed=3), noise(run, inputs, torch.float32, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert first[1] is None
    for a, b in zip(first, second):
        if a is not None:
            assert torch.equal(a.exact, b.exact) and torch.equal(a.sigma, b.sigma) and not a.exact.requires_grad
            assert a.exact.dtype is a.sigma.dtype is torch.float64
    other = noise(run, inputs, torch.float32, seed=4)
    assert not torch.equal(first[0].sigma, other[0].sigma)
    assert inputs[0].dtype is torch.float32 and not inputs[0].requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_function_without_float64_stands_in_for_its_reference(dtype):
    work = torch.float32 if dtype is torch.float64 else dtype
    for seed in range(5):
        tensors = drawn(F.linear, [(17, 33), (9, 33), (9,)], work, seed)
        scales = noise(pulled(F.linear, 3), tensors, work, work=work, seed=seed)
        assert [compare(k, s, work) for k, s in zip(pulled(blocked_linear, 3)(tensors), scales)] == [None] * 4
        assert compare(pulled(blocked_linear, 3)(tensors)[2] * 1.3, scales[2], work) is not None


def test_a_cast_inside_the_reference_widens_sigma():
    """A reference that computes in float32 whatever it gets is no more exact than that."""
    tensors = drawn(rms_norm, [(5, 17), (17,)], torch.float64, 0)
    found = verdicts(lambda x, w: rms_norm(x.float(), w.float()).double(), rms_norm, tensors, torch.float64)
    assert found == [None] * 3, [str(v) for v in found]
