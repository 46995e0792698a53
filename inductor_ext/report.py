"""The report: what was rewritten and by which proof, and what was left alone and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Rewritten:
    where: str
    """The module path, or the node's name where there is none."""
    op: str
    kernel: str
    problem: str
    proof: str
    passed_over: dict[str, str] = dataclasses.field(default_factory=dict)
    """Kernels of higher priority -> why they were not chosen."""


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    where: str
    reason: str
    """A sentence."""


@dataclasses.dataclass
class Report:
    """``rewritten`` and ``left_alone`` are in graph order, over all graphs captured. Matmuls of dense weights are in
    neither."""

    rewritten: list[Rewritten] = dataclasses.field(default_factory=list)
    left_alone: list[LeftAlone] = dataclasses.field(default_factory=list)
    graphs: int = 0

    def __str__(self) -> str:
        total = len(self.rewritten) + len(self.left_alone)
        graphs = f"{self.graphs} graph{'s' if self.graphs != 1 else ''}"
        head = f"{len(self.rewritten)} of {total} int4 matmuls rewritten, in {graphs}"
        parts = [head]
        if self.rewritten:
            rows = [(r.where, r.op, r.kernel, r.problem, r.proof) for r in self.rewritten]
            parts.append(_table(("where", "op", "kernel", "problem", "proof"), rows))
        reasons = Counter((kernel, why) for r in self.rewritten for kernel, why in r.passed_over.items())
        if reasons:
            passed = [(kernel, str(count), why) for (kernel, why), count in reasons.items()]
            parts.append(_table(("not this kernel", "times", "reason"), passed))
        if self.left_alone:
            parts.append(_table(("left alone", "reason"), [(a.where, a.reason) for a in self.left_alone]))
        return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    line = "  ".join("-" * w for w in widths)
    body = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join((body[0], line, *body[1:]))
