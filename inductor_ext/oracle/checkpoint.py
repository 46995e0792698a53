"""How checkpoints store int4 and int8 weights, and the canonical form of what they store."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from inductor_ext.layouts import Experts, awq, gptq


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """How a checkpoint stores weights."""

    method: str
    """"gptq", "awq" or "compressed-tensors"."""
    bits: int = 4
    convention: str = gptq.STORED
    """Of zeros: gptq.LESS_ONE for GPTQ's first format."""
    desc_act: bool = False
    """Act-order: g_idx counts, and without it is not looked at."""

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "awq", "compressed-tensors"):
            raise ValueError(f"method must be gptq, awq or compressed-tensors, not {self.method!r}.")
        if self.bits not in (4, 8) or (self.method == "awq" and self.bits != 4):
            raise ValueError(f"bits must be 4, or 8 but for AWQ; they are {self.bits} of {self.method}.")

    def experts(
        self, qweight: Tensor, scales: Tensor, g_idx: Tensor | None, qzeros: Tensor | None, bias: Tensor | None
    ) -> Experts:
        """One projection in the canonical form. Raises ValueError naming the tensor that is not as it must be."""
        if self.method == "awq":
            if qzeros is None:
                raise ValueError("qzeros must be given: AWQ's checkpoints have zeros.")
            return awq.unpack(awq.Awq(qweight, scales, qzeros, bias))
        if self.desc_act and g_idx is None:
            raise ValueError("g_idx must be given: the checkpoint is in act-order.")
        order = g_idx if self.desc_act else None
        return gptq.unpack(gptq.Gptq(qweight, scales, qzeros, order, bias), self.bits, self.convention)


def checkpoint_of(quant_config: Any) -> Checkpoint:
    """Of a ``Checkpoint``, or of the field's configurations by their attributes: vLLM's AutoAWQConfig (zero_point) and
    AutoGPTQConfig (desc_act), compressed-tensors' QuantizationArgs (num_bits, actorder). Raises TypeError for another,
    and ValueError as ``in_act_order`` does."""
    if isinstance(quant_config, Checkpoint):
        return quant_config
    if _has(quant_config, "zero_point", "weight_bits"):
        return Checkpoint("awq", quant_config.weight_bits)
    if _has(quant_config, "desc_act", "weight_bits"):
        second = getattr(quant_config, "checkpoint_format", "") == "gptq_v2"
        convention = gptq.STORED if second else gptq.LESS_ONE
        return Checkpoint("gptq", quant_config.weight_bits, convention, quant_config.desc_act)
    if _has(quant_config, "num_bits", "actorder"):
        return Checkpoint("compressed-tensors", quant_config.num_bits, desc_act=in_act_order(quant_config.actorder))
    raise TypeError(
        "quant_config must be a Checkpoint, or have the attributes of AutoAWQConfig, AutoGPTQConfig or"
        f" QuantizationArgs; it is a {type(quant_config).__name__}."
    )


def in_act_order(actorder: Any) -> bool:
    """Whether compressed-tensors' setting has the index of groups count: "group", also known as "dynamic" and True.
    "weight", or "static", reordered columns during calibration only. Raises ValueError for anything else."""
    value = getattr(actorder, "value", actorder)
    if value in ("group", "dynamic", True):
        return True
    if value in ("weight", "static", False, None):
        return False
    raise ValueError(f'actorder must be "group", "dynamic", "weight", "static", a bool or None; it is {value!r}.')


def _has(value: Any, *names: str) -> bool:
    return all(hasattr(value, name) for name in names)
