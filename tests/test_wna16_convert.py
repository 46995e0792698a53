"""Checkpoints of experts in the layouts of the field's kernels, there and back, through the oracle."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, same, values, weight
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext.layouts import Experts, adjust, awq, gptq
from inductor_ext.oracle import convert
from inductor_ext.oracle.checkpoint import Checkpoint, checkpoint_of
from inductor_ext.oracle.quant_config import make_wna16_moe_quant_config
from inductor_ext.oracle.wna16 import WNA16MoEBackend, backend_to_kernel_cls

few = settings(max_examples=2, deadline=None, derandomize=True)
groups = st.sampled_from([32, 64, 128, "channel"])
numbers = st.sampled_from([1, 4, 16])
seeds = st.integers(0, 1 << 30)
GPTQ, GPTQ_V2 = Checkpoint("gptq", convention=gptq.LESS_ONE), Checkpoint("gptq")


def int8(kind: str, E: int, N: int, K: int, G: int, seed: int, most: int = 256) -> Experts:
    """As ``weight``, with codes of 8 bits."""
    w = weight(kind, E, N, 8 * K, 8 * G, seed)
    zeros = None
    if w.zeros is not None:
        zeros = torch.randint(1, most + 1, w.zeros.shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    order = None if w.order is None else w.order.argsort()[:, :K].argsort().int()
    return Experts(w.codes.view(torch.uint8)[..., :K].contiguous(), w.scales, zeros, order, w.bias)


def stored(w: Experts, how: Checkpoint) -> Any:
    return awq.pack(w) if how.method == "awq" else gptq.pack(w, how.convention)


def arguments(w13: Any, w2: Any) -> dict[str, Tensor | None]:
    """Of the field's function."""
    given = {}
    for name, one in (("w13", w13), ("w2", w2)):
        given |= {name: one.qweight, f"{name}_scale": one.scales, f"{name}_bias": one.bias}
        given |= {f"{name}_qzeros": one.qzeros, f"{name}_g_idx": getattr(one, "g_idx", None)}
    return given


# -- checkpoints -------------------------------------------------------------------------------------------------------


def read(words: Tensor, at: int, width: int, axis: int) -> Tensor:
    """Of words [E, a, b] the codes at this index along a (1) or b (2), bits from the low end up."""
    per = 32 // width
    return (words.select(axis, at // per) >> (width * (at % per))) & ((1 << width) - 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_gptq_is_read_position_by_position(kind: str, bits: int) -> None:
    w = weight(kind, 2, 16, 64, 32, 3) if bits == 4 else int8(kind, 2, 16, 64, 32, 3)
    s = gptq.pack(w)
    group = torch.arange(64).expand(2, 64) // 32 if s.g_idx is None else s.g_idx.long()
    each = torch.arange(2)
    for k in range(64):
        q = read(s.qweight, k, bits, 1).double()
        if s.qzeros is None:
            z = torch.full_like(q, 1 << bits - 1)
        else:
            rows = torch.stack([read(s.qzeros, n, bits, 2) for n in range(16)], 2)
            z = rows[each, group[:, k]].double() + 1
        value = (q - z) * s.scales[each, group[:, k]].double()
        assert torch.equal(values(w)[:, :, k], value)


def test_awq_is_read_position_by_position() -> None:
    w = weight("asymmetric", 2, 16, 64, 32, 3)
    s = awq.pack(w)
    place = (0, 4, 1, 5, 2, 6, 3, 7)  # of column n % 8 in its word
    for n in range(16):
        nibble = 8 * (n // 8) + place[n % 8]
        q, z = read(s.qweight, nibble, 4, 2).double(), read(s.qzeros, nibble, 4, 2).double()
        scale = s.scales[:, :, n].double().repeat_interleave(32, 1)
        assert torch.equal(values(w)[:, n], (q - z.repeat_interleave(32, 1)) * scale)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("convention", [gptq.STORED, gptq.LESS_ONE])
@pytest.mark.parametrize("kind", KINDS)
def test_gptq_there_and_back(kind: str, convention: str, bits: int) -> None:
    @few
    @given(E=numbers, G=groups, seed=seeds)
    def check(E: int, G: int | str, seed: int) -> None:
        size = 256 if G == "channel" else int(G)
        w = weight(kind, E, 16, 256, size, seed) if bits == 4 else int8(kind, E, 16, 256, size, seed, 255)
        s = gptq.pack(w, convention)
        back = gptq.unpack(s, bits, convention)
        assert torch.equal(values(back), values(w))
        if kind != "act-order":
            same(back, w)
        if G == "channel":  # all columns are of one group, whatever their order
            s = s._replace(g_idx=None)
        for a, b in zip(gptq.pack(back, convention), s, strict=True):  # the checkpoint's own bits
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))

    check()


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "bias"])
def test_awq_there_and_back(kind: str) -> None:
    @few
    @given(E=numbers, G=groups, seed=seeds)
    def check(E: int, G: int | str, seed: int) -> None:
        w = weight(kind, E, 16, 256, 256 if G == "channel" else int(G), seed)
        same(awq.unpack(awq.pack(w)), w)

    check()


def test_compressed_tensors_bytes_are_the_canonical_form() -> None:
    """Its words [N, K/4] seen as bytes; loaders give them transposed."""
    w = int8("symmetric", 1, 8, 64, 32, 0)
    assert torch.equal(gptq.pack(w).qweight[0].t().contiguous().view(torch.uint8), w.codes[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(2, 8, 16)}, r"qweight must be int32"),
        ({"scales": torch.ones(2, 2, 15)}, r"scales must be \[2, K/G, 16\]"),
        ({"qzeros": torch.zeros(2, 2, 3, dtype=torch.int32)}, r"qzeros must be int32 \[2, 2, 2\], not \[2, 2, 3\]"),
        ({"qzeros": torch.zeros(2, 2, 2)}, r"qzeros must be int32"),
        ({"g_idx": torch.zeros(2, 63)}, r"g_idx must be \[2, 64\]"),
        ({"g_idx": torch.zeros(2, 64).int()}, r"g_idx must be every group 0..1, 32 times"),
    ],
)
def test_a_tensor_that_is_not_as_it_must_be(change: dict[str, Tensor], message: str) -> None:
    s = gptq.pack(weight("symmetric", 2, 16, 64, 32, 0))
    with pytest.raises(ValueError, match=message):
        gptq.unpack(s._replace(**change))


def test_configurations_of_the_field() -> None:
    of = lambda **attributes: checkpoint_of(SimpleNamespace(**attributes))  # noqa: E731
    assert of(weight_bits=4, zero_point=True) == Checkpoint("awq")
    first = of(weight_bits=4, desc_act=True, checkpoint_format="gptq")
    assert first == Checkpoint("gptq", 4, gptq.LESS_ONE, True)
    assert of(weight_bits=8, desc_act=False, checkpoint_format="gptq_v2") == Checkpoint("gptq", 8)
    assert of(num_bits=4, actorder=None) == Checkpoint("compressed-tensors")
    assert of(num_bits=8, actorder=SimpleNamespace(value="group")).desc_act
    for order in ("group", "dynamic", True, SimpleNamespace(value="dynamic")):
        assert of(num_bits=4, actorder=order).desc_act
    for order in ("weight", "static", False, SimpleNamespace(value="weight")):
        assert not of(num_bits=4, actorder=order).desc_act
    with pytest.raises(ValueError, match="it is 'rows'"):
        of(num_bits=4, actorder="rows")
    with pytest.raises(TypeError, match="quant_config must be a Checkpoint"):
        of(bits=4)
    with pytest.raises(ValueError, match="method must be gptq, awq or"):
        Checkpoint("gguf")
    with pytest.raises(ValueError, match="bits must be 4, or 8 but for AWQ"):
        Checkpoint("awq", 8)


# -- kernels' layouts --------------------------------------------------------------------------------------------------

NO_PLACE = {
    "RDNA3": ("act-order", "bias"),
    "RDNA3_WMMA": ("asymmetric", "act-order", "bias"),
    "TRITON": ("act-order", "bias"),
    "FLASHINFER_TRTLLM": ("asymmetric", "act-order", "bias"),
    "XPU": ("asymmetric", "act-order"),
}
"""Of a backend's layout, by kinds of weights."""


@pytest.mark.parametrize("how", [GPTQ, GPTQ_V2, Checkpoint("awq")], ids=["gptq", "v2, compressed-tensors", "awq"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", convert.LAYOUTS)
def test_every_checkpoint_there_and_back(backend: str, kind: str, how: Checkpoint) -> None:
    if how.method == "awq" and kind == "act-order":
        pytest.skip("AWQ has no act-order")
    how = dataclasses.replace(how, desc_act=kind == "act-order")
    member = WNA16MoEBackend(backend)

    @few
    @given(E=numbers, G=groups, I=st.sampled_from([128, 256]), seed=seeds)
    def check(E: int, G: int | str, I: int, seed: int) -> None:  # noqa: E741
        w13 = weight(kind, E, 2 * I, 256, 256 if G == "channel" else int(G), seed)
        w2 = weight(kind, E, 256, I, I if G == "channel" else int(G), seed + 1)
        given_tensors = arguments(stored(w13, how), stored(w2, how))

        def call() -> convert.Converted:
            return convert.convert_to_wna16_moe_kernel_format(member, None, how, None, **given_tensors)

        if kind in NO_PLACE.get(backend, ()):
            with pytest.raises(ValueError, match=r"^(zeros|order|bias) must be"):
                call()
            return
        # A kernel gets the weight in tiles and groups of its own, with the same values.
        fit13, fit2 = convert.fitted(member, *(convert_to_canonical(w, how) for w in (w13, w2)))
        back13, back2 = convert.recovered(member, call(), fit13, fit2)
        same(back13, fit13)
        same(back2, fit2)
        whole = values(back13).unflatten(1, (2, -1))  # gates, ups
        assert torch.equal(whole[:, :, :I].flatten(1, 2), values(w13)) and torch.count_nonzero(whole[:, :, I:]) == 0
        assert torch.equal(values(back2)[:, :, :I], values(w2)) and torch.count_nonzero(values(back2)[:, :, I:]) == 0

    check()


def convert_to_canonical(w: Experts, how: Checkpoint) -> Experts:
    s = stored(w, how)
    return how.experts(s.qweight, s.scales, getattr(s, "g_idx", None), s.qzeros, s.bias)


@pytest.mark.parametrize("backend", ["TRITON", "CPU", "EMULATION"])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_there_and_back(backend: str, kind: str) -> None:
    member, how = WNA16MoEBackend(backend), Checkpoint("gptq", 8, desc_act=kind == "act-order")

    @few
    @given(E=numbers, G=st.sampled_from([32, 64, 128]), seed=seeds)
    def check(E: int, G: int, seed: int) -> None:
        w13, w2 = (int8(kind, E, n, k, G, seed + n, 255) for n, k in ((256, 256), (256, 128)))
        given_tensors = arguments(stored(w13, how), stored(w2, how))
        call = lambda: convert.convert_to_wna16_moe_kernel_format(  # noqa: E731
            member, None, how, torch.float32, **given_tensors
        )
        if backend == "TRITON" and kind != "symmetric":
            with pytest.raises(ValueError, match=r"^(zeros|order|bias) must be None"):
                call()
            return
        canonical = [convert_to_canonical(w, how) for w in (w13, w2)]
        for back, own, w in zip(convert.recovered(member, call(), *canonical), canonical, (w13, w2), strict=True):
            same(back, own)
            assert torch.equal(values(back), values(w))

    check()


def test_awq_without_zeros_is_no_checkpoint_of_awq() -> None:
    w = weight("symmetric", 1, 64, 64, 32, 0)
    given_tensors = arguments(awq.pack(w), awq.pack(w)) | {"w2_qzeros": None}
    with pytest.raises(ValueError, match="qzeros must be given: AWQ's checkpoints have zeros"):
        convert.convert_to_wna16_moe_kernel_format(
            WNA16MoEBackend.EMULATION, None, Checkpoint("awq"), None, **given_tensors
        )
    ordered = arguments(gptq.pack(w), gptq.pack(w))
    with pytest.raises(ValueError, match="g_idx must be given: the checkpoint is in act-order"):
        convert.convert_to_wna16_moe_kernel_format(
            WNA16MoEBackend.EMULATION, None, dataclasses.replace(GPTQ, desc_act=True), None, **ordered
        )


@pytest.mark.parametrize("backend", ["RDNA3", "RDNA3_WMMA", "MARLIN", "FLASHINFER_TRTLLM", "XPU"])
def test_layouts_of_four_bits_refuse_eight(backend: str) -> None:
    w13, w2 = int8("symmetric", 1, 256, 256, 32, 0), int8("symmetric", 1, 256, 128, 32, 0)
    with pytest.raises(ValueError, match="codes must be of 4 bits, not of 8"):
        convert.converted(WNA16MoEBackend(backend), w13, w2)


def test_aiter_has_no_layout_for_integers() -> None:
    w = weight("symmetric", 1, 64, 64, 32, 0)
    with pytest.raises(ValueError, match=r"backend must be one of RDNA3, .* for integer weights, not AITER_W4A8"):
        convert.converted(WNA16MoEBackend.AITER_W4A8, w, w)


def test_the_result_is_the_field_s_tuple() -> None:
    w13, w2 = weight("bias", 2, 256, 128, 32, 0), weight("bias", 2, 128, 128, 32, 1)
    result = convert.converted(WNA16MoEBackend.MARLIN, w13, w2)
    assert len(result) == 14
    assert result[0].shape == (2, 8, 512) and result[1].shape == (2, 8, 256)  # w13, w2
    assert result[2].shape == (2, 4, 256) and result[3].shape == (2, 4, 128)  # scales
    assert [t.shape for t in result[4:8]] == [(2, 0)] * 4  # g_idx, sort_indices
    assert result[8:12] == (None,) * 4  # zeros, global scales
    assert result[12].shape == (2, 256) and result[13].shape == (2, 128)  # biases


# -- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["TRITON", "MARLIN", "RDNA3", "EMULATION"])
def test_ranks_have_their_shares_in_the_kernel_s_layout(backend: str) -> None:
    """768 in groups of 128 among 8 ranks: 96 each, so that groups are cut to 32 and Marlin's tiles are filled up."""
    member = WNA16MoEBackend(backend)
    w13, w2 = weight("asymmetric", 2, 1536, 128, 128, 0), weight("asymmetric", 2, 64, 768, 128, 1)
    gates, ups, downs = [], [], []
    for rank in range(8):
        mine = convert.shared(w13, w2, rank, 8)
        assert mine[1].group_size == 32 and mine[1].K == 96
        fit13, fit2 = convert.fitted(member, *mine)
        back13, back2 = convert.recovered(member, convert.converted(member, *mine), fit13, fit2)
        gate, up = values(back13).chunk(2, 1)
        down = values(back2)
        for added in (gate[:, 96:], up[:, 96:], down[:, :, 96:]):
            assert torch.count_nonzero(added) == 0
        assert (gate.shape[1] > 96) == (backend == "MARLIN")
        gates, ups, downs = [*gates, gate[:, :96]], [*ups, up[:, :96]], [*downs, down[:, :, :96]]
    assert torch.equal(torch.cat([*gates, *ups], 1), values(w13))
    assert torch.equal(torch.cat(downs, 2), values(w2))


def test_a_rank_converts_its_share_of_a_checkpoint() -> None:
    """Tensor and expert parallelism at once: three of four experts, and the second half of the intermediate size."""
    w13, w2 = weight("asymmetric", 4, 512, 128, 128, 0), weight("asymmetric", 4, 64, 256, 128, 1)
    expert_map = torch.tensor([2, -1, 0, 1]).int()
    member = WNA16MoEBackend.RDNA3
    result = convert.convert_to_wna16_moe_kernel_format(
        member,
        None,
        GPTQ,
        None,
        **arguments(gptq.pack(w13), gptq.pack(w2)),
        tp_rank=1,
        tp_size=2,
        expert_map=expert_map,
    )
    mine13, mine2 = convert.recovered(member, result, w13, w2)
    gates, ups = values(w13)[[2, 3, 0]].chunk(2, 1)
    assert torch.equal(values(mine13), torch.cat([gates[:, 128:], ups[:, 128:]], 1))
    assert torch.equal(values(mine2), values(w2)[[2, 3, 0]][:, :, 128:])


def test_a_rank_has_its_own_experts() -> None:
    w13, w2 = weight("asymmetric", 5, 128, 64, 32, 0), weight("bias", 5, 64, 64, 32, 1)
    mine = convert.shared(w13, w2, expert_map=torch.tensor([-1, 2, -1, 0, 1]).int())
    for w, part in ((w13, mine[0]), (w2, mine[1])):
        assert torch.equal(values(part), values(w)[[3, 4, 1]])
    assert torch.equal(mine[1].bias, w2.bias[[3, 4, 1]])
    for wrong in ([-1, -1], [0, 2], [0, 0]):
        with pytest.raises(ValueError, match="expert_map must be"):
            adjust.local(weight("symmetric", 2, 8, 32, 32, 0), torch.tensor(wrong))


@pytest.mark.parametrize("backend", [WNA16MoEBackend.CPU, WNA16MoEBackend.EMULATION])
def test_our_kernels_take_the_same_weights(backend: WNA16MoEBackend) -> None:
    """What the op computes with the packed form is the product with the dequantised weights."""
    (kernel,) = backend_to_kernel_cls(backend)
    if (reason := kernel.usable()) is not None:
        pytest.skip(reason)
    E, H, I = 4, 64, 128  # noqa: E741
    how = Checkpoint("awq")
    w13, w2 = (
        convert_to_canonical(weight("asymmetric", E, n, k, 32, n, torch.float32), how) for n, k in ((2 * I, H), (H, I))
    )
    tensors = [t for w in (w13, w2) for t in (*convert.packed_for(kernel, w, w is w13)[:3], None)]
    x, weights, ids = torch.randn(3, H), torch.rand(3, 2), torch.tensor([[0, 1], [2, 3], [3, 1]])
    y = torch.ops.w4a16.moe(x, weights, ids, *tensors, None, I, 32, 32, kernel=kernel.NAME)
    a, b = values(w13)[ids], values(w2)[ids]
    gate, up = torch.einsum("th,tknh->tkn", x.double(), a).chunk(2, -1)
    each = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, b)
    torch.testing.assert_close(y.double(), (weights.double()[..., None] * each).sum(1), rtol=1e-4, atol=1e-2)


def test_the_field_s_quantisation_config() -> None:
    w = convert.converted(
        WNA16MoEBackend.TRITON, weight("asymmetric", 2, 128, 64, 32, 0), weight("asymmetric", 2, 64, 64, 32, 1)
    )
    given = {"w1_scale": w.w13_scales, "w2_scale": w.w2_scales, "w1_zp": w.w13_qzeros, "w2_zp": w.w2_qzeros}
    config = make_wna16_moe_quant_config(**given, group_size=32, num_bits=4)
    assert (config.weight_dtype, config.block_shape) == ("int4", (0, 32))
    assert config.use_int4_w4a16 and not config.use_int8_w8a16
    assert config.w1_zp is w.w13_qzeros and config.w2_scale is w.w2_scales and config.w1_bias is None
    for change, message in (
        ({"num_bits": 2}, "num_bits must be 4 or 8, not 2"),
        ({"group_size": 0}, "group_size must be positive, or -1"),
        ({"w2_zp": None}, "w1_zp and w2_zp must both be given, or neither"),
    ):
        with pytest.raises(ValueError, match=message):
            make_wna16_moe_quant_config(**{**given, "group_size": 32, "num_bits": 4, **change})
