"""The layout that the Triton kernels read, and the op's door to it. Neither needs triton or a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import ZEROS, activations, dense, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from models import OWED, rel_l2
from torch import Tensor
from torch._subclasses import FakeTensorMode

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Packed
from inductor_ext.kernels.gpu import planes

SCALES = (torch.float16, torch.bfloat16, torch.float32)


@st.composite
def weights(draw: st.DrawFn) -> PackedInt4:
    G = draw(st.sampled_from([32, 64, 128, 256, 384]))
    K = G * draw(st.integers(1, 900 // G))
    if draw(st.booleans()):
        G = K = draw(st.integers(1, 100)) * 8  # one group, of any size
    chosen = draw(st.sampled_from(ZEROS)), draw(st.sampled_from(SCALES)), draw(st.booleans())
    return weight(draw(st.integers(1, 150)), K, G, *chosen, seed=draw(st.integers(0, 99)), device="cpu")


@settings(deadline=None, max_examples=60)
@given(weights())
def test_a_weight_comes_back_as_it_was(w: PackedInt4) -> None:
    back = planes.unpack(planes.pack(w), w.N, w.K, w.group_size)
    for name in ("codes", "scales", "zeros", "order"):
        was, now = getattr(w, name), getattr(back, name)
        assert (was is None) == (now is None)
        assert was is None or (torch.equal(was, now) and was.dtype == now.dtype), name


@settings(deadline=None, max_examples=60)
@given(weights())
def test_the_op_takes_what_pack_gives(w: PackedInt4) -> None:
    packed = planes.pack(w)
    for t, wanted in zip(packed, planes.layout(packed, w.N, w.K, w.group_size), strict=True):
        assert t is None or (tuple(t.shape) == wanted.shape and t.dtype in wanted.dtypes and t.is_contiguous())


@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
def test_everything_is_where_the_layout_says(scale_dtype: torch.dtype) -> None:
    N, K, G = 70, 320, 64
    w = weight(N, K, G, "float", scale_dtype, order=True, device="cpu")
    packed = planes.pack(w)
    assert packed.qweight.shape == (2, 2, 4096)
    codes = w.stored_codes()
    for n in range(N):
        for k in range(0, K, 7):
            nibble, word = k % 256 // 64, k % 64
            place = word // 32 * 2048 + n % 64 * 32 + word % 32
            assert packed.qweight[n // 64, k // 256, place] >> 4 * nibble & 15 == codes[n, k]
    assert w.zeros is not None and packed.zeros is not None
    for wanted, values in ((w.scales, packed.scales), (w.zeros, packed.zeros)):
        for g in range(K // G):
            row = values[g] if scale_dtype == torch.float32 else values[g // 2, :, g % 2]
            assert torch.equal(row[:N], wanted[:, g])
    assert w.order is not None and packed.order is not None
    assert torch.equal(packed.order[w.order.long()], torch.arange(K).int())


def test_what_fills_up_is_zero() -> None:
    packed = planes.pack(PackedInt4(torch.full((1, 8), -1).int(), torch.ones(1, 1).half(), torch.ones(1, 1).byte()))
    assert (packed.qweight != 0).sum() == 64  # 64 columns: the lowest nibble of each word of row 0
    assert packed.scales.sum() == 1
    assert packed.zeros is not None and packed.zeros.sum() == 1


# -- the door ----------------------------------------------------------------------------------------------------------

M, N, K, G = 3, 70, 320, 64
PACKED = planes.pack(weight(N, K, G, "int", order=True, device="cpu"))
assert PACKED.zeros is not None and PACKED.order is not None
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "codes as stored": (
        {"qweight": torch.zeros(N, K // 8, dtype=torch.int32)},
        "qweight must be int16, it is torch.int32",
    ),
    "tiles": ({"qweight": PACKED.qweight[:1]}, r"qweight must be \[2, 2, 4096\] .*, it is int16 \[1, 2, 4096\]"),
    "flat tiles": (
        {"qweight": PACKED.qweight.flatten(1)},
        r"qweight must be \[2, 2, 4096\] .*, it is int16 \[2, 8192\]",
    ),
    "strides": ({"qweight": PACKED.qweight.mT.contiguous().mT}, "qweight must be contiguous, it has strides"),
    "integer scales": ({"scales": PACKED.scales.int()}, "scales must be float16 or bfloat16 or float32, it is"),
    "scales as stored": ({"scales": torch.ones(N, 5).half()}, r"scales must be \[4, 128, 2\] .* float16 \[70, 5\]"),
    "pairs of float32": ({"scales": PACKED.scales.float()}, r"scales must be \[8, 128\] .* float32 \[4, 128, 2\]"),
    "bytes": ({"zeros": PACKED.zeros.byte()}, "zeros must be int16 or float16 or bfloat16 or float32, it is"),
    "zeros": ({"zeros": PACKED.zeros[:2]}, r"zeros must be \[4, 128, 2\] .*, it is int16 \[2, 128, 2\]"),
    "long order": ({"order": PACKED.order.long()}, "order must be int32, it is torch.int64"),
    "order": ({"order": PACKED.order[:-1]}, r"order must be \[320\] .*, it is int32 \[319\]"),
    "another device": ({"order": PACKED.order.to("meta")}, "order is on meta, the activations are on cpu"),
    "bias": ({"bias": torch.zeros(N)}, "bias must be float16, it is torch.float32"),
    "rows of the weight": ({"out_features": 130}, r"qweight must be \[3, 2, 4096\] .*, it is int16 \[2, 2, 4096\]"),
    "group": (
        {"group_size": 40},
        "The group size must be K=320, or divide it and be .* of 128; it is 40",
    ),
    "no divisor": ({"group_size": 128}, "group_size 128 does not divide K=320"),
}


def arguments(packed: Packed, x: Tensor) -> dict[str, Any]:
    return {"x": x, **packed._asdict(), "bias": None, "out_features": N, "group_size": G, "kernel": "triton"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    change, message = MISTAKES[name]
    right = arguments(PACKED, torch.zeros(M, K).half())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.ops.w4a16.linear(**right).shape == (M, N)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.w4a16.linear(**right | change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.w4a16.linear(**right | change)


@pytest.mark.parametrize("zeros", ZEROS)
def test_the_gradient_reads_the_layout(zeros: str) -> None:
    w = weight(N, K, G, zeros, order=True, device="cpu")
    grad = activations(M, N, torch.float16, device="cpu")
    y = torch.ops.w4a16.linear_grad_x(grad, *planes.pack(w), K, G, "triton")
    assert rel_l2(y, grad.double() @ dense(w)) <= OWED[torch.float16]
