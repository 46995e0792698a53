"""The CPU kernel for experts in MXFP4, on every instruction set that this machine has, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import rel_l2
from mxfp4_problems import GPT_OSS, SIZES, Mxfp4Experts, exact

from inductor_ext import kernels
from inductor_ext.formats import PackedMxfp4
from inductor_ext.kernels import Mlp, cpu

pytestmark = pytest.mark.skipif(cpu.usable() is not None, reason=str(cpu.usable()))
ISAS = [] if cpu.usable() else torch.ops.w4a16_cpu.usable_isas().split(",")
A8 = (0.02, 0.05)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.ops.w4a16_cpu.set_isa(request.param)
    yield request.param
    torch.ops.w4a16_cpu.set_isa(before)


@pytest.mark.parametrize("scales", [None, A8], ids=["16 bit", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_close_to_float64(isa: str, dtype: torch.dtype, scales: tuple[float, float] | None) -> None:
    """Few tokens an expert and many, whole groups and not, every layout of gates and ups."""
    for (E, H, I), mlp, T in (  # noqa: E741
        ((4, 96, 64), GPT_OSS, 3),
        ((2, 544, 288), GPT_OSS, 70),
        ((2, 500, 250), GPT_OSS, 70),
        ((2, 70, 18), GPT_OSS, 5),
        ((3, 64, 40), Mlp(), 40),
        ((2, 66, 34), Mlp("gelu_tanh", "none"), 50),
    ):
        experts = Mxfp4Experts(E, H, I, dtype, mlp=mlp, input_scales=scales, kernel="cpu")
        exact(experts, *experts.routed(T, min(E, 2)))


@pytest.mark.parametrize("scales", [None, (0.05, 0.5)], ids=["16 bit", "fp8"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_fields_cases(size: tuple[int, ...], scales: tuple[float, float] | None) -> None:
    T, N, H, E, k = size
    E = min(E, 8)  # with more experts the same is done, for more memory
    experts = Mxfp4Experts(E, H, N // 2, torch.bfloat16, input_scales=scales, kernel="cpu")
    given = experts.routed(min(T, 200), k)
    near = exact(experts, *given)
    if scales is not None:
        plain = Mxfp4Experts(E, H, N // 2, torch.bfloat16, kernel="cpu")
        difference = rel_l2(experts(*given), plain(*given))
        print(f"{size}: W4A8 is {near:.1e} from its float64 model, {difference:.1e} from W4A16")
        assert 4e-3 < difference < 0.2


@pytest.mark.parametrize("scales", [None, A8], ids=["16 bit", "fp8"])
def test_the_same_bits_with_any_number_of_threads_and_tokens(isa: str, scales: tuple[float, float] | None) -> None:
    experts = Mxfp4Experts(4, 544, 160, torch.bfloat16, input_scales=scales, kernel="cpu")
    x, weights, ids = experts.routed(90)
    y, threads = experts(x, weights, ids), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(experts(x, weights, ids), y)
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([experts(x[t : t + 1], weights[t : t + 1], ids[t : t + 1]) for t in range(9)])
    assert rel_l2(alone, y[:9]) <= 2e-3


def test_every_byte_of_a_scale_is_its_power_of_two(isa: str) -> None:
    """With positive codes, so that nothing cancels."""
    experts = Mxfp4Experts(1, 256, 32, bias=False, mlp=Mlp("relu", "none"), kernel="cpu")
    codes, scales = experts.weights["w2"]
    codes &= 0x77
    scales[0, :, 0] = torch.arange(256).to(torch.uint8)
    module = kernels.load_mxfp4("cpu")
    packed = module.pack(PackedMxfp4(codes.flatten(0, 1), scales.flatten(0, 1)), 1)
    experts.tensors["w2_qweight"], experts.tensors["w2_scales"] = packed.qweight, packed.scales
    for T in (1, 20):
        x, weights, ids = experts.routed(T, 1)
        y, wanted = experts(x, weights, ids), experts.expected(x, weights, ids).float()
        assert y[:, 255].isnan().all()
        assert torch.equal(y[:, :255].isinf(), wanted[:, :255].isinf())
        finite = wanted[:, :255].isfinite()
        assert torch.allclose(y[:, :255][finite], wanted[:, :255][finite], rtol=1e-5, atol=1e-43)


def test_experts_that_nobody_chose_are_not_read(isa: str) -> None:
    experts = Mxfp4Experts(4, 64, 32, kernel="cpu")
    x, weights, ids = experts.routed(6)
    y = experts(x, weights, ids.clamp(max=2))
    experts.tensors["w13_scales"][3] = 255
    assert torch.equal(experts(x, weights, ids.clamp(max=2)), y)


def test_whole_groups_are_read_as_they_are_stored() -> None:
    codes, scales = (torch.randint(256, shape, dtype=torch.uint8) for shape in ((8, 32), (8, 2)))
    packed = kernels.load_mxfp4("cpu").pack(PackedMxfp4(codes, scales), 2)
    assert packed.qweight.data_ptr() == codes.data_ptr() and packed.scales.data_ptr() == scales.data_ptr()


def test_what_is_rejected() -> None:
    module = kernels.load_mxfp4("cpu")
    weighted = Mlp("swigluoai", "interleaved", apply_router_weight_on_input=True)
    for changes, said in (
        ({"mlp": Mlp(), "I": 36}, "I must be a multiple of 8, not 36"),
        ({"mlp": weighted, "input_scales": A8}, "does not go together with fp8"),
    ):
        reason = module.reject(Mxfp4Experts(**{"kernel": "reference", **changes}).problem())
        assert reason is not None and said in reason
