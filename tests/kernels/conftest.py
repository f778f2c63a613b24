"""Where the fused kernels run in these tests, and what they find where they write."""

import sys
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bptoolkit.triton_kernels import aot, interpret

DEVICES = ["interpreter"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    """The CPU inside the interpreter; where there is a GPU, that too."""
    with interpret() if request.param == "interpreter" else nullcontext():
        yield "cpu" if request.param == "interpreter" else "cuda"


class _Torch:
    """`torch`, but what it allocates is full of NaN, or of a large number."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, **kw):
        shape = args[0] if isinstance(args[0], (tuple, list, torch.Size)) else args
        return self._fill(torch.empty(shape, **kw))

    def empty_like(self, *args, **kw):
        return self._fill(torch.empty_like(*args, **kw))

    @staticmethod
    def _fill(t):
        if t.dtype == torch.bool:
            return t.fill_(True)
        return t.fill_(torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)


@pytest.fixture(autouse=True)
def filled(monkeypatch):
    """What the kernels' modules allocate is full of NaN, so that an element that is not written shows."""
    aot.modules()
    for name, module in list(sys.modules.items()):
        if (
            name.startswith("bptoolkit.triton_kernels.")
            and getattr(module, "torch", None) is torch
            and hasattr(module, "specs")
        ):
            monkeypatch.setattr(module, "torch", _Torch())
