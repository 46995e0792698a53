"""Routed experts: which operation a region computes, found by trying it.

A region is run on made-up inputs (trial.py) and compared with what ``w4a16::moe`` means (meaning.py) under each
hypothesis: where gate and up stand, the activation between the projections, the router's weight before or after. The
one that agrees on every routing is what the region computes; if none does, it is something else.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any, Protocol

from inductor_ext.patterns.anchors import meta, name
from inductor_ext.patterns.experts import Cut, find_groups
from inductor_ext.patterns.flow import Flow
from inductor_ext.patterns.meaning import CutRows, Finding, Meaning
from inductor_ext.patterns.region import Proposals, Region, structure
from inductor_ext.patterns.rounding import NotRounded, Rounding, rounding_of
from inductor_ext.patterns.thresholds import limits_ids, why_not_these_clamps, why_not_tried
from inductor_ext.patterns.trial import MadeUp, Trial, beyond, routings, stray_scores
from torch import Tensor, fx

from inductor_ext.kernels import Mlp

log = logging.getLogger("inductor_ext.patterns.routed")


@dataclasses.dataclass(frozen=True)
class Routed:
    """A region that computes routed experts, and how."""

    region: Region
    finding: Finding
    rounding: Rounding | None
    """To fp8, of what its projections are given."""


class Tensors(Protocol):
    """What is known of the tensors behind a graph's inputs and attributes."""

    def stored(self, node: fx.Node) -> Tensor | None:
        """The real tensor of a placeholder or get_attr, if it can be seen and belongs to the model."""

    def seen(self, node: fx.Node) -> Any:
        """The same, or else the fake one."""


def find_routed(graph: fx.Graph, tensors: Tensors) -> tuple[list[Routed], list[tuple[tuple[Cut, ...], str]]]:
    """The routed experts of a graph; and the cuts that are none, with the reason."""
    found: list[Routed] = []
    refused: list[tuple[tuple[Cut, ...], str]] = []
    flow = Flow(graph)
    made: MadeUp = {}
    position = {node: i for i, node in enumerate(graph.nodes)}

    def is_stored(node: fx.Node) -> bool:
        return tensors.stored(node) is not None

    batches, singles = find_groups(graph, flow, is_stored, tensors.seen)
    for ups, down in (*batches, *singles):
        proposals = Proposals(flow, ups, down, is_stored, position)
        routed = _first(proposals, flow, tensors, made)
        if routed is not None:
            found.append(routed)
        elif down.apart:
            log.debug("the matmuls from %s on are no routed experts: %s", ups[0].readers[0].name, proposals.reason)
        else:
            refused.append(((*ups, down), proposals.reason))
    return found, refused


def _first(proposals: Proposals, flow: Flow, tensors: Tensors, made: MadeUp) -> Routed | None:
    for region in proposals:
        finding = why_not_tried(region, proposals.ahead, flow) or _identify(region, flow, tensors, made)
        if isinstance(finding, Finding):
            finding = why_not_these_clamps(region, proposals.ahead, finding.mlp) or finding
        if isinstance(finding, Finding):
            try:
                return Routed(region, finding, rounding_of(region, finding.mlp))
            except NotRounded as reason:
                finding = str(reason)
        proposals.refuse(4 if finding == _STRAY else 5, finding)
    return None


_KNOWN: dict[str, Finding | str] = {}
"""Structure of a region -> what the first of that structure was found to compute, or why it is nothing known."""


_STRAY = "its scores may be other than zero for experts that were not chosen"


def _identify(region: Region, flow: Flow, tensors: Tensors, made: MadeUp) -> Finding | str:
    """What a region computes, or why it is not ``w4a16::moe``."""
    known = structure(region)
    if known in _KNOWN and not region.constants and not region.dense:
        return _KNOWN[known]
    trial = Trial(region, tensors.stored, made)
    if trial.tokens == 0:
        return "it is captured for no tokens at all"
    if region.dense and stray_scores(region, flow, trial):
        return _STRAY
    if region.constants or known not in _KNOWN:
        try:
            _KNOWN[known] = _try(trial)
        except Exception as error:  # the user's operations, on values they were not written for
            log.debug("the region that ends in %s cannot be run", region.out.name, exc_info=True)
            _KNOWN[known] = f"its operations fail on made-up inputs ({type(error).__name__}: {error})"
    return _KNOWN[known]


_FEW = 16
"""Columns of the result that a guess is tried on first."""


def _try(trial: Trial) -> Finding | str:
    chosen = routings(trial, trial.region.repeats)
    first = trial.inputs(chosen[0])
    result = trial.run(first)
    if not bool(result.isfinite().all()):
        return "it leaves rows of its result without a value"
    # Rows do not depend on each other, nor do columns: most guesses fail on the first few.
    few = Meaning(first.rows(slice(0, 1)), _FEW)
    guesses = [g for g in _hypotheses(trial.region) if _agree(result[:1, :_FEW], few.under(g), trial.tolerance)]
    if not guesses:
        return (
            "what it computes is sum over experts of weight * down(act(gate, up)) under no activation, order of gate"
            " and up and place of the weight that is known"
        )
    others = [trial.inputs(ids, turn) for turn, ids in enumerate(chosen) if turn > 0]
    tried = [(Meaning(first), result), *((Meaning(given), trial.run(given)) for given in others)]
    for guess in guesses:
        if all(_agree(result, meaning.under(guess), trial.tolerance) for meaning, result in tried):
            return _beyond_the_experts(trial, chosen[0], guess)
    return "it treats some routings, or some values, in another way than by expert and weight"


_BEYOND = "ids beyond its experts, which it lets through, do something else there than contribute nothing"


def _beyond_the_experts(trial: Trial, ids: Tensor, guess: Finding) -> Finding | str:
    """What is found, if ids beyond the experts contribute nothing where operations limit ids or take them modulo, as
    they do in the op as -1; or why that is another thing. Elsewhere such ids are an error, for the op too."""
    if not limits_ids(trial.region):
        return guess
    given = trial.inputs(beyond(ids, trial.region.experts))
    try:
        result = trial.run(given)
    except Exception:  # the user's operations: they let no such ids through
        return guess
    same = ((result - Meaning(given).under(guess)).norm(dim=1) <= trial.tolerance * given.x.norm()).all()
    return dataclasses.replace(guess, skips_beyond=True) if bool(same) else _BEYOND


def _agree(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Row by row: they are of different sizes."""
    return bool(((a - b).norm(dim=1) <= tolerance * b.norm(dim=1)).all()) and bool(b.norm() > 0)


def _hypotheses(region: Region) -> Iterator[Finding]:
    H, last = region.hidden, len(region.cuts) - 1
    for down, *ups in itertools.product(*(_orientations(region, i) for i in (last, *range(last)))):
        I = down.kept  # noqa: E741
        for mlp, pieces in _layouts(ups, I):
            for b13, b2 in _biases(region, pieces):
                for activation in _activations(region, mlp):
                    for before in (False, True):
                        how = dataclasses.replace(activation, apply_router_weight_on_input=before)
                        yield Finding(how, tuple(pieces), CutRows(last, down.kn, 0, H), b13, b2)


@dataclasses.dataclass(frozen=True)
class _Oriented:
    cut: int
    kn: bool
    kept: int
    """The dimension other than the hidden one."""


def _orientations(region: Region, cut: int) -> list[_Oriented]:
    """[N, K] or [K, N], as the hidden size allows: it is K of the first projections and N of the last."""
    rows, cols = region.cuts[cut].matrix
    if region.cuts[cut] is region.down:
        rows, cols = cols, rows
    found = [_Oriented(cut, False, rows)] if cols == region.hidden else []
    return [*found, _Oriented(cut, True, cols)] if rows == region.hidden else found


def _layouts(ups: list[_Oriented], I: int) -> Iterator[tuple[Mlp, list[CutRows]]]:  # noqa: E741
    if len(ups) == 2:
        if all(up.kept == I for up in ups):
            for pair in (ups, ups[::-1]):
                yield Mlp(), [CutRows(up.cut, up.kn, 0, I) for up in pair]
        return
    (up,) = ups
    if up.kept == I:
        yield Mlp(gate_up="none"), [CutRows(up.cut, up.kn, 0, I)]
    if up.kept == 2 * I:
        yield Mlp(), [CutRows(up.cut, up.kn, 0, 2 * I)]
        yield Mlp(gate_up="interleaved"), [CutRows(up.cut, up.kn, 0, 2 * I)]
        yield Mlp(), [CutRows(up.cut, up.kn, I, 2 * I), CutRows(up.cut, up.kn, 0, I)]
        yield Mlp(), [CutRows(up.cut, up.kn, 1, 2 * I, 2), CutRows(up.cut, up.kn, 0, 2 * I, 2)]


def _biases(region: Region, pieces: list[CutRows]) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """Which biases are w13's, and which is w2's: each is one or the other."""
    places = range(len(region.biases))
    cuts = list(dict.fromkeys(piece.cut for piece in pieces))
    for first in ((), *itertools.permutations(places, len(cuts))):
        for last in (None, *places):
            of = dict(zip(cuts, first, strict=False))
            used = [*first, *([] if last is None else [last])]
            if sorted(used) == list(places) and _fit(region, pieces, of, last):
                yield tuple(of[piece.cut] for piece in pieces if of), last


def _fit(region: Region, pieces: list[CutRows], first: dict[int, int], last: int | None) -> bool:
    wanted = [(first[p.cut], region.cuts[p.cut].matrix[1 if p.kn else 0]) for p in pieces if p.cut in first]
    wanted += [] if last is None else [(last, region.hidden)]
    return all(int(meta(region.biases[place][0]).shape[-1]) == size for place, size in wanted)


def _activations(region: Region, mlp: Mlp) -> Iterator[Mlp]:
    for plain in ("silu", "gelu", "gelu_tanh", "relu"):
        yield dataclasses.replace(mlp, activation=plain)
    if mlp.gate_up == "none" or not any(name(n).startswith("clamp") or name(n) == "sigmoid" for n in region.nodes):
        return
    numbers = {float(a) for n in region.nodes for a in _numbers(n) if a > 0}
    for alpha in sorted(numbers | {1.0}):
        for limit in (None, *sorted(numbers)):
            yield dataclasses.replace(mlp, activation="swigluoai", alpha=alpha, limit=limit)


def _numbers(node: fx.Node) -> list[float]:
    return [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float)) and not isinstance(a, bool)]
