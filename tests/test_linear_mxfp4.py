"""Linear layers with an MXFP4 weight: the op by itself, and found in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import rel_l2
from moe_problems import DTYPES, OWED
from mxfp4_problems import e2m1
from torch import Tensor, nn
from zoo.base import fresh
from zoo_moe.mxfp4 import VALUES

import inductor_ext
import inductor_ext.ops
from inductor_ext import kernels
from inductor_ext.formats import PackedMxfp4
from inductor_ext.kernels import cpu, table

KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name in table.priority("linear_mxfp4", "cpu")
    for reason in [kernels.why_unusable("linear_mxfp4", name)]
]
ISAS = [] if cpu.usable() else torch.ops.w4a16_cpu.usable_isas().split(",")


class Mxfp4Linear(nn.Module):
    """Dequantises in its forward; K need not be whole groups."""

    def __init__(self, N: int, K: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(N * K)
        self.in_features, self.out_features = K, N
        self.register_buffer("blocks", torch.randint(256, (N, K // 2), generator=g, dtype=torch.uint8))
        self.register_buffer("scale", torch.randint(120, 126, (N, -(-K // 32)), generator=g).to(torch.uint8))
        self.bias = nn.Parameter(torch.randn(N, generator=g).to(dtype), requires_grad=False) if bias else None
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack((self.blocks & 15, self.blocks >> 4), dim=-1).flatten(-2)
        scale = torch.exp2(self.scale.float() - 127).repeat_interleave(32, dim=1)[:, : self.in_features]
        weight = (torch.tensor(VALUES)[codes.int()] * scale).to(self.dtype)
        return F.linear(x, weight, self.bias)

    def exact(self) -> Tensor:
        values = e2m1(torch.stack((self.blocks & 15, self.blocks >> 4), dim=-1).flatten(-2).int())
        return values * (2.0 ** (self.scale.double() - 127)).repeat_interleave(32, 1)[:, : self.in_features]

    def expected(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.exact(), None if self.bias is None else self.bias.double())

    def packed(self, kernel: str) -> tuple[Tensor, Tensor]:
        packed = kernels.load_linear_mxfp4(kernel).pack(PackedMxfp4(self.blocks, self.scale))
        return packed.qweight, packed.scales

    def op(self, x: Tensor, kernel: str) -> Tensor:
        y: Tensor = torch.ops.w4a16.linear_mxfp4(x, *self.packed(kernel), self.bias, self.out_features, kernel)
        return y


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_op_is_as_exact_as_its_dtype_allows(kernel: str, dtype: torch.dtype) -> None:
    before = torch.ops.w4a16_cpu.set_isa(ISAS[0]) if ISAS else ""
    try:
        for isa in ISAS if kernel == "cpu" else [""]:
            if isa:
                torch.ops.w4a16_cpu.set_isa(isa)
            for N, K, bias in ((48, 64, True), (37, 544, False), (5, 70, True), (130, 2, True)):
                layer = Mxfp4Linear(N, K, dtype, bias)
                for shape in ((K,), (3, K), (2, 20, K), (0, K)):
                    x = torch.randn(shape).to(dtype)
                    y = layer.op(x, kernel)
                    assert (y.shape, y.dtype) == ((*shape[:-1], N), dtype)
                    assert rel_l2(y, layer.expected(x)) <= OWED[dtype] or x.numel() == 0
                    assert torch.equal(layer.op(x, kernel), y)
    finally:
        if ISAS:
            torch.ops.w4a16_cpu.set_isa(before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_op_passes_pytorchs_own_checks(kernel: str) -> None:
    layer = Mxfp4Linear(6, 36)
    layer.bias.requires_grad_()
    x = torch.randn(3, 36, requires_grad=True)
    arguments = (x, *layer.packed(kernel), layer.bias, 6, kernel)
    torch.library.opcheck(torch.ops.w4a16.linear_mxfp4.default, arguments)
    layer.op(x, kernel).sum().backward()
    assert rel_l2(x.grad, torch.ones(3, 6).double() @ layer.exact()) <= 1e-5
    assert torch.equal(layer.bias.grad, torch.full((6,), 3.0))


def test_mistakes_are_named() -> None:
    layer, x, op = Mxfp4Linear(6, 64), torch.randn(3, 64), torch.ops.w4a16.linear_mxfp4
    codes, scales = layer.packed("reference")
    for arguments, said in (
        ((x, codes.int(), scales, None, 6), "qweight must be uint8"),
        ((x, codes, scales[:, :1].contiguous(), None, 6), r"scales must be \[6, 2\]"),
        ((x, codes, scales, layer.bias.half(), 6), "bias must be float32"),
        ((x[:, :63], codes, scales, None, 6), "K must be even, it is 63"),
        ((x.double(), codes, scales, None, 6), "x must be float16, bfloat16 or float32"),
    ):
        with pytest.raises(RuntimeError, match=f"w4a16::linear_mxfp4: {said}"):
            op(*arguments)


@pytest.mark.parametrize(("N", "K", "dtype"), [(40, 96, torch.bfloat16), (24, 80, torch.float32)], ids=str)
def test_a_layer_is_found_proved_and_computed(N: int, K: int, dtype: torch.dtype) -> None:
    layer = Mxfp4Linear(N, K, dtype)
    (found,) = inductor_ext.explain(layer, torch.randn(7, K).to(dtype)).rewritten
    assert found.op == "w4a16::linear_mxfp4" and f"N={N} K={K} G=32" in found.problem and "MXFP4" in found.problem
    assert "bit-equal, e2m1 * 2^scale" in found.proof
    torch.compiler.reset()
    run: Any = torch.compile(layer, backend="w4a16", fullgraph=True, options={"w4a16.strict": True})
    for rows in (7, 1, 64):
        x = torch.randn(rows, K).to(dtype)
        if rows > 1:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert rel_l2(run(x), layer.expected(x)) <= OWED[dtype]


def test_prepack_leaves_it_as_it_is() -> None:
    model = nn.Sequential(Mxfp4Linear(32, 64))
    assert inductor_ext.prepack_(model) == 0
    assert type(model[0]) is Mxfp4Linear


def test_a_table_of_other_values_is_left_alone() -> None:
    layer = Mxfp4Linear(32, 64)
    layer.blocks = layer.blocks.clone()

    def shifted(x: Tensor) -> Tensor:
        codes = torch.stack((layer.blocks & 15, layer.blocks >> 4), dim=-1).flatten(-2)
        scale = torch.exp2(layer.scale.float() - 127).repeat_interleave(32, dim=1)
        values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -6, -4, -3, -2, -1.5, -1, -0.5, 0])
        return x @ (values[codes.int()] * scale).t()

    report = inductor_ext.explain(shifted, torch.randn(3, 64))
    assert report.rewritten == []
    assert "its code book is not that of MXFP4" in report.left_alone[0].reason.replace("Its", "its")
