"""`torch.ops.w4a16.moe_mxfp4` and `moe_gemm_a8w4` by themselves: right, deterministic and well-behaved under PyTorch's
own checks."""

from __future__ import annotations

import pytest
import torch
from models import rel_l2
from moe_problems import DTYPES, MAP, OWED
from mxfp4_problems import GPT_OSS, KERNELS, Mxfp4Experts, e4m3, exact
from torch import Tensor

from inductor_ext import fp8, kernels
from inductor_ext.formats import PackedMxfp4
from inductor_ext.kernels import Mlp

A8 = (0.02, 0.05)
"""Input scales with which some activations saturate and some are subnormal."""
ACTIVATIONS = pytest.mark.parametrize("scales", [None, A8], ids=["16 bit", "fp8"])


@ACTIVATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ops_are_as_exact_as_their_dtype_allows(
    kernel: str, dtype: torch.dtype, scales: tuple[float, float] | None
) -> None:
    for mlp, bias, T in ((GPT_OSS, True, 1), (GPT_OSS, False, 9), (Mlp(), True, 70)):
        experts = Mxfp4Experts(dtype=dtype, bias=bias, mlp=mlp, input_scales=scales, kernel=kernel)
        exact(experts, *experts.routed(T))


@ACTIVATIONS
@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_that_are_no_whole_groups(kernel: str, scales: tuple[float, float] | None) -> None:
    for E, H, I in ((1, 2, 2), (3, 34, 30), (2, 500, 250), (2, 70, 352)):  # noqa: E741
        experts = Mxfp4Experts(E, H, I, torch.bfloat16, input_scales=scales, kernel=kernel)
        for T in (1, 40):
            exact(experts, *experts.routed(T, 1))


@ACTIVATIONS
@pytest.mark.parametrize("kernel", KERNELS)
def test_choices_of_nobody_contribute_nothing(kernel: str, scales: tuple[float, float] | None) -> None:
    experts = Mxfp4Experts(expert_map=MAP, input_scales=scales, kernel=kernel)
    x, weights, ids = experts.routed(9)
    ids[0, 0] = -1
    weights[0, 0] = torch.nan
    ids[1] = torch.tensor([1, -1])
    y = experts(x, weights, ids)
    assert not y[1].any() and y[0].isfinite().all()
    weights[0, 0] = 0.5
    exact(experts, x, weights, ids)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_weight_on_the_input_is_there_before_fp8(kernel: str) -> None:
    mlp = Mlp("swigluoai", "interleaved", limit=7.0, apply_router_weight_on_input=True, routed_scaling=2.5)
    for scales in (None, A8):
        experts = Mxfp4Experts(mlp=mlp, input_scales=scales, kernel=kernel)
        exact(experts, *experts.routed(20))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_scale_means_what_the_format_says(kernel: str) -> None:
    """Bytes 0 (2^-127, which is subnormal), 1, 126..128, and 255, which is NaN, in one expert's rows."""
    experts = Mxfp4Experts(2, 64, 32, bias=False, mlp=Mlp("relu", "none"), kernel=kernel)
    bytes_ = torch.tensor([0, 1, 126, 127, 128, 255], dtype=torch.uint8)
    codes, scales = experts.weights["w2"]
    scales[0, :6, 0] = bytes_
    module = kernels.load_mxfp4(kernel)
    packed = module.pack(PackedMxfp4(codes.flatten(0, 1), scales.flatten(0, 1)), 2)
    experts.tensors["w2_qweight"], experts.tensors["w2_scales"] = packed.qweight, packed.scales
    x, weights, ids = experts.routed(3)
    ids, weights = torch.tensor([[0], [1], [0]]), weights[:, :1]
    y, h = experts(x, weights, ids), torch.relu(x.double() @ experts.dense("w13", 0).t())
    wanted = weights.double() * (h @ experts.dense("w2", 0).t())
    assert y[[0, 2], 5].isnan().all() and y[:, :5].isfinite().all() and y[1].isfinite().all()
    for n in range(5):
        tiny = 2.0**-149 * 64  # of one group's sum, where the result is subnormal
        assert torch.allclose(y[[0, 2], n].double(), wanted[[0, 2], n], rtol=1e-4, atol=tiny)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packing_loses_nothing(kernel: str) -> None:
    module = kernels.load_mxfp4(kernel)
    for N, K in ((6, 64), (10, 500), (2, 2)):
        codes = torch.randint(256, (3 * N, K // 2), dtype=torch.uint8)
        scales = torch.randint(256, (3 * N, -(-K // 32)), dtype=torch.uint8)
        back = module.unpack(module.pack(PackedMxfp4(codes, scales), 3), N, K, 32)
        assert torch.equal(back.codes, codes) and torch.equal(back.scales, scales)


# -- fp8 ---------------------------------------------------------------------------------------------------------------


def test_fp8_saturates_and_keeps_nan() -> None:
    x = torch.tensor(
        [0.0, -0.0, 1.0, 448.0, 449.0, -1e30, torch.inf, -torch.inf, torch.nan, 2**-10, 1.5 * 2**-9, 465.0]
    )
    for dtype in DTYPES:
        found = fp8.to_fp8(x.to(dtype), torch.tensor(1.0)).float()
        wanted = torch.tensor([0.0, 0.0, 1, 448, 448, -448, 448, -448, torch.nan, 0, 2**-8, 448])
        assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7)), dtype


def test_fp8_rounds_to_the_nearest_and_ties_to_even() -> None:
    x = torch.cat((torch.randn(20_000) * 100, torch.randn(20_000) * 0.01, (torch.arange(9000) - 4500) / 1024))
    assert torch.equal(fp8.to_fp8(x, torch.tensor(1.0)).double(), e4m3(x.double()))


def test_a_device_with_its_own_fp8_is_given_the_same_values() -> None:
    x = torch.cat((torch.randn(5000) * 200, torch.tensor([0.0, -0.0, -1e-9, 1e9, -1e9, torch.nan, -torch.nan])))
    scale = torch.tensor(0.3)
    for arch, dtype in (("gfx942", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn)):
        values, own = fp8.to_native_fp8(x, scale, arch)
        assert values.dtype == dtype == fp8.native_dtype(arch)
        wanted = fp8.to_fp8(x, scale).double() * scale.double()
        assert torch.equal((values.double() * own.double()).nan_to_num(-7), wanted.nan_to_num(-7))


# -- the ops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ops_pass_pytorchs_own_checks(kernel: str) -> None:
    for scales in (None, A8):
        experts = Mxfp4Experts(2, 36, 32, torch.float32, input_scales=scales, kernel=kernel)
        tensors, settings = experts.arguments()
        x, weights, ids = experts.routed(3)
        op = torch.ops.w4a16.moe_mxfp4.default if scales is None else torch.ops.w4a16.moe_gemm_a8w4.default
        x.requires_grad_(scales is None)
        torch.library.opcheck(op, (x, weights, ids, *tensors), settings)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_graph_serves_every_number_of_tokens(kernel: str) -> None:
    experts = [Mxfp4Experts(input_scales=scales, kernel=kernel) for scales in (None, A8)]
    (plain, settings), (rounded, _) = (e.arguments() for e in experts)
    graphs = 0

    def count(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return gm.forward

    def both(*routed: Tensor) -> list[Tensor]:
        ops = torch.ops.w4a16
        return [ops.moe_mxfp4(*routed, *plain, **settings), ops.moe_gemm_a8w4(*routed, *rounded, **settings)]

    torch.compiler.reset()
    compiled = torch.compile(both, backend=count, dynamic=True, fullgraph=True)
    for T in (7, 11, 17):  # none of which is a size of the weights
        given = experts[0].routed(T)
        assert all(torch.equal(*pair) for pair in zip(compiled(*given), [e(*given) for e in experts], strict=True))
    assert graphs == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_reach_the_activations_and_the_router(kernel: str) -> None:
    experts = Mxfp4Experts(kernel=kernel)
    x, weights, ids = experts.routed(7)
    grad = experts.drawn(7, experts.H)
    given = [t.detach().clone().requires_grad_() for t in (x, weights)]
    wanted = [t.detach().double().requires_grad_() for t in (x, weights)]
    experts(*given, ids).backward(grad)
    experts.expected(*wanted, ids).backward(grad.double())
    for a, b in zip(given, wanted, strict=True):
        assert rel_l2(a.grad, b.grad) <= OWED[torch.float32]


def test_what_has_no_gradient_says_so() -> None:
    experts = Mxfp4Experts(input_scales=A8)
    x, weights, ids = experts.routed(3)
    with pytest.raises(NotImplementedError, match="rounding to fp8 has none"):
        experts(x.requires_grad_(), weights, ids).sum().backward()
    with pytest.raises(NotImplementedError, match="round_to_fp8 has no derivative"):
        torch.ops.w4a16.round_to_fp8(x, torch.ones(1)).sum().backward()
    experts = Mxfp4Experts()
    experts.tensors["w2_bias"].requires_grad_()
    with pytest.raises(RuntimeError, match="moe_mxfp4 gives no gradient to w2_bias"):
        experts(x, weights, ids)


MISTAKES = {
    "w13_qweight must be uint8": ("w13_qweight", lambda t: t.int()),
    r"w13_scales must be \[4, 128, 3\]": ("w13_scales", lambda t: t[..., :2].contiguous()),
    "w2_scales must be uint8": ("w2_scales", lambda t: t.float()),
    r"w2_qweight must be \[4, 96, 32\]": ("w2_qweight", lambda t: t[:, :95].contiguous()),
    "w2_qweight must be contiguous": ("w2_qweight", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    r"w13_bias must be \[4, 128\]": ("w13_bias", lambda t: t[:, :5].contiguous()),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes_are_named(said: str) -> None:
    name, change = MISTAKES[said]
    experts = Mxfp4Experts()
    experts.tensors[name] = change(experts.tensors[name])
    with pytest.raises(RuntimeError, match=f"w4a16::moe_mxfp4: {said}"):
        experts(*experts.routed(3))


def test_mistakes_in_sizes_and_input_scales_are_named() -> None:
    experts = Mxfp4Experts(I=64)
    experts.I = 63
    with pytest.raises(RuntimeError, match="intermediate_size must be a positive multiple of 2, it is 63"):
        experts(*experts.routed(3))
    experts = Mxfp4Experts(input_scales=A8)
    tensors, settings = experts.arguments()
    tensors[-1] = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"w2_input_scale must be \[\] or \[1\]"):
        torch.ops.w4a16.moe_gemm_a8w4(*experts.routed(3), *tensors, **settings)
    tensors[-1] = torch.ones((), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="w2_input_scale must be float32"):
        torch.ops.w4a16.moe_gemm_a8w4(*experts.routed(3), *tensors, **settings)
