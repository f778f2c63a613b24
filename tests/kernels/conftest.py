"""Where the fused kernels run in these tests, and what they find where they write."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import LONG

pytest.importorskip("triton", reason="Triton is not installed")

from bptoolkit.triton_kernels import aot, interpret

FOLDER = Path(__file__).parent
WHOLE = ("test_gate.py", "test_contract.py", "test_verified.py", "test_running.py")  # a loop over the kernels each
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
        if name.startswith("bptoolkit.triton_kernels.") and getattr(module, "torch", None) is torch:
            monkeypatch.setattr(module, "torch", _Torch())


MOST = 6  # instances of one test function in the interpreter, which takes milliseconds a program; `make kernels` runs them all


def pytest_collection_modifyitems(config, items):
    """Of each test function's instances in the interpreter, keep MOST that lie evenly over its list of parameters."""
    if LONG or torch.cuda.is_available():
        return
    here = [item for item in items if Path(item.fspath).parent == FOLDER and Path(item.fspath).name not in WHOLE]
    by_function = {}
    for item in here:
        by_function.setdefault((str(item.fspath), item.originalname), []).append(item)
    left_out = set()
    for instances in by_function.values():
        n = len(instances)
        kept = {k * (n - 1) // (MOST - 1) for k in range(MOST)} if n > MOST else set(range(n))
        left_out |= {item for k, item in enumerate(instances) if k not in kept}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
