"""Which kernel computes a problem on a device, and why the others do not."""

from __future__ import annotations

import dataclasses
import os

from inductor_ext import kernels
from inductor_ext.kernels import MoeProblem, Problem, table

MOE_HIP = "INDUCTOR_EXT_MOE_HIP"
"""An environment variable about routed experts on GPUs. Unset: kernel "hip" where it can. 0: never. 1: "hip" or an
error, as if it had been forced."""


class NoKernel(Exception):
    """No kernel, or not the one asked for, computes a problem. The message quotes every reason."""


class Required(NoKernel):
    """Not the one asked for."""


@dataclasses.dataclass(frozen=True)
class Choice:
    kernel: str
    passed_over: dict[str, str]
    """Kernel -> why it was not chosen, for those with a higher priority."""


def choose(problem: Problem | MoeProblem, forced: str | None = None, elsewhere: bool = False) -> Choice:
    """The first kernel of the table for the op and the device that does not reject the problem; or the forced one, if
    it does not. ``elsewhere``: the device is not here, and what is installed here does not count.

    Raises NoKernel with every reason, and ValueError for a forced name that no kernel has, or for what MOE_HIP may not
    be. A forced kernel is never replaced by another.
    """
    if forced is not None:
        kernels.check_name(forced)
    elif problem.op == "moe" and problem.device == "cuda" and moe_hip() == "1":
        forced = "hip"
    candidates = (forced,) if forced is not None else table.priority(problem.op, problem.device, problem.bits)
    reasons: dict[str, str] = {}
    for name in candidates:
        reason = why_not(problem, name, elsewhere)
        if reason is None:
            return Choice(name, reasons)
        reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise (NoKernel if forced is None else Required)(
        f"No kernel computes {problem.op} {problem} on {problem.device}: {told}"
    )


def choose_backend(problem: Problem | MoeProblem, backend: str | None, elsewhere: bool = False) -> table.Row:
    """As ``choose``, by what the field calls kernels: the row of the first kernel, or of the first of this backend.

    Raises NoKernel with every reason.
    """
    known = table.rows(problem.op)
    if backend is None:
        return known[choose(problem, elsewhere=elsewhere).kernel]
    reasons = {}
    for row in known.values():
        if row.backend == backend:
            reason = why_not(problem, row.name, elsewhere)
            if reason is None:
                return row
            reasons[row.name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or NOT_FOR_INTEGERS[backend]
    raise Required(f"Backend {backend} does not compute {problem.op} {problem} on {problem.device}: {told}")


NOT_FOR_INTEGERS = {
    "AITER_W4A8": "AITER's W4A8 kernel takes MXFP4 weights, not integers; it computes w4a16::moe_mxfp4.",
}
"""Backends of the field that have no kernel for integer weights, and why."""


def verdicts(problem: Problem | MoeProblem, elsewhere: bool = False) -> dict[str, str | None]:
    """Every kernel that is tried on the problem's device, the first first, with why it does not compute it; None if it
    does."""
    tried = table.priority(problem.op, problem.device, problem.bits)
    return {name: why_not(problem, name, elsewhere) for name in tried}


def moe_hip() -> str:
    """What MOE_HIP says: "", "0" or "1"."""
    value = os.environ.get(MOE_HIP, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{MOE_HIP} must be 0 (never), 1 (required) or unset; it is {value!r}.")
    return value


def why_not(problem: Problem | MoeProblem, name: str, elsewhere: bool = False) -> str | None:
    """Why this kernel does not compute the problem, as a sentence; None if it does."""
    if problem.op == "moe" and name in ("hip", "rdna3_wmma") and moe_hip() == "0":
        return f"It is switched off: {MOE_HIP} is 0."
    known = table.rows(problem.op)
    if name not in known:
        return f"There is no such kernel for {problem.op}; its kernels are {', '.join(sorted(known))}."
    if (reason := _not_by_the_op(problem, known[name])) is not None:
        return reason
    if not elsewhere and (reason := kernels.why_unusable(problem.op, name)) is not None:
        return reason
    rejected: str | None = kernels.load_for(problem.op, name).reject(problem)
    return rejected


def _not_by_the_op(problem: Problem | MoeProblem, row: table.Row) -> str | None:
    """What no kernel could do, as the op has no argument for it, and kernels are not asked about."""
    if problem.bits not in row.bits:
        return f"The kernel takes codes of {' or '.join(map(str, row.bits))} bits, the weights have {problem.bits}."
    if isinstance(problem, MoeProblem):
        if problem.w2.bits != problem.w13.bits:
            return f"Both projections must have codes of the same bits, not {problem.w13.bits} and {problem.w2.bits}."
        if problem.w13.order or problem.w2.order:
            return "The experts' columns are stored permuted (act-order), and w4a16::moe takes no order."
        sizes = (problem.H, problem.w13.group_size), (problem.I, problem.w2.group_size)
        if problem.op == "moe" and (reason := _unequal(*sizes)) is not None:
            return reason
        if problem.batched and not row.batched:
            return "Tokens come batched by expert, [E, tokens, H]; w4a16::moe takes [T, H] and ids."
    elif problem.op == "linear":
        return _unequal((problem.K, problem.group_size))
    return None


def _unequal(*sizes: tuple[int, int]) -> str | None:
    """A weight of so many columns has groups of one size."""
    for K, group_size in sizes:
        if K % group_size:
            return f"Groups of {group_size} do not divide K={K}."
    return None
