"""Verdicts: the reading of a cone's structure, found once a process, and the proof of each weight that has it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from inductor_ext import prove, weights
from inductor_ext.patterns.cone import Computes
from inductor_ext.patterns.mxfp4 import Mxfp4Reading
from inductor_ext.patterns.reading import Reading
from inductor_ext.patterns.recognise import NotRecognised, recognise, roles
from inductor_ext.proved import Refused
from inductor_ext.recipes import ExpertRecipe, Recipe

_VERDICTS: dict[str, Reading | Mxfp4Reading | str] = {}
"""Case signature -> its reading, or why it has none."""
log = logging.getLogger("inductor_ext.verdicts")
R = TypeVar("R", Recipe, ExpertRecipe)


@dataclasses.dataclass(frozen=True)
class Case:
    """A cone to be read as a weight [N, K], which is the rows of all experts if there are several."""

    program: Computes
    sources: tuple[Tensor, ...]
    N: int
    K: int
    experts: int = 1

    @property
    def signature(self) -> str:
        # What a stored tensor may be taken for depends on its values too (int8 within 4 bits or not), and so does the
        # verdict.
        taken = list(roles(self.sources, self.N, self.K, self.experts))
        return f"{self.program.signature(self.sources)} {taken}"

    def recipe(self) -> Recipe:
        """How the stored tensors are to be read; nothing is proved yet. Raises Refused."""
        signed = self.signature
        if signed not in _VERDICTS:
            _VERDICTS[signed] = self._read()
        verdict = _VERDICTS[signed]
        if isinstance(verdict, str):
            raise Refused(verdict)
        return Recipe(self.program, verdict, f"{signed} {verdict!r}")

    def _read(self) -> Reading | Mxfp4Reading | str:
        try:
            return recognise(self.program, self.sources, self.N, self.K, self.experts)
        except NotRecognised as error:
            return str(error)
        except Exception as error:  # the cone is the user's code, run on values it was not written for
            log.debug("probing failed", exc_info=True)
            return f"its computation fails on probe values ({type(error).__name__}: {error})"


def settle(cases: Sequence[Case], recipe: Callable[[], R]) -> tuple[R, weights.Entry]:
    """A recipe made from the verdicts on these cases, and the weight proved by it. Raises Refused."""
    signed = [case.signature for case in cases]
    known = any(s in _VERDICTS for s in signed)
    made = recipe()
    try:
        return made, weights.entry(made, [t for case in cases for t in case.sources])
    except prove.NotProved as error:
        if not known:
            raise Refused(str(error)) from None
    # A verdict came from a sibling whose stored tensors allowed another reading (a g_idx that sorts nothing): read this
    # one itself.
    for s in signed:
        _VERDICTS.pop(s, None)
    return settle(cases, recipe)
