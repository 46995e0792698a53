"""The kernel "rdna3_wmma" for `w4a16::moe`, which reads the field's layout by row: when it can, its layout, and what it
computes on lanes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hip_lanes
import pytest
import torch
from layouts import same, weight
from moe_problems import MAP, MLPS, Experts, right
from test_hip_experts import KIND, PROBLEM

from inductor_ext import devices, oracle
from inductor_ext.devices import Device
from inductor_ext.kernels import Packed
from inductor_ext.kernels.hip import by_row
from inductor_ext.layouts.experts import parted

SYMMETRIC = replace(PROBLEM, w13=replace(KIND, zeros="none"), w2=replace(KIND, zeros="none"))


@pytest.fixture
def lanes() -> Iterator[hip_lanes.Lanes]:
    with hip_lanes.on("gfx1100") as lanes:
        yield lanes


def test_it_is_there_for_those_who_ask() -> None:
    assert by_row.reject(SYMMETRIC) is None
    assert oracle.choose(SYMMETRIC, elsewhere=True).kernel == "hip"
    assert oracle.choose(SYMMETRIC, "rdna3_wmma", elsewhere=True).kernel == "rdna3_wmma"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"arch": "gfx1200"}, "needs the WMMA of RDNA 3 (gfx11); this is gfx1200"),
        ({"w2": KIND}, "must be symmetric: the layout has no zeros"),
        ({"H": 416, "w13": replace(KIND, zeros="none", group_size=32)}, "N must be a multiple of 64, not 416"),
    ],
)
def test_what_it_cannot_do_is_a_sentence(changed: dict[str, Any], reason: str) -> None:
    assert reason in str(by_row.reject(replace(SYMMETRIC, **changed)))


@pytest.mark.parametrize(("arch", "K", "apart"), [("gfx1100", 2048, 256), ("gfx1151", 2048, 288), ("gfx1151", 256, 32)])
def test_packing_loses_nothing(arch: str, K: int, apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "of", lambda device: Device("cuda", arch))
    w = weight("symmetric", 2, 64, K, 128, 0)
    packed = by_row.pack(w.joined(), 2)
    assert packed.qweight.shape == (2, 64, apart) and packed.qweight.is_contiguous()
    for tensor, told in zip(packed, by_row.layout(packed, 2, 64, K, 128), strict=True):
        assert tensor is None or (tuple(tensor.shape) == told.shape and tensor.dtype in told.dtypes)
    same(parted(by_row.unpack(packed, 64, K, 128), 2), w)


def test_rows_of_too_few_words_are_refused() -> None:
    w = weight("symmetric", 2, 64, 256, 128, 0)
    packed = by_row.pack(w.joined(), 2)
    for columns in (31, 33):
        short = Packed(packed.qweight.new_empty(2, 64, columns), packed.scales, None, None)
        assert by_row.layout(short, 2, 64, 256, 128).qweight.shape == (2, 64, 32)
    with pytest.raises(ValueError, match="zeros must be None"):
        by_row.layout(packed._replace(zeros=packed.scales), 2, 64, 256, 128)


@pytest.mark.parametrize(
    ("mlp", "T", "bias", "apart"),
    [
        ("silu", 3, False, False),
        ("swigluoai interleaved", 40, True, True),
        ("gelu_tanh without a gate", 5, True, False),
        ("weight on the input", 7, False, True),
    ],
)
def test_what_experts_compute(
    lanes: hip_lanes.Lanes, mlp: str, T: int, bias: bool, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = (torch.float16, torch.bfloat16)[T % 2]
    made = Experts(
        E=4, H=256, I=192, G=(64, 96), dtype=dtype, mlp=MLPS[mlp], bias=bias, expert_map=MAP, kernel="rdna3_wmma"
    )
    if apart:  # as on gfx1151, where some rows lie further apart
        for name in ("w13_qweight", "w2_qweight"):
            made.tensors[name] = torch.nn.functional.pad(made.tensors[name], (0, 32), value=-1)
    right(made, *made.routed(T))
    assert {launch.name for launch in lanes.launches()} >= {f"wmma_by_row_{'f16' if T % 2 == 0 else 'bf16'}_64"}
