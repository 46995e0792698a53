"""The proof itself: every rounding order that is known is bit-equal, and one wrong element is enough to refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inductor_ext import prove
from inductor_ext.formats import PackedInt4


def packed(dtype: torch.dtype) -> PackedInt4:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(-(2**31), 2**31 - 1, (16, 8), dtype=torch.int32, generator=random)
    zeros = torch.randint(17, (16, 2), dtype=torch.uint8, generator=random)
    return PackedInt4(codes, torch.randn(16, 2, generator=random).to(dtype), zeros)


def weight(canonical: PackedInt4, order: str, dtype: torch.dtype) -> Tensor:
    return prove._value(canonical, prove.ORDERS[order], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", prove.ORDERS)
def test_known_orders_are_bit_equal(order: str, dtype: torch.dtype) -> None:
    canonical = packed(dtype)
    assert prove._compare(weight(canonical, order, dtype), canonical).startswith("bit-equal")


def test_another_order_is_within_its_bound() -> None:
    canonical = packed(torch.bfloat16)
    exact = canonical.dequantize(torch.float64)
    other = (exact * (1 + 2**-9)).bfloat16()  # half a unit in the last place away, then rounded
    assert prove._compare(other, canonical).startswith("each element within")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrong", ["a code", "a little", "a nan"])
def test_one_wrong_element_refuses(wrong: str, dtype: torch.dtype) -> None:
    canonical = packed(dtype)
    w = weight(canonical, "(q - z) * s", dtype)
    n, k = 3, int(w[3].abs().argmax())
    step = canonical.scales[n, k // 32]
    w[n, k] = {"a code": w[n, k] + step, "a little": w[n, k] * 1.1, "a nan": torch.tensor(torch.nan)}[wrong]
    with pytest.raises(prove.NotProved, match=rf"element \({n}, {k}\)"):
        prove._compare(w, canonical)


def test_nan_scales_are_equal_to_themselves() -> None:
    canonical = packed(torch.float32)
    canonical.scales[2, 1] = torch.nan
    assert prove._compare(weight(canonical, "(q - z) * s", torch.float32), canonical).startswith("bit-equal")
