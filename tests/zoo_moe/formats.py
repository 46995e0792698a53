"""The ways in which experts are stored, each read in the words of the libraries that store them so."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from zoo.base import pack

from zoo_moe.base import Format, Weight

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ: nibble i of a word holds value AWQ_ORDER[i] of its run of 8."""
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where value 0, 1, ... of a run is found."""


def nibbles(packed: Tensor, shifts: Tensor | None = None) -> Tensor:
    """int32 [*, n] -> [*, 8n]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device) if shifts is None else shifts
    return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(-2)


def pairs(packed: Tensor) -> Tensor:
    """uint8 [*, n] -> [*, 2n], low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def scaled(q: Tensor, scales: Tensor, group: int) -> Tensor:
    """[*, N, K], each run of ``group`` with its scale."""
    return (q.to(scales.dtype).unflatten(-1, (-1, group)) * scales.unsqueeze(-1)).flatten(-2)


def scaled_rows(q: Tensor, scales: Tensor, group: int) -> Tensor:
    """[*, K, N], each run of ``group`` rows with its scales [N]."""
    return (q.to(scales.dtype).unflatten(-2, (-1, group)) * scales.unsqueeze(-2)).flatten(-3, -2)


def of_scales(scales: Tensor) -> Tensor:
    return scales.transpose(-2, -1)


Store = Callable[[Weight], dict[str, Tensor]]
Read = Callable[[dict[str, Tensor], int, int], Tensor]


def fmt(
    name: str, store: Store, kn: bool = False, exact: Callable[[Weight], Tensor] = Weight.exact
) -> Callable[[Read], Format]:
    def register(read: Read) -> Format:
        return Format(name, store, read, exact, kn)

    return register


def with_zeros(w: Weight) -> Tensor:
    return w.exact(w.zeros)


@fmt("int32 [E, N, K/8]", lambda w: {"packed": pack(w.codes, -1), "scale": w.scales})
def COMPRESSED_TENSORS(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return scaled(nibbles(t["packed"]) - 8, t["scale"], group)


@fmt(
    "int32 [E, N, K/8], zeros packed along N",
    lambda w: {"packed": pack(w.codes, -1), "scale": w.scales, "zeros": pack(w.zeros, -2)},
    exact=with_zeros,
)
def ASYMMETRIC(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    zeros = ((t["zeros"].unsqueeze(-2) >> shifts.unsqueeze(-1)) & 15).flatten(-3, -2)
    q = nibbles(t["packed"]).unflatten(-1, (-1, group)) - zeros.unsqueeze(-1)
    return (q.to(t["scale"].dtype) * t["scale"].unsqueeze(-1)).flatten(-2)


def gptq(w: Weight) -> dict[str, Tensor]:
    """Words along K, and zeros along N that are stored less 1."""
    return {
        "qweight": pack(w.codes.transpose(-2, -1), -2),
        "qzeros": pack((w.zeros - 1).transpose(-2, -1), -1),
        "scales": of_scales(w.scales),
    }


@fmt("gptq [E, K/8, N], zeros less 1", gptq, kn=True, exact=with_zeros)
def GPTQ(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32).view(8, 1)
    q = ((t["qweight"].unsqueeze(-2) >> shifts) & 15).flatten(-3, -2).unflatten(-2, (-1, group))
    zeros = (nibbles(t["qzeros"]) + 1).unsqueeze(-2)
    return ((q - zeros).to(t["scales"].dtype) * t["scales"].unsqueeze(-2)).flatten(-3, -2)


@fmt(
    "int32 [E, K/8, N], symmetric",
    lambda w: {"packed": pack(w.codes.transpose(-2, -1), -2), "scale": of_scales(w.scales)},
)
def TRANSPOSED(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    """What loaders make of compressed-tensors experts for kernels that want K first; read as [*, N, K] again."""
    return scaled(nibbles(t["packed"].transpose(-2, -1)) - 8, t["scale"].transpose(-2, -1), group)


@fmt(
    "awq [E, K, N/8]",
    lambda w: {
        "qweight": pack(w.codes.transpose(-2, -1), -1, order=AWQ_ORDER),
        "qzeros": pack(w.zeros.transpose(-2, -1), -1, order=AWQ_ORDER),
        "scales": of_scales(w.scales),
    },
    kn=True,
    exact=with_zeros,
)
def AWQ(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    shifts = torch.tensor(AWQ_SHIFTS, dtype=torch.int32)
    zeros = nibbles(t["qzeros"], shifts).repeat_interleave(group, dim=-2)
    return (nibbles(t["qweight"], shifts) - zeros) * t["scales"].repeat_interleave(group, dim=-2)


@fmt("uint8 pairs [E, N, K/2]", lambda w: {"packed": pack(w.codes, -1, torch.uint8), "scale": w.scales})
def PAIRS(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return scaled(pairs(t["packed"]).to(torch.int8) - 8, t["scale"], group)


@fmt(
    "uint8 pairs [E, K, N/2], scales [E, K/G, N]",
    lambda w: {"packed": pack(w.codes.transpose(-2, -1), -1, torch.uint8), "scale": of_scales(w.scales)},
    kn=True,
)
def PAIRS_KN(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    """Experts kept as x @ W wants them, as llama4 and gpt-oss do."""
    return scaled_rows(pairs(t["packed"]).to(torch.int8) - 8, t["scale"], group)


def hqq(w: Weight) -> dict[str, Tensor]:
    """Groups are rows, [N*K/G, G]; a byte holds a value of the first half of the rows, high, and one of the second."""
    first, second = w.codes.flatten(-2).unflatten(-1, (-1, w.group)).chunk(2, dim=-2)
    zero = (w.zeros + 0.5).to(w.scales.dtype).flatten(-2).unsqueeze(-1)
    return {"W_q": (first * 16 + second).to(torch.uint8), "zero": zero, "scale": w.scales.flatten(-2).unsqueeze(-1)}


@fmt("hqq, float zeros", hqq, exact=lambda w: w.exact(w.zeros + 0.5))
def HQQ(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    q = torch.cat((t["W_q"] >> 4, t["W_q"] & 15), dim=-2).to(t["scale"].dtype)
    return ((q - t["zero"]) * t["scale"]).flatten(-2).unflatten(-1, (N, -1))


@fmt("int8, one code an element", lambda w: {"codes": (w.codes - 8).to(torch.int8), "scale": w.scales})
def INT8(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return t["codes"].to(t["scale"].dtype) * t["scale"].repeat_interleave(group, dim=-1)


FORMATS = (COMPRESSED_TENSORS, ASYMMETRIC, GPTQ, TRANSPOSED, AWQ, PAIRS, PAIRS_KN, HQQ, INT8)
