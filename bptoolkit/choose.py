"""Which rules run for a call: one pure function from what is known of the call to (rule, reason)."""

from __future__ import annotations

from typing import NamedTuple

BACKENDS = ("auto", "eager", "triton")


class State(NamedTuple):
    """All that decides which rules run."""

    backend: str  # what the caller asked for: one of BACKENDS
    phase: str  # "forward" or "backward"
    kernel: bool  # the op has a fused kernel
    on_device: bool  # every tensor is where the kernel can run
    transforms: bool  # a functorch transform (vmap, grad, jvp) or forward-mode AD is active
    grad_mode: bool  # backward runs with grad mode on (create_graph=True)
    unsupported: str | None  # why the kernel cannot take these tensors, or None
    on_request: str | None = None  # why "auto" leaves to the eager rule what the kernel can take, or None


class Choice(NamedTuple):
    """The rules that run, and why."""

    rule: str  # "eager" or "triton"
    reason: str


def choose(state: State, op: str = "") -> Choice:
    """Choose the rules for a call. `op` is named in the errors.

    "auto" may fall back to the eager rule, and does where the kernel runs on request only; "eager" and "triton" by name run or
    raise with the reason. A backward with grad mode on is always eager: it is the rule that can be differentiated again. (Where
    a kernel has another that can be, its `again`, that takes the place of the eager one.)

    Raises:
        ValueError: the backend is not known, or was asked for by name and cannot run.
    """
    if state.backend not in BACKENDS:
        raise ValueError(f"{op}: backend={state.backend!r} is not known; choose from {', '.join(map(repr, BACKENDS))}")
    if state.backend == "eager":
        return Choice("eager", "asked for by name")
    if state.phase == "backward" and state.kernel and (state.grad_mode or state.transforms):
        return Choice("eager", "backward is itself being differentiated or batched: the eager rule can be")
    if not state.kernel:
        obstacle = "there is no fused kernel for it"
    elif not state.on_device:
        obstacle = "the fused kernel needs every tensor on the GPU"
    elif state.transforms:
        obstacle = "a functorch transform or forward mode is active"
    elif state.unsupported is not None:
        obstacle = state.unsupported
    elif state.backend == "auto" and state.on_request is not None:
        obstacle = state.on_request
    else:
        return Choice("triton", "asked for by name" if state.backend == "triton" else "a fused kernel takes this call")
    if state.backend == "triton":
        raise ValueError(f"{op}: backend='triton' cannot run here: {obstacle}")
    return Choice("eager", obstacle)
