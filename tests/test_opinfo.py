"""A sample of PyTorch's operator database; `python tests/opinfo.py` runs all of it."""

from __future__ import annotations

import pytest
import torch
from opinfo import compare, float32_ops

MATMULS = ["matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "einsum", "outer", "inner", "tensordot"]
MATMULS += ["nn.functional.linear", "linalg.multi_dot"]
OTHERS = ["item", "arange", "zeros", "nonzero", "masked_select", "unique", "index_put", "__getitem__", "scatter_add"]
OTHERS += ["sort", "nn.functional.embedding", "nn.functional.layer_norm", "softmax"]
SAMPLE = MATMULS + OTHERS
SIZES_FROM_DATA = {"item", "nonzero", "masked_select", "unique"}
"""Of these Dynamo makes no graph."""


@pytest.mark.filterwarnings("ignore")
def test_operators_come_out_as_with_inductor() -> None:
    outcomes = compare(float32_ops(SAMPLE), seconds=float("inf"))
    torch.compiler.reset()
    assert sorted(outcomes) == sorted(SAMPLE)
    assert {name: pair for name, pair in outcomes.items() if pair[0] != pair[1]} == {}
    assert {name for name, pair in outcomes.items() if pair != ("ok", "ok")} == SIZES_FROM_DATA
