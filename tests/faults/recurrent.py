"""Faults and twins of recurrent layers, backpropagated through time by hand: a tanh RNN and an LSTM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin

RNN = "x: T B I, w: H I, u: H H -> T B H"
LSTM = "x: T B I, w: 4 H I, u: 4 H H -> T B H"
HALF = (torch.float16, torch.bfloat16)
Grads = tuple[Tensor | None, ...]


def up(t: Tensor) -> Tensor:
    """In the precision of the computation."""
    return t.float() if t.dtype in HALF else t


def plain_rnn(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """h_t = tanh(w x_t + u h_{t-1})."""
    h, out = x.new_zeros(x.shape[1], len(w)), []
    for t in range(len(x)):
        h = torch.tanh(x[t] @ w.t() + h @ u.t())
        out.append(h)
    return torch.stack(out) if out else (x @ w.t())


def before(h: Tensor) -> Tensor:
    """h_{t-1} at every t."""
    return torch.cat((torch.zeros_like(h[:1]), h[:-1]))


def tanh_slope(h: Tensor, z: Tensor) -> Tensor:
    """From the output."""
    return 1 - h * h


def rnn(
    slope: Callable[[Tensor, Tensor], Tensor] = tanh_slope,
    previous: Callable[[Tensor], Tensor] = before,
    carried: Callable[[int], bool] = lambda t: True,
    steps: Callable[[int], range] = range,
) -> Callable[..., Tensor]:
    """A tanh RNN. In autocast all is computed in float32."""

    class Rnn(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx: Any, x: Tensor, w: Tensor, u: Tensor) -> Tensor:
            z = up(x) @ up(w).t()
            h, out = z.new_zeros(z.shape[1:]), torch.empty_like(z)
            for t in range(len(z)):
                z[t] += h @ up(u).t()
                h = out[t] = torch.tanh(z[t])
            ctx.save_for_backward(x, w, u, out, z)
            return out.to(x.dtype, copy=True)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Grads:
            x, w, u, h, z = ctx.saved_tensors
            dtype, needs = x.dtype, ctx.needs_input_grad
            x, w, u, dy = up(x), up(w), up(u), up(dy.to(dtype))
            dz, d, carry = torch.zeros_like(h), slope(h, z), torch.zeros_like(h[:1].sum(0))
            for t in reversed(steps(len(h))):
                dz[t] = (dy[t] + carry) * d[t]
                carry = dz[t] @ u if carried(t) else torch.zeros_like(carry)
            return (
                (dz @ w).to(dtype) if needs[0] else None,
                (dz.flatten(0, 1).t() @ x.flatten(0, 1)).to(dtype) if needs[1] else None,
                (dz.flatten(0, 1).t() @ previous(h).flatten(0, 1)).to(dtype) if needs[2] else None,
            )

    return Rnn.apply


def plain_lstm(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Gates i, f, g, o; no bias."""
    h, out = x.new_zeros(x.shape[1], w.shape[1]), []
    c = h
    for t in range(len(x)):
        i, f, g, o = x[t] @ w.mT + h @ u.mT
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out) if out else x @ w[0].t()


def lstm(
    forget: float = 1.0,
    cell_carried: Callable[[int], bool] = lambda t: True,
    hidden_carried: Callable[[int], bool] = lambda t: True,
    previous: Callable[[Tensor], Tensor] = before,
) -> Callable[..., Tensor]:
    """An LSTM without bias; the gates are the first dimension of the weights."""

    class Lstm(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            zx = torch.einsum("tbi,khi->tkbh", up(x), up(w)).to(up(x).dtype)
            h = zx.new_zeros(zx.shape[2:])
            c, out, cells, gates = h, zx.new_empty(zx[:, 0].shape), zx.new_empty(zx[:, 0].shape), torch.empty_like(zx)
            for t in range(len(zx)):
                z = zx[t] + h @ up(u).mT
                gates[t] = z.sigmoid()
                gates[t, 2] = z[2].tanh()
                i, f, g, o = gates[t]
                c = cells[t] = f * c + i * g
                h = out[t] = o * c.tanh()
            return out.to(x.dtype, copy=True), out, cells, gates

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*inputs, *output[1:])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Grads:
            x, w, u, h, c, gates = ctx.saved_tensors
            dtype = x.dtype
            x, w, u, dy = up(x), up(w), up(u), up(dy.to(dtype))
            dz, c_before = torch.zeros_like(gates), before(c)
            dh = dc = torch.zeros_like(h[:1].sum(0))
            zero = dh
            for t in reversed(range(len(h))):
                i, f, g, o = gates[t]
                tanh_c = c[t].tanh()
                dh = dy[t] + dh
                dc = dc + dh * o * (1 - tanh_c * tanh_c)
                dz[t, 0] = dc * g * i * (1 - i)
                dz[t, 1] = dc * c_before[t] * f * (1 - f) * forget
                dz[t, 2] = dc * i * (1 - g * g)
                dz[t, 3] = dh * tanh_c * o * (1 - o)
                dh = (dz[t] @ u.to(dz.dtype)).sum(0) if hidden_carried(t) else zero
                dc = dc * f if cell_carried(t) else zero
            return (
                torch.einsum("tkbh,khi->tbi", dz, w).to(dtype),
                torch.einsum("tkbh,tbi->khi", dz, x).to(dtype),
                torch.einsum("tkbh,tbj->khj", dz, previous(h)).to(dtype),
            )

    return lambda x, w, u: Lstm.apply(x, w, u)[0]


def fault(name: str, fn: Any, *caught: str, kind: str = "value") -> Fault:
    """A fault of the layer that its name starts with."""
    inputs, plain = (RNN, plain_rnn) if name.startswith("rnn") else (LSTM, plain_lstm)
    return Fault(name=name, family="recurrent", kind=kind, inputs=inputs, fn=fn, reference=plain, caught_by=caught)


FAULTS = [
    fault("rnn: truncated at every 16 steps", rnn(carried=lambda t: t % 16 > 0), "sizes", kind="shape"),
    fault("rnn: slope of the step before", rnn(slope=lambda h, z: 1 - before(h) ** 2), "gradient_value"),
    fault("rnn: last step dropped", rnn(steps=lambda n: range(n - 1)), "gradient_value"),
    fault("rnn: du from h_t", rnn(previous=lambda h: h), "gradient_value"),
    fault("rnn: slope from what went into tanh", rnn(slope=lambda h, z: 1 - z * z), "gradient_value"),
    fault("lstm: gradient of the forget gate missing", lstm(forget=0.0), "gradient_value", "sizes"),
    fault("lstm: cell state detached", lstm(cell_carried=lambda t: False), "gradient_value", "sizes"),
    fault("lstm: hidden state truncated at every 8 steps", lstm(hidden_carried=lambda t: t % 8 > 0), "sizes", kind="shape"),
]
TWINS = [
    Twin(name="rnn", family="recurrent", inputs=RNN, fn=rnn(), reference=plain_rnn),
    Twin(name="lstm", family="recurrent", inputs=LSTM, fn=lstm(), reference=plain_lstm),
]
