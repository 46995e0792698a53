"""Other people's layouts, packed on a GPU: the same bytes as on the CPU, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from layouts import same, weight
from test_layouts import WAYS
from torch import Tensor

from inductor_ext.layouts import Experts, adjust

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on(device: str, value: Any) -> Any:
    if isinstance(value, Experts):
        fields = {field.name: on(device, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return Experts(**fields)
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "act-order", "bias"])
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_packs_as_a_cpu_does(way: str, kind: str) -> None:
    w = weight(kind, 3, 256, 2048, 32, 0)
    try:
        wanted = WAYS[way].pack(w)
    except ValueError:
        with pytest.raises(ValueError):
            WAYS[way].pack(on("cuda", w))
        return
    packed = WAYS[way].pack(on("cuda", w))
    for name in getattr(wanted, "_fields", None) or [field.name for field in dataclasses.fields(wanted)]:
        a, b = getattr(packed, name), getattr(wanted, name)
        if isinstance(b, Tensor):
            assert a.is_cuda and a.stride() == b.stride() and torch.equal(a.cpu(), b), name
    same(on("cpu", WAYS[way].unpack(packed)), w)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_a_gpu_adjusts_as_a_cpu_does(kind: str) -> None:
    w = weight(kind, 2, 64, 96, 96, 0)
    for change in (
        lambda w: adjust.finer(w, 32),
        lambda w: adjust.filled(w, 128, 128, 2),
        lambda w: adjust.columns(w, 1, 4),
        lambda w: adjust.rows(w, 1, 4, 2),
    ):
        same(on("cpu", change(on("cuda", w))), change(w))
