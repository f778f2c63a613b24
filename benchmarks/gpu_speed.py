"""The stages of `make gpu` that measure speed, memory and traffic, beside torch's own, torch.compile's and Liger's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from random import Random
from typing import Any

import gpu_timing as timing
import torch
from gpu_cases import CASES
from gpu_common import TOY, fused, in_processes, outcome, running
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bptoolkit import OPS
from bptoolkit.bench import saved_bytes
from bptoolkit.cases import Case, Draw

WARM_UP = "import sys, gpu_speed; gpu_speed.warm_up(sys.argv[1])"


def warm(run: Any) -> None:
    """Compile what the next stages run, many processes at a time, into the caches of Triton and Inductor on disk."""
    names = [name for name in fused(run) if name in CASES]
    for _ in run.todo("warm", ["caches"]):
        if run.rehearse:
            warm_up(names[0], run.device, TOY)
            run.ledger.add("warm", "caches", "ok", ops=1)
            continue

        done = in_processes(WARM_UP, names, run.left())
        late = [name for name, fine in zip(names, done) if not fine]
        run.ledger.add("warm", "caches", "ok", ops=sum(done), late=", ".join(late) or "none")


def warm_up(name: str, device: str = "cuda", toy: int = 1) -> None:
    """One run of each case of an op, its kernel first; then of the first case by torch.compile."""
    with running(device):
        op = OPS[name]
        for make in CASES[name].values():
            outcome(
                lambda *a, **k: op.call(*a, **k, backend="triton"),
                make(Draw(Random(0), dtype=torch.bfloat16, device=device), toy),
            )
        if device == "cuda":
            make = next(iter(CASES[name].values()))
            outcome(torch.compile(op.peer or op.reference), make(Draw(Random(0), dtype=torch.bfloat16, device=device), toy))


def speed(run: Any) -> None:
    """Each kernel beside torch's own, and Liger's where it is installed; bytes moved against the ceiling."""
    _speed(run, "speed", {f"{name} | {label}": make for name in fused(run) for label, make in CASES.get(name, {}).items()})


def compiled(run: Any) -> None:
    """The first case of each beside torch.compile of torch's own."""
    first = {name: next(iter(CASES[name].items())) for name in fused(run) if name in CASES}
    _speed(run, "compiled", {f"{name} | {label}": make for name, (label, make) in first.items()})


SECOND = {"L 4096": (8, 4096, 64), "L 16384": (4, 16384, 64), "L 16384, E 128": (4, 16384, 128)}  # heads, length, features


def twice(run: Any) -> None:
    """A Hessian-vector product of causal attention, bfloat16: the kernels beside the eager loops and torch's plain maths."""
    op = OPS["scaled_dot_product_attention"]
    cases = SECOND if op.name in fused(run) else {}
    for name in run.todo("twice", list(cases)[:1] if run.rehearse else cases):
        H, L, E = cases[name] if not run.rehearse else (1, 24, 8)
        qkv = [torch.randn(1, H, L, E, dtype=torch.bfloat16, device=run.device) for _ in range(3)]
        figures: dict[str, Any] = {}
        found = {}
        for label, fn in second_orders(op).items():
            product = partial(hessian_product, fn, qkv)
            try:
                found[label] = product()
                (figures[f"{label}_ms"],) = timing.medians([product], run.device, 0.02 if run.rehearse else 0.5, least=3)
                figures[f"{label}_peak_mib"] = timing.peak(product, run.device) / 2**20
            except torch.cuda.OutOfMemoryError:
                figures[f"{label}_ms"] = "out of memory"
            if run.device == "cuda":
                torch.cuda.empty_cache()
        for label in found.keys() & {"ours", "math"}:  # beside the loops, which compute in float32
            pairs = [(a.float(), b.float()) for a, b in zip(found[label], found["loops"])]
            figures[f"{label}_error"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        fine = figures["ours_error"] <= max(3 * figures.get("math_error", 0.0), 0.02)
        wrong = {} if fine else {"error": "the kernels' product is not that of the loops"}
        run.ledger.add("twice", name, "ok" if fine else "failed", **figures, **wrong)


def hessian_product(fn: Callable[..., Any], qkv: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the sum of squares, along the inputs themselves, by reverse mode twice."""
    leaves = [t.clone().requires_grad_() for t in qkv]
    grads = torch.autograd.grad(fn(*leaves).float().square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(grads, leaves, qkv)


def second_orders(op: Any) -> dict[str, Callable[..., Any]]:
    """Attention by three ways that can be differentiated twice; torch's fused kernels cannot."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def ours(backend: str) -> Callable[..., Any]:
        return lambda *qkv: op.call(*qkv, is_causal=True, backend=backend)

    return {"ours": ours("triton"), "loops": ours("eager"), "math": plain}


def paths(run: Any) -> None:
    """Attention's kernels by each path, in turns, bfloat16; one that cannot be taken here says why."""
    from bptoolkit.triton_kernels.attention_descriptors import PATHS

    op = OPS["scaled_dot_product_attention"]
    cases = CASES[op.name] if op.name in fused(run) else {}
    for name in run.todo("paths", list(cases)[:1] if run.rehearse else cases):
        case = cases[name](Draw(Random(0), dtype=torch.bfloat16, device=run.device), TOY if run.rehearse else 1)
        cots = [torch.randn_like(t) for t in by_path(op, "pointers", case)]
        figures: dict[str, Any] = {}
        found, wrong = {}, []
        for path in PATHS:
            try:
                found[path] = [*by_path(op, path, case), *by_path(op, path, case, cots)]
            except ValueError as error:
                figures[path] = str(error)
            except Exception as error:
                wrong.append(f"{path}: {type(error).__name__}: {error}"[:300])
        seconds = 0.02 if run.rehearse else 0.6
        for what, given in (("forward", None), ("both", cots)):
            runs = [partial(by_path, op, path, case, given) for path in found]
            figures |= {f"{p}_{what}_ms": t for p, t in zip(found, timing.medians(runs, run.device, seconds))}
        for path in found:
            pairs = [(a.float(), b.float()) for a, b in zip(found[path], found["pointers"])]
            figures[f"{path}_gap"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            if not figures[f"{path}_gap"] <= 0.02:  # NaN is wrong too
                wrong.append(f"{path} is not what pointers give")
        run.ledger.add("paths", name, "failed" if wrong else "ok", **figures, **({"error": "; ".join(wrong)} if wrong else {}))


def by_path(op: Any, path: str, case: Case, cots: list[Tensor] | None = None) -> Any:
    """Values of a call of attention by a path, or with cotangents its gradients."""
    from bptoolkit.triton_kernels.attention_descriptors import forced

    with forced(path):
        out = values(partial(op.call, backend="triton"), case)
        return out if cots is None else gradients(out, case, cots)


def _speed(run: Any, stage: str, cases: dict[str, Any]) -> None:
    ceiling = next((r["copy_gbs"] for r in run.ledger.records if r["name"] == "ceilings"), None)
    for name in run.todo(stage, list(cases)[:2] if run.rehearse else cases):
        try:
            figures = row(OPS[name.split(" | ")[0]], cases[name], run, stage == "compiled", ceiling)
            run.ledger.add(stage, name, figures.pop("status"), **figures)
        except torch.cuda.OutOfMemoryError:
            run.ledger.add(stage, name, "none", why="out of memory")
        except Exception as error:
            run.ledger.add(stage, name, "failed", error=f"{type(error).__name__}: {error}"[:600])
        finally:
            if run.device == "cuda":
                torch.cuda.empty_cache()


def row(op: Any, make: Any, run: Any, compiled: bool, ceiling: float | None) -> dict[str, Any]:
    """The figures of one call, bfloat16; forward, and forward with backward."""
    case = make(Draw(Random(0), dtype=torch.bfloat16, device=run.device), TOY if run.rehearse else 1)
    peer = op.peer or op.reference
    variants: dict[str, Callable[..., Any]] = {"ours": lambda *a, **k: op.call(*a, **k, backend="triton")}
    if compiled:
        torch._dynamo.reset()
        variants["compile"] = torch.compile(peer, backend="eager" if run.rehearse else "inductor")
    else:
        variants["torch"] = peer
        liger = liger_of(op.name)
        if liger is not None:
            variants["liger"] = liger
    calls = {name: (lambda fn=fn: values(fn, case)) for name, fn in variants.items()}
    cots = [torch.randn_like(o) for o in calls["ours"]()]
    both = {name: (lambda call=call: gradients(call(), case, cots)) for name, call in calls.items()}
    same = op.random or all(torch.equal(a, b) for f in (calls["ours"], both["ours"]) for a, b in zip(f(), f(), strict=True))
    seconds = 0.02 if run.rehearse else 0.4
    forward = dict(zip(calls, timing.medians(list(calls.values()), run.device, seconds)))
    total = dict(zip(both, timing.medians(list(both.values()), run.device, seconds)))
    least = traffic(case, calls["ours"], cots)
    figures: dict[str, Any] = {"status": "ok"} if same else {"status": "failed", "error": "another run gave other bits"}
    for name in variants:
        figures[f"{name}_forward_ms"], figures[f"{name}_both_ms"] = forward[name], total[name]
        figures[f"{name}_peak_mib"] = timing.peak(both[name], run.device) / 2**20
        figures[f"{name}_saved_mib"] = saved_bytes(calls[name]) / 2**20
    figures |= {"least_forward_mib": least[0] / 2**20, "least_both_mib": least[1] / 2**20}
    if ceiling:
        figures["forward_of_ceiling"] = least[0] / forward["ours"] / 1e6 / ceiling
        figures["both_of_ceiling"] = least[1] / total["ours"] / 1e6 / ceiling
    return figures


def values(fn: Callable[..., Any], case: Case) -> list[Tensor]:
    return [o for o in tree_flatten(fn(*case.args, **case.kwargs))[0] if isinstance(o, Tensor) and o.requires_grad]


def gradients(out: list[Tensor], case: Case, cots: list[Tensor]) -> tuple[Any, ...]:
    leaves = [t for t in tree_flatten(tuple(case))[0] if isinstance(t, Tensor) and t.requires_grad]
    return torch.autograd.grad(out, leaves, cots[: len(out)], allow_unused=True, materialize_grads=True)


def traffic(case: Case, call: Callable[[], list[Tensor]], cots: list[Tensor]) -> tuple[int, int]:
    """The fewest bytes forward can move, each input read and each output written once; and forward and backward together."""

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    leaves = [t for t in tree_flatten(tuple(case))[0] if isinstance(t, Tensor)]
    forward = size(leaves) + size(call())
    return forward, forward + size(cots) + saved_bytes(call) + size(t for t in leaves if t.requires_grad)


def liger_of(name: str) -> Callable[..., Any] | None:
    """Liger-Kernel's function with the op's signature, or None where it is not installed or has none."""
    try:
        functional = import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    table: dict[str, Callable[..., Any]] = {
        "layer_norm": lambda x, shape, w, b, eps=1e-5: functional.liger_layer_norm(x, w, b, eps),
        "rms_norm": lambda x, shape, w, eps=1e-6: functional.liger_rms_norm(x, w, eps, in_place=False),
        "softmax": lambda x, dim: functional.liger_softmax(x),
        "swiglu": lambda a, b: functional.liger_swiglu(a, b),
        "geglu": lambda a, b: functional.liger_geglu(a, b),
        "cross_entropy": lambda x, k, **kw: functional.liger_cross_entropy(x.clone(), k, **kw),  # it writes over its input
        "linear_cross_entropy": lambda x, w, k: functional.liger_fused_linear_cross_entropy(x, w, k),
    }
    return table.get(name)
