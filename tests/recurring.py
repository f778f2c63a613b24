"""What the tests of the recurrent kernels share: drawn calls, and each check, of a cell's rules along each path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fused import LAYOUTS, both_rules, double, near, normal, ragged
from torch import Tensor

from bptoolkit import OPS
from bptoolkit.triton_kernels import recurrent, recurrent_slices

ERRORS = 64  # roundings of float32: a step adds some to those of the steps before
WAYS = ("resident", "steps")  # that are chosen, and that every cell has
each_path = pytest.mark.parametrize("way", WAYS)


class Cell(NamedTuple):
    """A cell: its op, its rules, and the sizes of what they take."""

    name: str
    rules: tuple[Any, ...]
    gates: int
    states: int
    biases: int = 1
    rest: tuple[Any, ...] = ()  # inputs between the biases and the lengths
    options: tuple[Any, ...] = (0,)  # after reverse; the last is nobody, who is given no norms


def drawn(cell: Cell, device: str, T: int, B: int, I: int, H: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """x, the states, the weights and biases."""
    rows = cell.gates * H

    def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return (normal(*shape, device=device, seed=seed) * scale).to(dtype)

    states = [draw(B, H, seed=k, scale=0.5) for k in range(1, 1 + cell.states)]
    scale = max(H, 1) ** -0.5
    weights = [draw(rows, n, seed=k, scale=scale) for k, n in ((3, I), (4, H))]
    biases = [draw(rows, seed=k, scale=scale) for k in range(5, 5 + cell.biases)]
    return [draw(T, B, I, seed=0), *states, *weights, *biases, *cell.rest]


SIZES = [  # either side of a tile of rows and units; more tiles than programs; a width that no tile has
    (1, 1, 1, 1),
    (2, 15, 2, 15),
    (2, 16, 1, 16),
    (2, 17, 2, 17),
    (3, 2, 3, 33),
    (2, 50, 1, 3),
]


def check_sizes(cell: Cell, device: str, way: str, T: int, B: int, I: int, H: int) -> None:
    args = drawn(cell, device, T, B, I, H)
    with recurrent.forced(way):
        both_rules(cell.rules[0], *args, None, H % 2 == 0, *cell.options, errors=ERRORS)
        both_rules(cell.rules[-1], *args, ragged(device, T, B), H % 2 == 1, *cell.options, errors=ERRORS)


def check_ways(cell: Cell, device: str, way: str, reverse: bool) -> None:
    """Long enough for every kind of row, and without a bias."""
    args = drawn(cell, device, 4, 5, 3, 5)
    bare = [None if k in range(len(args) - cell.biases - len(cell.rest), len(args)) else t for k, t in enumerate(args)]
    with recurrent.forced(way):
        both_rules(cell.rules[0], *args, None, reverse, *cell.options, errors=ERRORS)
        for rule in cell.rules:
            both_rules(rule, *bare, ragged(device, 4, 5), reverse, *cell.options, errors=ERRORS)


def check_needs(cell: Cell, device: str, way: str, one: int) -> None:
    """One gradient alone, and all but it."""
    args, reverse = drawn(cell, device, 3, 3, 2, 5), one % 2 == 0
    alone, others = [k == one for k in range(len(args))], [isinstance(t, Tensor) and k != one for k, t in enumerate(args)]
    with recurrent.forced(way):
        for rule, need in ((cell.rules[0], alone), (cell.rules[-1], others)):
            both_rules(rule, *args, ragged(device, 3, 3), reverse, *cell.options, need=[*need, False], errors=ERRORS)


def check_layouts(cell: Cell, device: str, way: str, of_sequence: str, of_weight: str) -> None:
    """Strides of everything that is read."""
    args = drawn(cell, device, 3, 3, 3, 3)
    odd = [LAYOUTS[of_sequence](args[0])[:3]]
    odd += [t if t is None else LAYOUTS[of_weight](t)[: len(t)] if t.dim() == 2 else t.repeat(2)[::2] for t in args[1:]]
    dy = LAYOUTS[of_sequence](normal(3, 3, 3, device=device, seed=5))[:3]
    lengths = ragged(device, 3, 6)[::2]
    with recurrent.forced(way):
        both_rules(cell.rules[0], *odd, lengths, True, *cell.options, cotangents={"dy": dy}, errors=ERRORS)
        both_rules(cell.rules[-1], *odd, None, False, *cell.options, cotangents={"dy": dy.transpose(0, 1)}, errors=ERRORS)


def check_no_rows(cell: Cell, device: str, way: str) -> None:
    for T, B, I, H in ((2, 0, 3, 2), (2, 3, 0, 2)):
        for lengths in (None, ragged(device, T, B)):
            with recurrent.forced(way):
                for rule in cell.rules:
                    both_rules(rule, *drawn(cell, device, T, B, I, H), lengths, True, *cell.options, errors=ERRORS)


def check_past_a_length(cell: Cell, device: str, way: str, reverse: bool) -> None:
    """What is there is not read."""
    args, lengths = drawn(cell, device, 4, 4, 2, 3), torch.tensor([2, 0, 4, 1], device=device)
    past = torch.arange(4, device=device)[:, None] >= lengths
    args[0][past] = torch.nan
    dy = normal(4, 4, 3, device=device, seed=5)
    dy[past] = torch.nan
    with recurrent.forced(way):
        for rule in cell.rules:
            cots = {"d" + o: dy for o in rule.outputs if o in ("y", "c")}
            out, grads = both_rules(rule, *args, lengths, reverse, *cell.options, cotangents=cots, errors=ERRORS)
            assert all(o.isfinite().all() for o in out) and all(g is None or g.isfinite().all() for g in grads)


def check_rows_apart(cell: Cell, device: str, way: str) -> None:
    """NaN and infinities in one row reach no other."""
    args = drawn(cell, device, 4, 5, 2, 3)
    args[0][1, 1, 0], args[0][2, 2, 1], args[1][3, 1] = torch.nan, torch.inf, torch.nan
    with recurrent.forced(way):
        for k, rule in enumerate(cell.rules):
            out, (dx, *_) = both_rules(rule, *args, None, k == 1, *cell.options, errors=ERRORS)
            assert out[0][:, [0, 4]].isfinite().all() and dx[:, [0, 4]].isfinite().all()


def check_dtypes(cell: Cell, device: str, way: str, dtype: torch.dtype, reverse: bool) -> None:
    """In float32 the float64 value rounded; in half no further from it than the eager rule's."""
    args, lengths = drawn(cell, device, 3, 17, 3, 17, dtype), ragged(device, 3, 17)
    with recurrent.forced(way):
        for rule in cell.rules:
            if dtype == torch.float32:
                both_rules(rule, *args, lengths, reverse, *cell.options, errors=ERRORS)
            else:
                no_worse(rule, *args, lengths, reverse, *cell.options)


def no_worse(rule: Any, *args: Any) -> None:
    """Outputs and gradients are of the eager rule's dtypes; their errors are at most its and a quarter, or half a rounding."""
    kernel, exact, x = rule.kernel(), double(args), args[0]
    share = 3 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1.25  # the interpreter cuts bfloat16 off
    found = []
    for forward, backward, given in (
        (kernel.forward, kernel.backward, args),
        (rule.forward, rule.backward, args),
        (rule.forward, rule.backward, exact),
    ):
        out = forward(*given)
        out = out if isinstance(out, tuple) else (out,)
        cots = [normal(*o.shape, seed=7 + k, dtype=torch.float16, device=str(o.device)).to(o.dtype) for k, o in enumerate(out)]
        cots = [c if letter in ("y", "c") else None for c, letter in zip(cots, rule.outputs)]
        letters = dict(zip((*rule.inputs, *rule.outputs), (*given[: len(rule.inputs)], *out)))
        need = rule.Need(*(isinstance(t, Tensor) and t.is_floating_point() for t in given[: len(rule.inputs)]))
        pool = (*cots, *(letters[s] for s in rule.saved), *given[len(rule.inputs) :], need)
        found.append((*out, *backward(*rule.arrange(pool))))
    for k, (got, eager, want) in enumerate(zip(*found)):
        assert (got is None) == (eager is None) == (want is None)
        if got is not None and got.numel():
            assert got.dtype == eager.dtype and got.shape == eager.shape
            error, theirs = (float((t.double() - want).norm() / want.norm()) for t in (got, eager))
            assert error <= share * theirs + 0.5 * torch.finfo(got.dtype).eps, (rule.name, k, error, theirs)


def check_paths_agree(cell: Cell, device: str, args: Callable[[], list[Any]]) -> None:
    """Along either path, the same to within rounding."""
    for rule in cell.rules:
        found = []
        for way in WAYS:
            with recurrent.forced(way):
                out = rule.kernel().forward(*args())
                found.append(out if isinstance(out, tuple) else (out,))
        for a, b in zip(*found):
            near(a, b.double(), a.dtype, ERRORS)


def check_second_order(cell: Cell, device: str, save: str, **kwargs: Any) -> None:
    """Through the fused cell twice, beside the plain loop in float64: a penalty on its gradients."""
    op = OPS[cell.name]
    T, B, I, H, D = 4, 3, 2, 3, 2
    sizes = [(cell.gates * H, I), (cell.gates * H, H), (cell.gates * H,), (cell.gates * H,)] * D
    weights = [normal(*s, seed=k) * 0.5 for k, s in enumerate(sizes)]
    hx = [normal(D, B, H, seed=20 + k) for k in range(cell.states)]
    lengths = torch.tensor([4, 0, 2], device=device)

    def run(fn: Callable[..., Any], dtype: torch.dtype, **more: Any) -> list[Tensor]:
        leaves = [t.to(device, dtype).requires_grad_() for t in (normal(T, B, I), *hx, *weights)]
        x, states, ws = leaves[0], leaves[1 : 1 + cell.states], leaves[1 + cell.states :]
        first = tuple(states) if cell.states > 1 else states[0]
        y, last = fn(x, first, ws, bidirectional=True, lengths=lengths, **kwargs, **more)
        last = last if isinstance(last, tuple) else (last,)
        loss = (y * y).sum() + sum((s.sin()).sum() for s in last)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        penalty = sum((g * g).sum() for g in grads)
        return [*(g.detach() for g in grads), *torch.autograd.grad(penalty, leaves)]

    got = run(op.call, torch.float32, save=save, backend="triton")
    for g, w in zip(got, run(op.reference, torch.float64), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4 * float(w.abs().max()))


SLICES = [("slices", 1, 1), ("slices", 17, 17), ("slices", 3, 33), ("persistent", 17, 16), ("persistent", 3, 5)]


def check_slices(cell: Cell, device: str, monkeypatch: pytest.MonkeyPatch, way: str, B: int, H: int) -> None:
    """In tiles so small that there are several of each kind.

    One program after the other, as the interpreter has them, can wait for none: a single slice of each row there.
    """
    needs_a_watch(device, way)
    monkeypatch.setattr(recurrent_slices, "sliced", lambda *_: recurrent.Sliced(16, 16, 16, 4))
    T, args = 3, drawn(cell, device, 3, B, 2, H)
    with recurrent.forced(way):
        for k, rule in enumerate(cell.rules):
            lengths = ragged(device, T, B) if (k + B + H) % 2 or len(cell.rules) == 1 else None
            both_rules(rule, *args, lengths, (B + k) % 2 == 1, *cell.options, errors=ERRORS)


def check_slices_in_half(cell: Cell, device: str, way: str, dtype: torch.dtype) -> None:
    needs_a_watch(device, way)
    args, lengths = drawn(cell, device, 3, 5, 2, 16, dtype), ragged(device, 3, 5)
    with recurrent.forced(way):
        for rule in cell.rules:
            no_worse(rule, *args, lengths, dtype == torch.float16, *cell.options)


SAVES = ("gates", "outputs", "segments")


def check_gradient_norms(cell: Cell, device: str, monkeypatch: pytest.MonkeyPatch, way: str, save: str, **kwargs: Any) -> None:
    """Of both directions, as the eager rule in float64 has them; what is past a row's length is not read."""
    needs_a_watch(device, way)
    monkeypatch.setattr(recurrent_slices, "sliced", lambda *_: recurrent.Sliced(16, 16, 16, 4))
    op, T, B, I, H, D = OPS[cell.name], 6, 4, 3, 5, 2
    sizes = [(cell.gates * H, I), (cell.gates * H, H), (cell.gates * H,), (cell.gates * H,)] * D
    weights = [normal(*s, seed=k) for k, s in enumerate(sizes)]
    hx = [normal(D, B, H, seed=20 + k) for k in range(cell.states)]
    lengths, x, dy = torch.tensor([6, 0, 2, 5], device=device), normal(T, B, I, seed=30), normal(T, B, D * H, seed=31)
    past = torch.arange(T)[:, None] >= lengths.cpu()
    x[past], dy[past] = torch.nan, torch.nan

    def run(dtype: torch.dtype, **more: Any) -> Tensor:
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, *hx, *weights)]
        first = tuple(leaves[1 : 1 + cell.states]) if cell.states > 1 else leaves[1]
        seen: dict[int, Tensor] = {}
        y, last = op.call(
            leaves[0], first, leaves[1 + cell.states :], bidirectional=True, lengths=lengths, save=save,
            grad_norms=seen.__setitem__, **kwargs, **more,
        )  # fmt: skip
        last = last if isinstance(last, tuple) else (last,)
        torch.autograd.grad((y, *last), leaves, (dy.to(y), *(s.detach().sin() for s in last)))
        return torch.stack([seen[k] for k in range(D)])

    with recurrent.forced(way):
        got = run(torch.float32, backend="triton")
    torch.testing.assert_close(got, run(torch.float64), rtol=1e-4, atol=1e-6)


# --- all steps in one launch, by programs that wait for each other ----------------------------------------------------------


def needs_a_watch(device: str, way: str) -> None:
    if device == "cuda" and way == "persistent":
        pytest.skip("programs that wait for each other are run in a process of their own: check_persistent_on_cuda")


WATCHED = """
import sys
import torch
from bptoolkit import OPS
from bptoolkit.triton_kernels import recurrent

name, gates = sys.argv[1], int(sys.argv[2])
for H, B, dtype in ((1024, 64, torch.bfloat16), (1016, 70, torch.bfloat16), (256, 300, torch.float16), (120, 5, torch.float32)):
    torch.manual_seed(0)
    weights = [torch.randn(gates * H, n) * H**-0.5 for n in (64, H)] + [torch.randn(gates * H) * 0.1] * 2
    leaves = [t.to("cuda", dtype).requires_grad_() for t in (torch.randn(50, B, 64), *weights)]
    lengths = torch.arange(B, device="cuda") % 51
    for save in ("gates", "outputs"):
        found = []
        for way in ("steps", "slices", "persistent", "persistent"):
            with recurrent.forced(way):
                y, last = OPS[name].call(leaves[0], None, leaves[1:], lengths=lengths, save=save, backend="triton")
                last = last if isinstance(last, tuple) else (last,)
                loss = (y * y).sum() + last[-1].sum()
                found.append((y, *last, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(found[2], found[3]):
            assert torch.equal(a, b), "another run gives other bits"
        for way in found[1:]:
            for got, want in zip(way, found[0]):
                error = float((got - want).float().norm() / want.float().norm())
                assert error < (1e-4 if dtype == torch.float32 else 3e-2), (H, B, dtype, save, error)
print("all arrived")
"""


def check_persistent_on_cuda(cell: Cell) -> None:
    """In a process of its own: a program that waits for ever is a failure, not a wait."""
    if not torch.cuda.is_available():
        pytest.skip("needs programs that run at a time, on a GPU")
    command = [sys.executable, "-c", WATCHED, cell.name, str(cell.gates)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "all arrived" in done.stdout, done.stdout + done.stderr
