"""Experts in MXFP4 as people and libraries write them, and the near misses: a family of its own, for another op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo_moe.base import BF16, Case, Format, Weight
from zoo_moe.formats import fmt, nibbles, pack, pairs
from zoo_moe.gathered import columns, columns_of_packed
from zoo_moe.grouped import transformers
from zoo_moe.loops import one_hot_where
from zoo_moe.mlps import GPT_OSS
from zoo_moe.routers import topk_softmax

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def bytes_of(w: Weight) -> Tensor:
    """uint8 [*, N, K/32]: an exponent for each scale."""
    return (127 + w.scales.float().abs().log2().floor()).to(torch.uint8)


def exact(w: Weight) -> Tensor:
    values = torch.tensor(VALUES, dtype=torch.float64)[w.codes].unflatten(-1, (-1, w.group))
    return (values * 2.0 ** (bytes_of(w).double() - 127).unsqueeze(-1)).flatten(-2)


def stored(w: Weight) -> dict[str, Tensor]:
    low, high = w.codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return {"blocks": low | high << 4, "scale": bytes_of(w), "like": w.scales[..., 0, 0]}


def with_table(w: Weight) -> dict[str, Tensor]:
    return {**stored(w), "table": torch.tensor(VALUES).to(w.scales.dtype).expand(*w.codes.shape[:-2], -1)}


def scaled(values: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    return (values.unflatten(-1, (-1, group)) * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def looked_up(t: dict[str, Tensor]) -> Tensor:
    """float32 [*, N, K]"""
    return torch.tensor(VALUES, device=t["blocks"].device)[pairs(t["blocks"]).int()]


@fmt("convert_moe_packed_tensors", stored, kn=True, exact=exact)
def TRANSFORMERS(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(t["blocks"].unflatten(-1, (-1, 16)), t["scale"], dtype=t["like"].dtype)


@fmt("exp2", stored, exact=exact)
def EXP2(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return scaled(looked_up(t), torch.exp2(t["scale"].float() - 127), group, t["like"].dtype)


@fmt("a shift into the exponent", stored, exact=exact)
def SHIFT(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    scale = (t["scale"].to(torch.int32) << 23).view(torch.float32)
    return scaled(looked_up(t), scale, group, t["like"].dtype)


@fmt("e8m0 as PyTorch has it, NaN and all", stored, exact=exact)
def E8M0(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return scaled(looked_up(t), t["scale"].view(torch.float8_e8m0fnu).float(), group, t["like"].dtype)


def as_e8m0(w: Weight) -> dict[str, Tensor]:
    return {**stored(w), "scale": bytes_of(w).view(torch.float8_e8m0fnu)}


@fmt("scales stored as e8m0", as_e8m0, exact=exact)
def STORED_E8M0(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return scaled(looked_up(t), t["scale"].float(), group, t["like"].dtype)


def exponents(w: Weight) -> dict[str, Tensor]:
    return {**stored(w), "scale": (bytes_of(w).int() - 127).to(torch.int8)}


@fmt("exponents stored as signed numbers", exponents, exact=exact)
def EXPONENTS(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return scaled(looked_up(t), torch.exp2(t["scale"].float()), group, t["like"].dtype)


@fmt("values by arithmetic, where NaN is 255", stored, exact=exact)
def ARITHMETIC(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    q = pairs(t["blocks"]).int()
    sign, exponent, mantissa = 1 - 2 * (q >> 3), (q >> 1) & 3, (q & 1).float() / 2
    values = sign * torch.where(exponent == 0, mantissa, torch.exp2(exponent.float() - 1) * (1 + mantissa))
    scale = torch.where(t["scale"] == 255, torch.nan, torch.exp2(t["scale"].float() - 127))
    return scaled(values, scale, group, t["like"].dtype)


def of_bytes(w: Weight) -> dict[str, Tensor]:
    """A table of both values of a byte."""
    table = torch.tensor([[VALUES[b & 15], VALUES[b >> 4]] for b in range(256)])
    return {**stored(w), "pairs": table.to(w.scales.dtype)}


@fmt("a table of pairs, a buffer", of_bytes, exact=exact)
def PAIRS_TABLE(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return scaled(
        t["pairs"][t["blocks"].int()].flatten(-2), torch.exp2(t["scale"].float() - 127), group, t["like"].dtype
    )


def columns_stored(w: Weight) -> dict[str, Tensor]:
    return {name: t.transpose(-2, -1) if t.dim() > 1 else t for name, t in stored(w).items()}


@fmt("uint8 [E, K/2, N]", columns_stored, kn=True, exact=exact)
def COLUMNS(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    low, high = t["blocks"] & 15, t["blocks"] >> 4
    values = torch.tensor(VALUES)[torch.stack((low, high), -2).flatten(-3, -2).int()]
    scale = torch.exp2(t["scale"].float() - 127)
    return (values.unflatten(-2, (-1, group)) * scale.unsqueeze(-2)).flatten(-3, -2).to(t["like"].dtype)


@fmt("int32 [E, N, K/8]", lambda w: {**stored(w), "blocks": pack(w.codes, -1)}, exact=exact)
def WORDS(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    values = torch.tensor(VALUES)[nibbles(t["blocks"])]
    return scaled(values, torch.exp2(t["scale"].float() - 127), group, t["like"].dtype)


def spelled(name: str, form: Any, format: Format, **fields: Any) -> Case:
    as_gpt_oss = {"mlp": GPT_OSS, "bias": True, "route": topk_softmax, "dtypes": BF16}
    return Case(name, form, **{"format": format, **as_gpt_oss, **fields})


POSITIVES = [
    spelled("grouped_mm", transformers, TRANSFORMERS),
    spelled("gather", columns, TRANSFORMERS, dtypes=(torch.float32,)),
    spelled("one module an expert", one_hot_where, EXP2, separate=True, unbacked=True, E=3),
    spelled("shift", transformers, SHIFT),
    spelled("e8m0", columns, E8M0, dtypes=(torch.float16,), core=True),
    spelled("stored e8m0", columns, STORED_E8M0),
    spelled("exponents", columns, EXPONENTS),
    spelled("arithmetic, gather packed", columns_of_packed, ARITHMETIC, core=True),
    spelled("table of pairs", columns, PAIRS_TABLE),
    spelled("columns", transformers, COLUMNS),
    spelled("words", columns, WORDS),
]

# -- near misses -------------------------------------------------------------------------------------------------------


@fmt("a book of its own", stored, exact=exact)
def OTHER_BOOK(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    values = torch.tensor([5.0 if v == 6 else v for v in VALUES])[pairs(t["blocks"]).int()]
    return scaled(values, torch.exp2(t["scale"].float() - 127), group, t["like"].dtype)


@fmt("steps of a quarter", stored, exact=exact)
def FINER(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return scaled(looked_up(t), torch.exp2((t["scale"].float() - 127) / 4), group, t["like"].dtype)


@fmt("shuffled", stored, exact=exact)
def SHUFFLED(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    values = looked_up(t).unflatten(-1, (4, -1)).transpose(-2, -1).flatten(-2)
    return scaled(values, torch.exp2(t["scale"].float() - 127), group, t["like"].dtype)


@fmt("limited", stored, exact=exact)
def LIMITED(t: dict[str, Tensor], N: int, group: int) -> Tensor:
    return EXP2.read(t, N, group).clamp(-1, 1)


NEGATIVES = {
    "code book": spelled("code book", columns, OTHER_BOOK),
    "power of two": spelled("quarter steps", columns, FINER),
    "bit order": spelled("shuffled", columns, SHUFFLED),
    "depends on where it stands|power of two|code book": spelled("limited", columns, LIMITED),
    "no scale takes part|No scale": spelled("groups of 16", columns, EXP2, group=16),
}
