"""Marlin's ops, by whoever has built them: vLLM, sgl-kernel, GPTQModel. Their arguments are the same but for some that
versions have more or less, so they are given by the names in the op's own schema."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    package: str
    modules: tuple[str, ...]
    """What registers the op when it is imported, the newer name first; none if the package does so itself, when it
    first needs the op."""
    op: str
    """namespace::name. "*" stands for fp16 or bf16, of the activations."""


DENSE = (
    Source("vllm", ("vllm._C_stable_libtorch", "vllm._C"), "_C::marlin_gemm"),
    Source("vllm", ("vllm._C",), "_C::gptq_marlin_gemm"),
    Source("sgl_kernel", ("sgl_kernel",), "sgl_kernel::gptq_marlin_gemm"),
    Source("gptqmodel", (), "gptqmodel_marlin_*::gptq_marlin_gemm_*"),
)
EXPERTS = (
    Source("vllm", ("vllm._moe_C_stable_libtorch", "vllm._moe_C"), "_moe_C::moe_wna16_marlin_gemm"),
    Source("sgl_kernel", ("sgl_kernel",), "sgl_kernel::moe_wna16_marlin_gemm"),
    Source("gptqmodel", (), "gptqmodel_marlin_moe::moe_wna16_marlin_gemm"),
)

_MEANING = {
    "c_or_none": "c",
    "b_bias_or_none": "b_bias",
    "b_zeros_or_none": "b_zeros",
    "b_qzeros_or_none": "b_zeros",
    "g_idx_or_none": "g_idx",
    "perm_or_none": "perm",
    "b_type_id": "type",
    "b_q_type_id": "type",
    "b_q_type": "type",
    "is_full_k": "is_k_full",
    "num_tokens_past_padded": "end",
    "num_tokens_post_padded": "end",
}
"""Names of schemas -> ours; others are the same."""
_ALWAYS: dict[str, Any] = {
    "a_scales": None,
    "global_scale": None,
    "g_idx": None,
    "perm": None,
    "is_k_full": True,
    "is_ep": False,
    "use_atomic_add": False,
    "use_fp32_reduce": True,
    "is_zp_float": False,
    "thread_k": -1,
    "thread_n": -1,
    "blocks_per_sm": -1,
}
"""Arguments that are the same at every call. g_idx and perm are for act-order, which is done before."""
_GIVEN = {
    "a", "c", "b_q_weight", "b_bias", "b_scales", "b_zeros", "workspace", "type", "size_m", "size_n", "size_k",
    "sorted_token_ids", "expert_ids", "end", "topk_weights", "moe_block_size", "top_k", "mul_topk_weights",
}  # fmt: skip
"""Arguments of a call."""


def find(sources: tuple[Source, ...], dtype: torch.dtype) -> Any | str:
    """The first of these ops that there is and that is understood, or why there is none."""
    reasons = []
    for source in sources:
        op = _op(source, dtype)
        reason = f"{source.package} has no op {source.op}" if op is None else _why_not(op)
        if reason is None:
            return op
        missing = op is None and importlib.util.find_spec(source.package) is None
        reasons.append(f"{source.package} is not installed" if missing else reason)
    return f"There is no Marlin op: {'; '.join(dict.fromkeys(reasons))}."


def call(sources: tuple[Source, ...], given: dict[str, Any]) -> Tensor:
    """The op, by our names of its arguments. Raises RuntimeError if there is none."""
    op = found(sources, given["a"].dtype)
    if isinstance(op, str):
        raise RuntimeError(op)
    values = _ALWAYS | given
    arguments = {}
    for argument in op._schema.arguments:
        name = _MEANING.get(argument.name, argument.name)
        if name in values:
            arguments[argument.name] = values[name]
    result: Tensor = op(**arguments)
    return result


found = functools.cache(find)
"""Looked up once a process."""


def scalar_type(zeros: bool) -> int:
    """The id of the codes' type in these packages: uint4, if there are zeros, or uint4b8.

    Bits from the lowest up: 8 of the exponent, 8 of the mantissa, 1 of the sign, 32 of the bias, 1 for finite values
    only, 8 of NaN's kind, which is 1.
    """
    return 4 << 8 | (0 if zeros else 8) << 17 | 1 << 50


def _op(source: Source, dtype: torch.dtype) -> Any | None:
    namespace, name = source.op.replace("*", "bf16" if dtype == torch.bfloat16 else "fp16").split("::")
    if (op := getattr(getattr(torch.ops, namespace), name, None)) is not None:
        return op.default
    if importlib.util.find_spec(source.package) is None:
        return None
    for module in source.modules:
        with contextlib.suppress(ImportError, OSError):  # this build has another of them, or it does not load here
            importlib.import_module(module)
            if (op := getattr(getattr(torch.ops, namespace), name, None)) is not None:
                return op.default
    return None


def _why_not(op: Any) -> str | None:
    """Versions that do not take a bias, or want what is not known here."""
    names = {_MEANING.get(a.name, a.name) for a in op._schema.arguments if not a.has_default_value()}
    every = {_MEANING.get(a.name, a.name) for a in op._schema.arguments}
    if unknown := sorted(names - _GIVEN - set(_ALWAYS)):
        return f"{op._schema.name} wants {', '.join(unknown)}, which is not known here"
    if "b_bias" not in every:
        return f"{op._schema.name} takes no bias, as older versions do not"
    return None
