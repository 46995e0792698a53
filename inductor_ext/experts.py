"""Examining routed experts: the layers of a graph whose experts can be computed by ``w4a16::moe``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor, fx

from inductor_ext import devices, verdicts
from inductor_ext.capture import Site
from inductor_ext.kernels import MoeProblem, WeightKind
from inductor_ext.options import Options
from inductor_ext.patterns.anchors import meta
from inductor_ext.patterns.cone import Cone, NotACone, cone_of
from inductor_ext.patterns.experts import Cut, is_size
from inductor_ext.patterns.gathered import Gathered
from inductor_ext.patterns.meaning import CutRows
from inductor_ext.patterns.region import Region
from inductor_ext.patterns.routed import Routed, find_routed
from inductor_ext.proved import ProvedExperts, Refused, Weight, chosen, computed_in, where
from inductor_ext.recipes import ExpertRecipe, Piece
from inductor_ext.report import Rewritten


def examine_experts(
    site: Site, trained: set[fx.Node], options: Options
) -> tuple[list[ProvedExperts], list[tuple[str, str]], set[fx.Node]]:
    """The routed experts that can be rewritten; those that are left alone, with the reason; and the matmuls of both.

    Raises oracle.NoKernel if a forced kernel cannot compute one.
    """
    proved: list[ProvedExperts] = []
    found, refused = find_routed(site.graph, site)
    left = [(_where(cuts), reason) for cuts, reason in refused]
    taken = {reader for cuts, _ in refused for cut in cuts for reader in cut.readers}
    for routed in found:
        taken |= {*routed.region.nodes, routed.region.out}
        try:
            proved.append(_examine(site, routed, trained, options))
        except Refused as reason:
            left.append((_where(routed.region.cuts), str(reason)))
    return proved, left, taken


def _examine(site: Site, routed: Routed, trained: set[fx.Node], options: Options) -> ProvedExperts:
    region = routed.region
    first = region.ups[0].readers[0]
    stored = [node for nodes in (*(cut.nodes for cut in region.cuts), *region.biases) for node in nodes]
    if first in trained and any(meta(node).requires_grad for node in stored):
        raise Refused(
            "a stored tensor of its experts requires a gradient, which the fused op does not give; freeze it, or"
            " compile under torch.no_grad()"
        )
    dtype = computed_in(first)
    finding = routed.finding
    w13, w2 = _weight(site, region, finding.w13, True), _weight(site, region, (finding.w2,), False)
    kinds = _kind(w13), _kind(w2)
    if kinds[0].codes != kinds[1].codes:
        raise Refused(f"its projections are of two kinds, {kinds[0].codes} and {kinds[1].codes}")
    op = "moe" if kinds[0].codes == "int4" else "moe_mxfp4"
    if routed.rounding is not None and op == "moe":
        raise Refused("its activations are rounded to fp8, which is computed for MXFP4 weights only")
    by_checkpoint, by_user = routed.rounding is not None, options.activation == "fp8"
    fp8 = op == "moe_mxfp4" and (by_checkpoint or by_user)
    device = options.device or devices.of(w13.sources[0].device)
    problem = MoeProblem(
        device=device.type,
        arch=device.arch,
        dtype=dtype,
        E=region.experts,
        top_k=region.top_k,
        H=region.hidden,
        I=finding.intermediate,
        w13=kinds[0],
        w2=kinds[1],
        mlp=finding.mlp,
        bias=bool(region.biases),
        expert_map=False,
        op=op,
        fp8=fp8,
    )
    choice = chosen(problem, options)
    proof = " | ".join(f"{name}: {w.entry.proof}" for name, w in (("w13", w13), ("w2", w2)))
    if fp8:
        proof += f" | fp8 by {'the input scales of the model' if by_checkpoint else 'w4a16.activation, scales 1'}"
    called = f"w4a16::{'moe_gemm_a8w4' if fp8 else op}"
    told = Rewritten(_where(region.cuts), called, choice.kernel, str(problem), proof, choice.passed_over)
    return ProvedExperts(region.out, (w13, w2), choice.kernel, told, routed, fp8)


def _where(cuts: Sequence[Cut]) -> str:
    """The module that the matmuls have in common, or the first one's."""
    paths = [where(reader).split(".") for cut in cuts for reader in cut.readers]
    common = [part for part, *rest in zip(*paths, strict=False) if set(rest) <= {part}]
    return ".".join(common) or ".".join(paths[0])


def _kind(weight: Weight) -> WeightKind:
    recipe, kind = weight.recipe, weight.entry.kind
    assert isinstance(recipe, ExpertRecipe)
    return WeightKind(kind.scale_dtype, recipe.group_size, kind.zeros, kind.codes)


@dataclasses.dataclass(frozen=True)
class _Part:
    cone: Cone
    case: verdicts.Case


def _weight(site: Site, region: Region, rows: Sequence[CutRows], w13: bool) -> Weight:
    """One projection of all experts, proved. Raises Refused."""
    parts: dict[fx.Node, _Part] = {}
    pieces: list[Piece] = []
    places: dict[fx.Node, int] = {}
    for expert in range(region.experts):
        for r in rows:
            cut = region.cuts[r.cut]
            node = cut.nodes[expert if cut.apart else 0]
            if node not in parts:
                places[node], parts[node] = len(parts), _part(site, cut, node, r.kn)
            part, first = places[node], 0 if cut.apart else expert * cut.matrix[1 if r.kn else 0]
            piece = Piece(part, first + r.start, first + r.stop, r.step)
            if pieces and (pieces[-1].part, pieces[-1].stop, pieces[-1].step, r.step) == (part, piece.start, 1, 1):
                pieces[-1] = Piece(part, pieces[-1].start, piece.stop)
            else:
                pieces.append(piece)
    cases = [part.case for part in parts.values()]

    def recipe() -> ExpertRecipe:
        counts = tuple(len(case.sources) for case in cases)
        return ExpertRecipe(tuple(case.recipe() for case in cases), counts, tuple(pieces), region.experts, w13)

    made, entry = verdicts.settle(cases, recipe)
    return Weight(
        tuple(node for part in parts.values() for node in part.cone.nodes),
        tuple(leaf for part in parts.values() for leaf in part.cone.leaves),
        (),
        tuple(t for case in cases for t in case.sources),
        made,
        entry,
    )


def _part(site: Site, cut: Cut, node: fx.Node, kn: bool) -> _Part:
    """Raises Refused."""
    select, reader = cut.select, min(cut.readers)
    try:
        if select is None:
            found = cone_of(node, reader, kn, site.why_not_stored)
        else:
            found = cone_of(node, reader, kn, site.why_not_stored, lambda n: n is select or is_size(n))
    except NotACone as error:
        raise Refused(str(error)) from None
    program = found.program if select is None else Gathered(found, select, cut.experts)
    sources: list[Tensor] = [t for leaf in found.leaves if (t := site.stored(leaf)) is not None]
    experts = 1 if cut.apart else cut.experts
    rows, cols = cut.matrix
    N, K = (cols, rows) if kn else (rows, cols)
    return _Part(found, verdicts.Case(program, tuple(sources), experts * N, K, experts))
