"""Every spelling of experts in MXFP4 becomes one w4a16::moe_mxfp4 that computes what its codes and scales stand for;
what only looks like it stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_moe_zoo import OWED, check, named, without_inductor  # noqa: F401
from torch import Tensor
from torch.export import Dim, export
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssMLP
from zoo.base import distance, fresh
from zoo_moe.base import Case, inputs
from zoo_moe.mxfp4 import E8M0, NEGATIVES, POSITIVES, SHIFT, columns, spelled

import inductor_ext
from inductor_ext.passes import W4A16Pass


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    with fresh(), torch.no_grad():
        yield


@pytest.mark.parametrize("case", POSITIVES, ids=named)
def test_every_spelling_is_rewritten(case: Case, without_inductor: None) -> None:  # noqa: F811
    (dtype,) = case.dtypes
    with case.capture():
        report = inductor_ext.explain(case.make(dtype), *inputs(case, dtype, 7))
    assert [alone.reason for alone in report.left_alone] == []
    (found,) = report.rewritten
    assert found.op == "w4a16::moe_mxfp4"
    assert found.problem.startswith(f"E={case.E} top_k={case.k} H={case.H} I={case.I} G=32")
    assert ", MXFP4, swigluoai (interleaved), bias" in found.problem
    assert "bit-equal, e2m1 * 2^scale" in found.proof
    if case.core:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        check(case, dtype, (7, 1, 33))


class Packed(GptOssExperts):
    """transformers' experts, dequantised in every forward by transformers' own function."""

    @property
    def gate_up_proj(self) -> Tensor:
        return convert_moe_packed_tensors(self.blocks_13, self.scales_13, dtype=torch.bfloat16)

    @property
    def down_proj(self) -> Tensor:
        return convert_moe_packed_tensors(self.blocks_2, self.scales_2, dtype=torch.bfloat16)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_transformers_own_block(implementation: str, without_inductor: None) -> None:  # noqa: F811
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=96, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = implementation
    block, E, H, I = GptOssMLP(config).to(torch.bfloat16).requires_grad_(False), 8, 96, 64  # noqa: E741
    for parameter in block.parameters():
        parameter.normal_(std=0.3)
    experts: Any = block.experts
    exact = copy.deepcopy(experts).float()
    del experts.gate_up_proj, experts.down_proj
    for name, N, K in (("13", 2 * I, H), ("2", H, I)):
        experts.register_buffer(f"blocks_{name}", torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8))
        experts.register_buffer(f"scales_{name}", torch.randint(120, 125, (E, N, K // 32), dtype=torch.uint8))
    experts.__class__ = Packed
    exact.gate_up_proj.copy_(experts.gate_up_proj)
    exact.down_proj.copy_(experts.down_proj)
    x = torch.randn(1, 33, H).bfloat16()
    run: Any = torch.compile(block, backend="w4a16", fullgraph=True, options={"w4a16.strict": True})
    y, (_, weights, ids) = run(x)[0], block.router(x.view(-1, H))
    assert distance(y[0], exact(x[0].float(), ids, weights.float()).double()) <= OWED[torch.bfloat16]
    (found,) = inductor_ext.explain(block, x).rewritten
    assert (found.where, found.op) == ("experts", "w4a16::moe_mxfp4")


def test_compiled_by_inductor_and_exported() -> None:
    (case,) = (case for case in POSITIVES if case.name == "grouped_mm")
    (dtype,) = case.dtypes
    check(case, dtype, (7, 33))
    module, given = case.make(dtype), inputs(case, dtype, 7)
    program = export(module, given, dynamic_shapes=({0: Dim.AUTO},))
    for gm in (program.module(), program.run_decompositions().module()):
        W4A16Pass()(gm.graph)
        gm.graph.lint()
        gm.recompile()
        assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.w4a16.moe_mxfp4.default)) == 1
        assert distance(gm(*given), module.expected(*given)) <= OWED[dtype]


@pytest.mark.parametrize("reason", NEGATIVES)
def test_near_misses_stay_as_they_are(reason: str) -> None:
    case = NEGATIVES[reason]
    (dtype,) = case.dtypes
    report = inductor_ext.explain(case.make(dtype), *inputs(case, dtype, 7))
    assert report.rewritten == []
    (left,) = report.left_alone
    assert any(part in left.reason for part in reason.split("|")), left.reason


def test_nan_is_proved_and_infinity_in_its_place_is_not(without_inductor: None) -> None:  # noqa: F811
    """The byte 255 is NaN. A shift into the exponent makes it infinite; that shows only where a weight has it."""
    for format, proved in ((E8M0, True), (SHIFT, False)):
        case: Any = spelled("nan", columns, format, route=None)
        module = case.make(torch.bfloat16)
        given = inputs(case, torch.bfloat16, 7)
        assert len(inductor_ext.explain(module, *given).rewritten) == 1
        module.w2_scale[3, 5, 0] = 255
        torch.compiler.reset()
        report = inductor_ext.explain(module, *given)
        assert len(report.rewritten) == proved
        if proved:
            y = torch.compile(module, backend="w4a16", fullgraph=True)(*given)
            hit = (given[1] == 3).any(1)
            assert y[hit, 5].isnan().all() and y[~hit].isfinite().all()
        else:
            assert "inf where MXFP4's codes and scales give nan" in report.left_alone[0].reason


def test_weights_that_change_are_proved_again(without_inductor: None) -> None:  # noqa: F811
    case: Any = spelled("change", columns, E8M0, route=None)
    module, given = case.make(torch.bfloat16), inputs(case, torch.bfloat16, 7)
    run = torch.compile(module, backend="w4a16", fullgraph=True)
    before = run(*given)
    module.w2_scale.sub_(1)
    assert distance(2 * run(*given), before.double()) > 0  # the bias is not halved
    assert distance(run(*given), module(*given).double()) < 2e-2
