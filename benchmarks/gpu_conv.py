"""The stage of `make gpu` that holds convolutions to the rate of a matrix product: the vendor's, and our kernels on request.

Layers of ResNet-50 in bfloat16, channels last. A row has one pass of one layer: y, dx or dw. The product of two large matrices,
the vendor's convolution and ours take turns in one loop, so that all three see the same clocks; a rate is operations counted
over milliseconds measured, and a share is a rate over the product's of the same row. The vendor's library searches for its
fastest algorithm first (`torch.backends.cudnn.benchmark`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gpu_timing as timing
import torch
from gpu_common import in_processes, running
from torch import Tensor

BATCH = 128
PRODUCT = 8192  # rows and columns of the matrices
PASSES = ("forward", "input", "weight")
WORST = 2e-2  # how far ours may be from the vendor's, of the largest element: both round to 8 bits
WARM_UP = "import sys, gpu_conv; gpu_conv.warm_up(sys.argv[1])"


class Layer(NamedTuple):
    """Channels in and out, image, kernel, stride; the padding is half the kernel."""

    C: int
    O: int
    X: int
    K: int
    stride: int = 1

    def label(self) -> str:
        return f"{self.K}×{self.K} {self.C}→{self.O}, {self.X}×{self.X}{f', stride {self.stride}' if self.stride > 1 else ''}"


LAYERS = (
    Layer(64, 64, 56, 3),
    Layer(128, 128, 28, 3),
    Layer(256, 256, 14, 3),
    Layer(512, 512, 7, 3),
    Layer(128, 128, 56, 3, 2),
    Layer(256, 64, 56, 1),
    Layer(64, 256, 56, 1),
    Layer(1024, 256, 14, 1),
    Layer(512, 1024, 28, 1, 2),
    Layer(3, 64, 224, 7, 2),
)


class Call(NamedTuple):
    """Tensors of a layer, and the rules' options."""

    x: Tensor
    w: Tensor
    dy: Tensor
    stride: list[int]
    padding: list[int]

    def flops(self) -> int:
        """Multiplications and additions, as torch's counter has them: for y, and as many for dx and for dw."""
        return 2 * self.dy.numel() * self.w[0].numel()


def drawn(layer: Layer, device: str, toy: bool) -> Call:
    """Random tensors; in a rehearsal small ones."""
    C, O, X, K, s = layer
    N, C, O, X = (2, min(C, 3), min(O, 4), 6) if toy else (BATCH, C, O, X)
    last = torch.channels_last
    x = torch.randn(N, C, X, X, device=device).to(torch.bfloat16).to(memory_format=last)
    w = (torch.randn(O, C, K, K, device=device) * (C * K * K) ** -0.5).to(torch.bfloat16).to(memory_format=last)
    y = torch.nn.functional.conv2d(x, w, None, s, K // 2)
    return Call(x, w, torch.randn(y.shape, device=device).to(y.dtype).to(memory_format=last), [s, s], [K // 2, K // 2])


def vendor(call: Call, which: str) -> Callable[[], Tensor]:
    x, w, dy, stride, padding = call
    one, none = [1, 1], [0, 0]
    if which == "forward":
        return lambda: torch.ops.aten.convolution(x, w, None, stride, padding, one, False, none, 1)
    mask = [which == "input", which == "weight", False]
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(dy, x, w, None, stride, padding, one, False, none, 1, mask)[int(which == "weight")]


def ours(call: Call, which: str) -> Callable[[], Tensor]:
    from bptoolkit.ops.conv import DENSE
    from bptoolkit.triton_kernels.conv_dense import KERNEL

    x, w, dy, stride, padding = call
    K, X = w.shape[2], x.shape[2]
    tail = [(X + 2 * p - K) % s for s, p in zip(stride, padding)]
    options = (stride, padding, [1, 1], tail, 1)
    if which == "forward":
        return lambda: KERNEL.forward(x, w, None, *options)
    need = DENSE.Need(which == "input", which == "weight", False)
    return lambda: KERNEL.backward(dy, x, w, *options, need)[int(which == "weight")]


def passes(layer: Layer) -> tuple[str, ...]:
    """A network's first layer has no use for dx."""
    return PASSES if layer.C > 3 else ("forward", "weight")


def convolution(run: Any) -> None:
    """Each pass of each layer: the vendor's and ours, as shares of a matrix product's rate."""
    if run.names is not None and "conv2d" not in run.names:
        return
    rows = {f"{layer.label()} | {which}": (layer, which) for layer in LAYERS for which in passes(layer)}
    for _ in run.todo("convolution", ["caches"]):
        labels = [layer.label() for layer in LAYERS]
        done = [True] if run.rehearse else in_processes(WARM_UP, labels, run.left())
        run.ledger.add("convolution", "caches", "ok", layers=sum(done))
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        for name in run.todo("convolution", [*rows][:: 8 if run.rehearse else 1]):
            try:
                figures = row(*rows[name], run)
                run.ledger.add("convolution", name, figures.pop("status"), **figures)
            except Exception as error:
                run.ledger.add("convolution", name, "failed", error=f"{type(error).__name__}: {error}"[:600])
    finally:
        torch.backends.cudnn.benchmark = before


def row(layer: Layer, which: str, run: Any) -> dict[str, Any]:
    """The figures of one pass of one layer."""
    call, n = drawn(layer, run.device, run.rehearse), 64 if run.rehearse else PRODUCT
    a, b = (torch.randn(n, n, device=run.device).to(torch.bfloat16) for _ in range(2))
    theirs, mine = vendor(call, which), ours(call, which)
    want, got = theirs(), mine()
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    same = torch.equal(got, mine())
    product, of_vendor, of_ours = timing.medians([lambda: a @ b, theirs, mine], run.device, 0.02 if run.rehearse else 0.2)
    rate, flops = 2 * n**3 / product / 1e9, call.flops()
    wrong = [] if same else ["another run gave other bits"]
    wrong += [] if error <= WORST else ["far from the vendor's"]
    figures: dict[str, Any] = {"status": "failed", "error": "; ".join(wrong)} if wrong else {"status": "ok"}
    figures |= {"gflop": flops / 1e9, "product_tflops": rate, "difference": error}
    for who, ms in (("vendor", of_vendor), ("ours", of_ours)):
        figures |= {f"{who}_ms": ms, f"{who}_tflops": flops / ms / 1e9, f"{who}_of_product": flops / ms / 1e9 / rate}
    return figures


def warm_up(label: str) -> None:
    """One run of each pass of a layer, which compiles our kernels into Triton's cache on disk."""
    with running("cuda"):
        layer = next(layer for layer in LAYERS if layer.label() == label)
        call = drawn(layer, "cuda", False)
        for which in passes(layer):
            ours(call, which)()
