"""The quantisation libraries themselves: their own packing, their own modules, compiled through our backend."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.base import distance, fresh

import inductor_ext

N, K, GROUP = 64, 128, 32
# Relative L2 against float64, of a weight taken as the library dequantises it in float32.
OWED = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch.manual_seed(0)
    with fresh():
        yield


def rewritten(module: Any, dense: Tensor, dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None) -> None:
    """The module's matmul is rewritten, and is x @ dense^T + bias."""
    for shape in ((5, K), (2, 3, K)):
        x = torch.randn(shape).to(dtype)
        report = inductor_ext.explain(module, x)
        assert [alone.reason for alone in report.left_alone] == []
        assert len(report.rewritten) == 1
        y = torch.compile(module, backend="w4a16", fullgraph=True)(x)
        expected = F.linear(x.double(), dense.double(), None if bias is None else bias.double())
        assert distance(y, expected) <= OWED[y.dtype]


def left_alone(module: Any, reason: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The module's matmul is left alone for this reason, and is to the bit what plain Inductor computes."""
    x = torch.randn(5, K).to(dtype)
    report = inductor_ext.explain(module, x)
    assert report.rewritten == []
    (alone,) = report.left_alone
    assert reason in alone.reason
    ours = torch.compile(module, backend="w4a16")(x)
    torch.compiler.reset()
    assert torch.equal(ours, torch.compile(module, backend="inductor")(x))


class Computed(nn.Module):
    """F.linear with the weight that a function of stored tensors gives."""

    def __init__(self, weight: Callable[[Any], Tensor], **tensors: Tensor):
        super().__init__()
        self.weight = weight
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(self))


@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(symmetric: bool, strategy: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group = GROUP if strategy == "group" else None
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    groups = K // group if group else 1
    plain = {"weight": torch.randn(N, K), "weight_scale": torch.rand(N, groups) * 0.5 + 0.1}
    if not symmetric:
        plain["weight_zero_point"] = torch.randint(-8, 8, (N, groups), dtype=torch.int8)
    stored = compressor.compress(plain, scheme)
    stored.pop("weight_shape")
    stored["weight_scale"] = stored["weight_scale"].to(torch.bfloat16)

    def weight(m: Any) -> Tensor:
        held = {name: getattr(m, name) for name in stored}
        return compressor.decompress({**held, "weight_shape": (N, K)}, scheme)["weight"]

    wide = {**stored, "weight_scale": stored["weight_scale"].float(), "weight_shape": (N, K)}
    dense = compressor.decompress(wide, scheme)["weight"]
    rewritten(Computed(weight, **stored), dense)


def hqq_layer(axis: int, dtype: torch.dtype, bias: bool = False) -> Any:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=axis)
    dense = nn.Linear(K, N, bias=bias)
    return quantize.HQQLinear(dense, config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", OWED)
def test_hqq_axis_1(dtype: torch.dtype) -> None:
    layer = hqq_layer(1, dtype, bias=True)
    wide = {**layer.meta, "scale": layer.meta["scale"].double(), "zero": layer.meta["zero"].double()}
    wide["compute_dtype"] = torch.float64
    dense = type(layer).__init__.__globals__["Quantizer"].dequantize(layer.W_q, wide)
    with torch.no_grad():  # else its bias, which requires a gradient, takes the matmul into an autograd.Function
        rewritten(layer, dense, dtype, layer.bias)


def test_hqq_axis_0() -> None:
    left_alone(hqq_layer(0, torch.bfloat16), "groups do not lie along K")


@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize("granularity", ["group", "row"])
def test_torchao_quantize_(mapping: str, granularity: str) -> None:
    """Its weight is a tensor subclass."""
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.quant_primitives import MappingType

    module = nn.Sequential(nn.Linear(K, N, bias=True)).to(torch.bfloat16)
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=torchao.PerGroup(GROUP) if granularity == "group" else torchao.PerAxis(0),
        mapping_type=MappingType[mapping],
    )
    torchao.quantize_(module, config)
    weight = module[0].weight
    codes, scale, zero = (t.double().view(N, -1, 1) for t in (weight.qdata, weight.scale, weight.zero_point))
    dense = (codes.view(N, scale.shape[1], -1) - zero) * scale
    rewritten(module, dense.view(N, K), bias=module[0].bias)


def test_torchao_dequantize_affine() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")

    def weight(m: Any) -> Tensor:
        return primitives.dequantize_affine(m.q, (1, GROUP), m.s, m.z, torch.uint8, 0, 15, output_dtype=torch.bfloat16)

    q = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    z = torch.randint(0, 16, (N, K // GROUP), dtype=torch.int32)
    s = torch.rand(N, K // GROUP).to(torch.bfloat16)
    dense = (q.view(N, -1, GROUP).double() - z.unsqueeze(-1)) * s.double().unsqueeze(-1)
    rewritten(Computed(weight, q=q, s=s, z=z), dense.view(N, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quanto(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight is a tensor subclass, and its unpacking an operator of its own."""
    quanto = pytest.importorskip("optimum.quanto")
    # Its C++, which takes a minute to build on first use, does this.
    unpack = types.SimpleNamespace(unpack=lambda packed, bits: torch.cat((packed & 15, packed >> 4)))
    monkeypatch.setattr(quanto.library.extensions.get_extension("quanto_cpp"), "_lib", unpack)
    module = nn.Sequential(nn.Linear(K, N, bias=False)).to(dtype)
    quanto.quantize(module, weights=quanto.qint4)
    quanto.freeze(module)
    weight = module[0].weight
    codes, scale, shift = weight._data, weight._scale.double(), weight._shift.double()
    dense = scale * codes.unpack().view(scale.shape[0], -1).double() - shift
    with torch.no_grad():  # its frozen weight still asks for a gradient
        rewritten(module, dense.view(N, K), dtype)


def test_pt2e() -> None:
    pytest.importorskip("torch.ao.quantization.fx._decomposed")

    def weight(m: Any) -> Tensor:
        return torch.ops.quantized_decomposed.dequantize_per_channel_group(
            m.q, m.s, m.z, -8, 7, torch.int8, GROUP, torch.bfloat16
        )

    q = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    z = torch.randint(-8, 8, (N, K // GROUP), dtype=torch.int8)
    s = torch.rand(N, K // GROUP)
    dense = (q.view(N, -1, GROUP).double() - z.unsqueeze(-1)) * s.double().unsqueeze(-1)
    rewritten(Computed(weight, q=q, s=s, z=z), dense.view(N, K))


class AtenInt4(nn.Module):
    """PyTorch's own int4 matmul on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scales_and_zeros", torch.rand(K // GROUP, N, 2).to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.scales_and_zeros)


def test_aten_int4pack_is_fused_already() -> None:
    left_alone(AtenInt4(), "lready fused")
