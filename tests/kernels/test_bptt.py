"""lstm, gru and rnn with the kernels, whatever is kept and however it is truncated, beside the eager rules."""

from __future__ import annotations

import pytest
import torch
from fused import normal

import bptoolkit as bp
from bptoolkit.bench import saved_bytes
from bptoolkit.triton_kernels import gru, lstm, rnn

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
FILES = {"lstm": lstm, "gru": gru, "rnn": rnn}
each = pytest.mark.parametrize("name", GATES)
WAYS = [
    *({"save": save} for save in ("sparse", "segments", 3000)),
    *({"save": save, "truncate": t} for save in ("outputs", "segments") for t in (3, (2, 3))),
]


def arguments(name, device, T=9, B=3, I=2, H=5, D=1, dtype=torch.float32):
    n, states = GATES[name] * H, 2 if name == "lstm" else 1
    shapes = [(T, B, I), *[(D, B, H)] * states, *[(n, I), (n, H), (n,), (n,)] * D]
    return [normal(*s, dtype=dtype, device=device, seed=k) / (1 + (k > states)) for k, s in enumerate(shapes)]


def run(name, args, backend, **options):
    """Outputs, last states and all gradients."""
    args = [t.detach().requires_grad_() for t in args]
    x, *rest = args
    hx, weights = (tuple(rest[:2]), rest[2:]) if name == "lstm" else (rest[0], rest[1:])
    y, last = bp.OPS[name].call(x, hx, weights, backend=backend, **options)
    out = [y, *(last if name == "lstm" else [last])]
    dys = [normal(*t.shape, device=str(t.device), seed=20 + k).to(t.dtype) for k, t in enumerate(out)]
    return [*out, *torch.autograd.grad(out, args, dys)]


def compare(name, args, **options):
    got = run(name, args, "triton", **options)
    want = run(name, [t.double() for t in args], "eager", **options)
    for g, w, again in zip(got, want, run(name, args, "triton", **options)):
        assert torch.equal(g, again)
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)
    return got


@pytest.fixture
def launched(monkeypatch):
    """The length of each launch's sequence."""
    lengths = []
    for file in FILES.values():
        real = file.FORWARD

        def counted(pre, *args, real=real):
            lengths.append(len(pre))
            return real(pre, *args)

        monkeypatch.setattr(file, "FORWARD", counted)
    return lengths


@each
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_as_the_eager_rules(device, name, options, ragged, launched):
    compare(name, arguments(name, device), **options, **({"lengths": torch.tensor([9, 0, 5])} if ragged else {}))
    assert launched


@each
def test_two_directions(device, name):
    compare(name, arguments(name, device, D=2), save="segments", bidirectional=True, lengths=torch.tensor([4, 9, 1]))


def test_a_segment_is_a_launch(device, launched):
    """Forward each of them, backward each of them again."""
    run("lstm", arguments("lstm", device, T=12), "triton", save="segments")
    segments = launched[: len(launched) // 2]
    assert len(segments) > 2 and sum(segments) == 12 and sorted(launched[len(segments) :]) == sorted(segments)


@each
def test_what_is_kept(device, name):
    """As much as by the eager rules."""
    args = [t.requires_grad_() for t in arguments(name, device)]
    hx, weights = (tuple(args[1:3]), args[3:]) if name == "lstm" else (args[1], args[2:])
    kept = [
        saved_bytes(lambda b=backend: bp.OPS[name].call(args[0], hx, weights, save="segments", backend=b)[0])
        for backend in ("triton", "eager")
    ]
    assert kept[0] == kept[1] > 0


@each
def test_second_order(device, name):
    """By the eager rule, in segments."""

    def second(backend, dtype):
        args = [t.to(dtype).requires_grad_() for t in arguments(name, device, T=5)]
        hx, weights = (tuple(args[1:3]), args[3:]) if name == "lstm" else (args[1], args[2:])
        y, _ = bp.OPS[name].call(args[0], hx, weights, save="segments", backend=backend)
        first = torch.autograd.grad(y.sin().sum(), args, create_graph=True)
        return [g.double() for g in torch.autograd.grad(sum(g.square().sum() for g in first), args)]

    torch.testing.assert_close(second("triton", torch.float32), second("eager", torch.float64), rtol=1e-4, atol=1e-4)


def test_what_the_kernels_cannot_take(device):
    args = arguments("lstm", device)
    for options, match in (
        ({"truncate": "eprop"}, "no e-prop, no ARTBP"),
        ({"truncate": bp.ARTBP(0.5)}, "no e-prop, no ARTBP"),
    ):
        with pytest.raises(ValueError, match=f"lstm: backend='triton' cannot run here: .*{match}"):
            run("lstm", args, "triton", **options)
    with pytest.raises(ValueError, match="float32, not float64"):
        run("lstm", [t.double() for t in args], "triton", save="segments")


def test_compiled(device):
    """One graph, and no loop over the segments in backward's."""
    torch._dynamo.reset()
    args = arguments("lstm", device, T=4)

    def f(x, h, c, *weights):
        return bp.functional.lstm(x, (h, c), list(weights), save="segments", backend="triton")[0]

    found = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        given = [t.detach().requires_grad_() for t in args]
        y = g(*given)
        found.append((y, *torch.autograd.grad(y.sin().sum(), given)))
    torch.testing.assert_close(*found)
