"""`gradcheck` and `gradgradcheck` with the signatures of torch's, for tests that exist: a change of one word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError as _TorchError

from bptoolkit.verify.point import Point
from bptoolkit.verify.report import Failure, Report, VerificationError

VALUES = ("gradient_value", "sizes", "values", "dtypes", "input_layout", "cotangent_layout", "grad_subsets")
CONDUCT = (
    "nothing_changed",
    "backward_twice",
    "interleaved_calls",
    "gradients_kept",
    "version_counter",
    "linear_in_cotangent",
    "finite_differences",
)


class GradcheckError(VerificationError, _TorchError):
    """What `gradcheck` raises: torch's own error (a RuntimeError) and a `VerificationError`, with the report."""


def gradcheck(
    func: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    check_batched_grad: bool = False,
    check_batched_forward_grad: bool = False,
    check_forward_ad: bool = False,
    check_backward_ad: bool = True,
    fast_mode: bool = False,
    masked: bool | None = None,
) -> bool:
    """`torch.autograd.gradcheck`, done by the verifier: more is judged, and a failure can be read.

    Args:
        func: takes the inputs, returns a tensor or several.
        inputs: tensors and other arguments; those that require grad are differentiated by. Their values and others of their
            kind and shape are tried; sizes are varied where func allows it.
        eps, atol, rtol: are taken and not used: steps and bounds come from the error model.
        raise_exception: raise, or return False.
        nondet_tol: above zero, func is taken to be non-deterministic.
        check_undefined_grad: judge undefined cotangents of several outputs.
        check_grad_dtypes: judge the dtypes of gradients (always done; here for the signature).
        check_batched_grad: judge vmap over backward.
        check_batched_forward_grad: with check_forward_ad, judge vmap over forward mode.
        check_forward_ad: judge forward mode, which then has to be there.
        check_backward_ad: judge reverse mode. False leaves forward mode alone, which only finite differences can then be held
            against: that is done by torch's own gradcheck, with eps, atol and rtol.
        fast_mode: a quick search.
        masked: sparse inputs are not supported; None or False.

    Returns:
        True if everything holds, False if not and `raise_exception` is False.

    Raises:
        GradcheckError: something does not hold; the message is the report. Also a RuntimeError, as torch's is.
        ValueError: no input requires grad, or inputs are complex or sparse.
        AssertionError: options contradict each other, as in torch.
    """
    if not (check_forward_ad or check_backward_ad):
        raise AssertionError("gradcheck: check_forward_ad and check_backward_ad are both False: there is nothing to check")
    if check_batched_grad and not check_backward_ad:
        raise AssertionError("gradcheck: check_batched_grad=True needs check_backward_ad=True")
    if check_batched_forward_grad and not check_forward_ad:
        raise AssertionError("gradcheck: check_batched_forward_grad=True needs check_forward_ad=True")
    if not check_backward_ad:
        options: dict[str, Any] = {
            "eps": eps,
            "atol": atol,
            "rtol": rtol,
            "nondet_tol": nondet_tol,
            "check_grad_dtypes": check_grad_dtypes,
        }
        options |= {"check_batched_forward_grad": check_batched_forward_grad, "fast_mode": False, "masked": masked}
        return _forward_alone(func, inputs, options, raise_exception)
    names = [*VALUES, *CONDUCT]
    names += ["some_outputs_unused"] if check_undefined_grad else []
    names += ["forward_mode"] if check_forward_ad else []
    names += ["vmap"] if check_batched_grad or check_batched_forward_grad else []
    claims: dict[str, Any] = {"empty": True}
    claims |= {"forward_mode": True} if check_forward_ad else {}
    claims |= {"vmap": True} if check_batched_grad or check_batched_forward_grad else {}
    claims |= {"deterministic": False} if nondet_tol > 0 else {}
    return _judge("gradcheck", func, inputs, names, claims, fast_mode, masked, raise_exception)


def gradgradcheck(
    func: Callable[..., Any],
    inputs: Tensor | Sequence[Any],
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    gen_non_contig_grad_outputs: bool = False,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    check_batched_grad: bool = False,
    check_fwd_over_rev: bool = False,
    check_rev_over_rev: bool = True,
    fast_mode: bool = False,
    masked: bool = False,
) -> bool:
    """`torch.autograd.gradgradcheck`, done by the verifier: second derivatives, which have to be there.

    Arguments, result and errors are those of `gradcheck`; `grad_outputs` are drawn, of every layout, whatever is given.
    """
    del grad_outputs, eps, atol, rtol, gen_non_contig_grad_outputs, check_undefined_grad, check_grad_dtypes, check_batched_grad
    names = ["double_backward"] if check_rev_over_rev else []
    names += ["forward_mode"] if check_fwd_over_rev else []
    claims: dict[str, Any] = {"double_backward": True} | ({"deterministic": False} if nondet_tol > 0 else {})
    return _judge("gradgradcheck", func, inputs, names, claims, fast_mode, masked, raise_exception)


def _forward_alone(func: Any, inputs: Any, options: dict[str, Any], raise_exception: bool) -> bool:
    """Forward mode against finite differences, by torch; what it says as a report."""
    try:
        return bool(torch.autograd.gradcheck(func, inputs, check_forward_ad=True, check_backward_ad=False, **options))
    except _TorchError as error:
        if not raise_exception:
            return False
        failure = Failure("forward_mode", str(error), Point(), line="")
        report = Report(getattr(func, "__qualname__", type(func).__name__), calls={"forward_mode": 1}, failures=[failure])
        raise GradcheckError(report) from error


def _judge(
    name: str, func: Any, inputs: Any, names: list[str], claims: dict[str, Any], fast: bool, masked: Any, raise_exception: bool
) -> bool:
    from bptoolkit.verify import check

    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for k, t in enumerate(arguments):
        if isinstance(t, Tensor) and (t.is_complex() or t.layout is not torch.strided):
            raise ValueError(
                f"{name}: input {k} is {t.dtype}, {t.layout}; only real, strided tensors can be verified: use torch's own"
            )
    if masked:
        raise ValueError(f"{name}: masked={masked} is about sparse tensors, which are not supported: use torch's own")
    if not any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        raise ValueError(f"{name}: none of the {len(arguments)} inputs requires grad")
    report: Report = check(func, arguments, properties=names, contract=claims, quick=fast)
    if not report.ok and raise_exception:
        raise GradcheckError(report)
    return report.ok


__all__ = ["GradcheckError", "gradcheck", "gradgradcheck"]
