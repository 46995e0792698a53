"""Weights in other people's layouts: there and back, and what stands where, by readers that know nothing of ours."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, by_lanes, of_result, same, values, weight
from torch import Tensor

from inductor_ext.layouts import Experts, emulation, flashinfer, marlin, rdna3, triton, triton_dense, wmma, xpu

few = settings(max_examples=3, deadline=None, derandomize=True)


class Way(NamedTuple):
    pack: Callable[[Experts], Any]
    unpack: Callable[[Any], Experts]
    refuses: tuple[str, ...]
    """Names of what the layout has no place for."""


class Dequantised(NamedTuple):
    dense: Tensor
    rest: Experts


def emulated(w: Experts) -> Dequantised:
    return Dequantised(emulation.pack(w), w)


def coded(d: Dequantised) -> Experts:
    return emulation.unpack(d.dense, d.rest.scales, d.rest.zeros, d.rest.order, d.rest.bias)


WAYS = {
    "marlin": Way(marlin.pack, marlin.unpack, ()),
    "flashinfer w13": Way(
        lambda w: flashinfer.pack(w, True), lambda p: flashinfer.unpack(p, True), ("zeros", "order", "bias")
    ),
    "flashinfer w2": Way(
        lambda w: flashinfer.pack(w, False), lambda p: flashinfer.unpack(p, False), ("zeros", "order", "bias")
    ),
    "triton": Way(triton.pack, triton.unpack, ("order", "bias")),
    "triton dense": Way(triton_dense.pack, triton_dense.unpack, ("order", "bias")),
    "xpu": Way(xpu.pack, xpu.unpack, ("zeros", "order")),
    "rdna3": Way(rdna3.pack, rdna3.unpack, ("order", "bias")),
    "wmma gfx1100": Way(lambda w: wmma.pack(w, "gfx1100"), wmma.unpack, ("zeros", "order", "bias")),
    "wmma gfx1151": Way(lambda w: wmma.pack(w, "gfx1151"), wmma.unpack, ("zeros", "order", "bias")),
    "emulation": Way(emulated, coded, ()),
}
PLACE = {"symmetric": "", "asymmetric": "zeros", "act-order": "order", "bias": "bias"}


@pytest.mark.parametrize("E", [1, 4, 16])
@pytest.mark.parametrize("G", [32, 64, 128, "channel"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_there_and_back(way: str, kind: str, G: int | str, E: int) -> None:
    @few
    @given(N=st.sampled_from([128, 256]), K=st.sampled_from([256, 512]), seed=st.integers(0, 1 << 30))
    def check(N: int, K: int, seed: int) -> None:
        w = weight(kind, E, N, K, K if G == "channel" else G, seed)
        refused = PLACE[kind] if PLACE[kind] in WAYS[way].refuses else None
        if way.startswith("flashinfer") and G != 32 and refused is None:
            refused = "group size"
        if way == "marlin" and kind == "act-order" and G == "channel":
            refused = "order"
        if refused is not None:
            with pytest.raises(ValueError, match=f"^{refused} must be"):
                WAYS[way].pack(w)
            return
        same(WAYS[way].unpack(WAYS[way].pack(w)), w)

    check()


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("emulation", "rdna3")])
def test_a_weight_that_is_changed_is_packed_otherwise(way: str) -> None:
    """Every bit of the codes and each scale is in the layout once."""
    w = weight("symmetric", 2, 128, 256, 32, 0)
    packed = WAYS[way].pack(w)
    bits_of = lambda t: sum(int(b).bit_count() for b in t.contiguous().view(torch.uint8).flatten())  # noqa: E731
    stored = packed.words if way.startswith("wmma") else packed[0]
    assert stored.numel() * stored.element_size() == w.codes.nbytes
    if not way.startswith("flashinfer"):
        assert bits_of(stored) == bits_of(w.codes)
    scales = packed.scales
    assert torch.equal(scales.flatten().sort().values, w.scales.flatten().sort().values)


# -- Marlin ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "G"), [(kind, G) for kind in KINDS[:3] for G in (32, 64, 128) if (kind, G) != ("act-order", 128)]
)
def test_marlin_lanes_find_their_operands(kind: str, G: int) -> None:
    """K = 128. With one group there is no act-order."""
    w = weight(kind, 2, 128, 128, G, 7, torch.float16, (0, 15))
    packed = marlin.pack(w)
    for e in range(2):
        stored = torch.tensor(by_lanes(packed, e), dtype=torch.float64)
        # The kernel takes column sort_indices[p] of the activations for stored column p.
        wanted = values(w)[e]
        if kind == "act-order":
            wanted = wanted[:, packed.sort_indices[e].long()]
            assert torch.equal(packed.g_idx[e], packed.g_idx[e].sort().values)
        assert torch.equal(stored, wanted)


def test_marlin_bias_is_where_lanes_add_it() -> None:
    w = weight("bias", 3, 128, 128, 64, 0)
    packed = marlin.pack(w)
    for stored, bias in zip(packed.bias.tolist(), w.bias.tolist(), strict=True):
        assert of_result(stored) == bias


def test_marlin_has_nothing_where_there_is_nothing() -> None:
    packed = marlin.pack(weight("symmetric", 3, 64, 32, 32, 0))
    assert packed.zeros is None and packed.bias is None
    assert packed.g_idx.shape == packed.sort_indices.shape == (3, 0)
    assert packed.qweight.shape == (3, 2, 128) and packed.scales.shape == (3, 1, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_marlin_fills_up_the_intermediate_size(kind: str) -> None:
    """I = 96 with groups of 32 becomes 128: gates and ups each, and w2's columns."""
    w13, w2 = weight(kind, 2, 192, 128, 32, 0), weight(kind, 2, 64, 96, 32, 1)
    full13, full2 = marlin.filled(w13, w2)
    assert (full13.N, full2.K) == (256, 128)
    whole = values(full13).view(2, 2, 128, 128)
    assert torch.equal(whole[:, :, :96].flatten(1, 2), values(w13))
    assert torch.count_nonzero(whole[:, :, 96:]) == 0
    assert torch.equal(values(full2)[:, :, :96], values(w2))
    assert torch.count_nonzero(values(full2)[:, :, 96:]) == 0
    same(marlin.unpack(marlin.pack(full13)), full13)
    same(marlin.unpack(marlin.pack(full2)), full2)


# -- what stands where in the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_flashinfer_rows_and_nibbles(gated: bool) -> None:
    """Position by position, for a kernel that has rows shuffled for its epilogue, blocks of 128 bytes, scales of 128 x
    4."""
    w = weight("symmetric", 2, 256, 512, 32, 3)
    packed = flashinfer.pack(w, gated)
    codes = torch.stack([w.expert(e).stored_codes() for e in range(2)]).int()
    assert packed.weights.shape == (2, 2, 256, 128) and packed.weights.dtype == torch.uint8
    scales = packed.scales.view(2, -1)
    for row in range(256):
        block, within = row - row % 32, row % 32
        n = block + 4 * (within % 8) + within // 8
        if gated:  # up 0, gate 0, up 1, ...
            n = n // 2 + (128 if n % 2 == 0 else 0)
        for k in range(0, 512, 37):
            byte = packed.weights[:, k // 256, row, k % 256 // 2].int()
            nibble = (byte >> (4 * (k % 2))) & 15
            signed = nibble - 16 * (nibble > 7).int()
            assert torch.equal(signed, codes[:, n, k] - 8)
            group = k // 32
            at = (row // 128 * 4 + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
            assert torch.equal(scales[:, at], w.scales[:, n, group])


def test_bytes_along_k_for_triton_and_xpu() -> None:
    w = weight("asymmetric", 3, 64, 64, 32, 5, zeros=(0, 15))
    codes = torch.stack([w.expert(e).stored_codes() for e in range(3)])
    packed = triton.pack(w)
    for k in range(64):
        assert torch.equal((packed.weights[:, :, k // 2] >> (4 * (k % 2))) & 15, codes[:, :, k])
    for n in range(64):
        assert torch.equal((packed.zeros[:, n // 2] >> (4 * (n % 2))) & 15, w.zeros[:, n])
    plain = dataclasses.replace(w, zeros=None)
    assert torch.equal(xpu.pack(plain).weights, packed.weights)
    assert triton.pack(plain).weights.data_ptr() == w.codes.data_ptr()  # nothing is copied


def test_rdna3_words_and_zero_words() -> None:
    w = weight("asymmetric", 2, 64, 64, 32, 5, zeros=(1, 16))
    codes = torch.stack([w.expert(e).stored_codes() for e in range(2)]).int()
    packed = rdna3.pack(w)
    for k in range(64):
        shift = (0, 16, 4, 20, 8, 24, 12, 28)[k % 8]
        assert torch.equal((packed.qweight[:, k // 8] >> shift) & 15, codes[:, :, k])
    for n in range(64):
        stored = (packed.qzeros[:, :, n // 8] >> (4 * (n % 8))) & 15
        assert torch.equal(stored + 1, w.zeros[:, n].int())
    symmetric = rdna3.pack(dataclasses.replace(w, zeros=None))
    assert (symmetric.qzeros == 0x77777777).all()


@pytest.mark.parametrize(
    ("arch", "K", "apart"), [("gfx1100", 2048, 256), ("gfx1151", 2048, 288), ("gfx1151", 1024, 128)]
)
def test_wmma_rows(arch: str, K: int, apart: int) -> None:
    w = weight("symmetric", 2, 64, K, 128, 5)
    words = wmma.pack(w, arch).words
    assert words.stride() == (64 * apart, apart, 1)
    codes = torch.stack([w.expert(e).stored_codes() for e in range(2)]).int()
    for k in range(0, K, 29):
        shift = (0, 16, 4, 20, 8, 24, 12, 28)[k % 8]
        assert torch.equal((words[:, :, k // 8] >> shift) & 15, codes[:, :, k])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_emulation_rounds_once(kind: str, dtype: torch.dtype) -> None:
    w = weight(kind, 2, 32, 64, 32, 5, torch.float16)
    assert torch.equal(emulation.pack(w, dtype), values(w).to(dtype))


def test_emulation_does_not_make_codes_up() -> None:
    w = weight("symmetric", 1, 8, 32, 32, 0)
    dense = emulation.pack(w)
    with pytest.raises(ValueError, match=r"^dense must be"):
        emulation.unpack(dense, torch.zeros_like(w.scales))
    with pytest.raises(ValueError, match=r"^dense must be"):
        emulation.unpack(dense, w.scales / 8)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_xpu_needs_little_endian(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = xpu.pack(weight("symmetric", 1, 8, 32, 32, 0))
    monkeypatch.setattr(sys, "byteorder", "big")
    for call in (lambda: xpu.pack(weight("symmetric", 1, 8, 32, 32, 0)), lambda: xpu.unpack(packed)):
        with pytest.raises(RuntimeError, match=r"little-endian.*big"):
            call()


def changed(kind: str = "symmetric", N: int = 128, K: int = 256, G: int = 32, **tensors: Any) -> Experts:
    w = weight(kind, 1, N, K, G, 0)
    return dataclasses.replace(w, **{name: make(w) for name, make in tensors.items()})


def zeros_of(value: float, dtype: torch.dtype = torch.uint8) -> Callable[[Experts], Tensor]:
    return lambda w: torch.full_like(w.scales, value, dtype=dtype)


@pytest.mark.parametrize(
    ("way", "make", "message"),
    [
        ("marlin", lambda: changed(zeros=zeros_of(16)), "zeros must be within 0..15, not within 16..16."),
        ("triton", lambda: changed(zeros=zeros_of(16)), "zeros must be within 0..15, not within 16..16."),
        ("rdna3", lambda: changed(zeros=zeros_of(0)), "zeros must be within 1..16, not within 0..0."),
        ("marlin", lambda: changed(zeros=zeros_of(7.5, torch.float16)), "zeros must be integers"),
        ("marlin", lambda: changed(N=96), "N must be a multiple of 64 .*, not 96."),
        ("marlin", lambda: changed(K=40, G=40), "K must be a multiple of 16 .*, not 40."),
        ("marlin", lambda: changed(K=256, G=16), "group size must be 32, 64, 128 or K=256, not 16."),
        ("marlin", lambda: changed(scales=lambda w: w.scales.float()), "scales must be torch.float16 or"),
        ("flashinfer w2", lambda: changed(scales=lambda w: w.scales.half()), "scales must be torch.bfloat16"),
        ("flashinfer w2", lambda: changed(K=128), "K must be a multiple of 256 .*, not 128."),
        ("flashinfer w13", lambda: changed(N=64), "N must be a multiple of 128 .*, not 64."),
        ("triton", lambda: changed("asymmetric", N=7), "N must be even where there are zeros, not 7."),
        ("rdna3", lambda: changed(N=12), "N must be a multiple of 8 .*, not 12."),
        ("rdna3", lambda: changed(G=16), "The group size must be a multiple of 32"),
        ("wmma gfx1100", lambda: changed(N=96), "N must be a multiple of 64 .*, not 96."),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_hold(way: str, make: Callable[[], Experts], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        WAYS[way].pack(make())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"codes": lambda w: w.codes[0]}, "codes must be int32"),
        ({"codes": lambda w: w.codes.long()}, "codes must be int32"),
        ({"scales": lambda w: w.scales[:, :1]}, r"scales must be \[1, 128, K/G\], not \[1, 1, 8\]"),
        ({"scales": lambda w: w.scales.int()}, "scales must be floats"),
        ({"scales": lambda w: w.scales[:, :, :3]}, "scales must be for groups that divide K=256, not for 3 groups"),
        ({"zeros": lambda w: torch.ones(1, 128, 1, dtype=torch.uint8)}, r"zeros must be \[1, 128, 8\]"),
        ({"zeros": lambda w: torch.ones(1, 128, 8, dtype=torch.int32)}, "zeros must be uint8 or floats"),
        ({"order": lambda w: torch.arange(256).int()}, r"order must be int32 \[1, 256\], not \[256\]"),
        ({"order": lambda w: torch.arange(256)[None]}, r"order must be int32 \[1, 256\], not torch.int64"),
        ({"bias": lambda w: torch.ones(128)}, r"bias must be \[1, 128\], not \[128\]"),
    ],
)
def test_what_experts_must_be(tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        changed(**tensors)
