"""A dense block that keeps one tensor: all features, side by side.

Maths     S₀ = x        Sₗ₊₁ = (Sₗ, yₗ) along channels        yₗ = conv₃(relu(norm(conv₁(relu(norm(Sₗ))))))
          Without a bottleneck conv₁ and the second norm are left out.
          Backward, from the last layer to the first, with D = dS at first and layer l's C channels in front:
            dyₗ = D[C:]        (du, dw, dγ, dβ)ₗ = the layer's vector-Jacobian product at Sₗ = S[:C]        D = D[:C] + du
          and dx is what is left of D. In a layer, from its end:
            conv    da = the transposed convolution of dy by w        dw = the correlation of a with dy
            relu    dn = da [a > 0]
            norm    û = (u − m) r        dβ = Σ dn        dγ = Σ dn û
                    training    du = r γ (dn − mean(dn) − û mean(dn û))        evaluation  du = r γ dn
Letters   x (N, C₀, *I); S (N, C₀ + L k, *I), the output; k the growth, L layers; g, b, w all γ, all β and all weights of the
          convolutions, flat and one after another; m, v the mean and variance of what each norm sees, r = 1/√(v + eps)
Numerics  layer by layer in torch, the concatenations keep O(L²) feature maps, and norms and relus as many again. Here S is
          written in place, once, and is all that is kept: a layer's norm, relu and bottleneck are computed again from the front
          of S. Half tensors are normalized in float32.
Source    Huang et al. 2017, "Densely Connected Convolutional Networks"; Pleiss et al. 2017, "Memory-Efficient Implementation of
          DenseNets", arXiv 1707.06990, §3
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bptoolkit.function import Rule, unwatched
from bptoolkit.ops import batch_norm, channel_norm, conv
from bptoolkit.ops.activation import relu_backward
from bptoolkit.ops.batch_norm import BatchNorm2d
from bptoolkit.ops.conv import Conv2d
from bptoolkit.precision import wide


class Layer(NamedTuple):
    """One layer's share of the flat tensors: of each norm, and of each convolution with its padding."""

    channels: int  # C, of the features before it
    norms: list[tuple[Any, ...]]  # g b m v; m and v None in training, before they are measured
    weights: list[Tensor]
    paddings: tuple[int, ...]


def layers_of(C: int, k: int, L: int, B: int, g: Any, b: Any, w: Any, m: Any, v: Any) -> Iterator[Layer]:
    """The layers, first to last; what is None stays None. B is the bottleneck's width, 0 for none."""
    at, out = 0, 0
    for c in range(C, C + L * k, k):
        widths, shapes = (c, B)[: 1 + bool(B)], ([(B, c, 1, 1)] if B else []) + [(k, B or c, 3, 3)]
        norms, weights = [], []
        for n in widths:
            norms.append(tuple(t if t is None else t.narrow(0, at, n) for t in (g, b, m, v)))
            at += n
        for shape in shapes:
            size = shape[0] * shape[1] * shape[2] * shape[3]
            weights.append(w.narrow(0, out, size).view(shape))
            out += size
        yield Layer(c, norms, weights, (0, 1)[-len(shapes) :])


def activated(u: Tensor, g: Tensor, b: Tensor, m: Any, v: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """relu(norm(u)), of u's dtype; m and r. Where m and v are None they are u's."""
    x, g, b = wide(u), wide(g), wide(b)
    if unwatched(u, g, b, m, v):
        if not x.numel():
            return u.clone(), x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])  # such that all derivatives are 0
        mean, var = (None, None) if m is None else (wide(m), wide(v))
        n, m, r = batch_norm.normalized(x, g, b, mean, var, m is None, 0.0, eps)
        return n.relu_().to(u.dtype), m, r
    if m is None:
        v, m = torch.var_mean(x, (0, 2, 3), correction=0)  # C
    m, r = wide(m), (wide(v) + eps).rsqrt()
    n = (x - per_channel(m)) * per_channel(r * g) + per_channel(b)
    return torch.relu(n).to(u.dtype), m, r


def per_channel(t: Tensor) -> Tensor:
    return t[:, None, None]


class Kept(NamedTuple):
    """What backward needs of one norm, relu and convolution."""

    u: Tensor  # what the norm sees
    a: Tensor  # what the convolution sees
    m: Tensor
    r: Tensor


def run(u: Tensor, layer: Layer, eps: float) -> list[Kept]:
    """A layer, step by step, without its last convolution."""
    kept: list[Kept] = []
    for k, (g, b, m, v) in enumerate(layer.norms):
        if k:
            u = convolved(kept[-1].a, layer.weights[k - 1], layer.paddings[k - 1])
        kept.append(Kept(u, *activated(u, g, b, m, v, eps)))
    return kept


def convolved(a: Tensor, w: Tensor, p: int) -> Tensor:
    return conv.forward(a, w, None, (1, 1), (p, p), (1, 1), (0, 0), 1)


def forward(x, g, b, w, mean, var, k, L, B, eps):
    C, alone = x.shape[1], unwatched(x, g, b, w, mean, var)
    if alone:
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        size = (x.shape[0], C + L * k, *x.shape[2:])
        s = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)  # N C+Lk I
        s[:, :C] = x
    else:
        s = x.clone()
    means, variances = [], []
    for layer in layers_of(C, k, L, B, g, b, w, mean, var):
        c = layer.channels
        kept = run(s[:, :c], layer, eps)
        y = convolved(kept[-1].a, layer.weights[-1], layer.paddings[-1])
        means += [t.m for t in kept]
        variances += [(t.r**-2 - eps).clamp(min=0) for t in kept]
        if alone:
            s[:, c : c + k] = y
        else:
            s = torch.cat((s, y), 1)
    return s, torch.cat(means), torch.cat(variances)


def backward(ds, s, g, b, w, mean, var, k, L, B, eps, need):
    if ds is None:
        return (None,) * 6
    d, dg, db, dw = ds, [], [], []
    norm, product = batch_norm.RULE.Need(True, need.g, need.b, False, False), conv.RULE.Need(True, need.w, False)
    for layer in reversed(list(layers_of(s.shape[1] - L * k, k, L, B, g, b, w, mean, var))):
        c = layer.channels
        dy, d = d[:, c:], d[:, :c]
        steps = zip(run(s[:, :c], layer, eps), layer.norms, layer.weights, layer.paddings)
        for (u, a, m, r), (gamma, beta, *_), weight, p in reversed(list(steps)):
            da, dweight, _ = conv.backward(dy, a, weight, (1, 1), (p, p), (1, 1), (0, 0), 1, product)
            dn = relu_backward(da, a)
            dy, dgamma, dbeta = channel_norm.backward(
                dn, None, None, u, gamma, beta, m, r, channel_norm.Batch(u), mean is not None, norm
            )
            dg.append(dgamma)
            db.append(dbeta)
            dw.append(dweight)
        d = d + dy

    def flat(grads):
        return torch.cat([t.reshape(-1) for t in reversed(grads)])

    return (
        d if need.x else None,
        flat(dg) if need.g else None,
        flat(db) if need.b else None,
        flat(dw) if need.w else None,
        None,
        None,
    )


RULE = Rule("dense_block", forward, backward, inputs="x g b w mean var", outputs="s m v", constants="m v")


def dense_block(
    x: Tensor,
    norms: list[tuple[Tensor, Tensor]],
    weights: list[Tensor],
    growth: int,
    bottleneck: int = 0,
    running: list[tuple[Tensor, Tensor]] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The input and the outputs of all layers along channels, each layer seeing all before it.

    Args:
        x: (N, C, H, W).
        norms: (weight, bias) of each normalization, in the order in which they run.
        weights: of the convolutions, likewise: (k, C + l k, 3, 3), or (B, C + l k, 1, 1) and (k, B, 3, 3).
        growth: k.
        bottleneck: B; 0 for none.
        running: (mean, variance) for each normalization; None measures them on x.
        eps: added to the variances.

    Returns:
        (N, C + L k, H, W), and (mean, variance) of each normalization, without a derivative.
    """
    x, *weights = conv.CONV2D.cast(x, *weights)
    g, b = (torch.cat([n[k] for n in norms]) for k in range(2))
    w = torch.cat([t.flatten() for t in weights])
    mean, var = (None if running is None else torch.cat([r[k] for r in running]) for k in range(2))
    L = len(weights) // (2 if bottleneck else 1)
    s, m, v = RULE(x, g, b, w, mean, var, growth, L, bottleneck, eps)
    sizes = [len(n[0]) for n in norms]
    return s, list(zip(m.split(sizes), v.split(sizes)))


class DenseLayer(nn.Module):
    """The parameters of one layer, under torchvision's names; `DenseBlock` runs it."""

    def __init__(self, channels: int, growth: int, bottleneck: int, eps: float, momentum: float, **where: Any) -> None:
        super().__init__()
        self.norm1 = BatchNorm2d(channels, eps, momentum, **where)
        if bottleneck:
            self.conv1 = Conv2d(channels, bottleneck, 1, bias=False, **where)
            self.norm2 = BatchNorm2d(bottleneck, eps, momentum, **where)
            self.conv2 = Conv2d(bottleneck, growth, 3, padding=1, bias=False, **where)
        else:
            self.conv1 = Conv2d(channels, growth, 3, padding=1, bias=False, **where)


class DenseBlock(nn.Module):
    """A dense block whose memory grows with its output: norms, relus and concatenations are computed again in backward.

    Layers are named as in torchvision's densenet (`denselayer1.norm1` ...), whose state_dicts load.

    Args:
        channels: C, of the input.
        growth: k, the channels that each layer adds.
        layers: L.
        bottleneck: the width of the 1 × 1 convolution, in units of k; 0 leaves it out.
        eps, momentum: of the batch normalizations.
        device, dtype: of the parameters.

    Shape:
        (N, C, H, W) -> (N, C + L k, H, W).

    Raises:
        ValueError: a size is less than 1, the input has another shape, or in training a channel has one element only.
    """

    def __init__(
        self,
        channels: int,
        growth: int,
        layers: int,
        bottleneck: int = 4,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if min(channels, growth, layers) < 1 or bottleneck < 0:
            sizes = f"channels={channels}, growth={growth}, layers={layers}, bottleneck={bottleneck}"
            raise ValueError(f"DenseBlock: {sizes}; they must be 1 or more, and the bottleneck 0 or more")
        self.channels, self.growth, self.bottleneck, self.eps, self.momentum = channels, growth, bottleneck, eps, momentum
        for l in range(layers):
            width = bottleneck * growth
            layer = DenseLayer(channels + l * growth, growth, width, eps, momentum, device=device, dtype=dtype)
            self.add_module(f"denselayer{l + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels or 0 in x.shape[2:]:
            shape = f"(N, {self.channels}, H, W), H and W at least 1"
            raise ValueError(f"DenseBlock: input has shape {tuple(x.shape)}; it needs {shape}")
        M = x.shape[0] * x.shape[2] * x.shape[3]
        if self.training and M == 1:
            raise ValueError(f"DenseBlock: input {tuple(x.shape)} has one element in a channel; training needs more")
        norms: list[Any] = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        convs: list[Any] = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        running = None if self.training else [(n.running_mean, n.running_var) for n in norms]
        parameters = [(n.weight, n.bias) for n in norms], [c.weight for c in convs]
        s, measured = dense_block(x, *parameters, self.growth, self.bottleneck * self.growth, running, self.eps)
        if self.training and M:
            with torch.no_grad():
                for n, (m, v) in zip(norms, measured):
                    n.num_batches_tracked.add_(1)
                    share = self.momentum
                    n.running_mean.lerp_(m.to(n.running_mean.dtype), share)
                    n.running_var.lerp_((v * (M / (M - 1))).to(n.running_var.dtype), share)
        return s

    def extra_repr(self) -> str:
        return f"channels={self.channels}, growth={self.growth}, bottleneck={self.bottleneck}"
