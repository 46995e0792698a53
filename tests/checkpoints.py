"""Tiny checkpoints in the real formats, and what their weights stand for. Nothing here uses the package's own readers.

config = llama()                                      # or qwen3(), gemma3(); moe("mixtral") or another of MOE
checkpoint = write_gptq(tmp_path, config)             # or write_awq, write_compressed_tensors
model = inductor_ext.from_pretrained(checkpoint.folder)
dense = checkpoint.reference(torch.float32)           # the same model with plain dense weights
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen3Config

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import random_checkpoint

GROUP = 32


def llama(**changes: Any) -> LlamaConfig:
    """Two layers, grouped queries, an lm_head of its own."""
    return LlamaConfig(**{**_SIZES, "pad_token_id": 0} | changes)


def qwen3(**changes: Any) -> Qwen3Config:
    """Two layers with norms on queries and keys, tied embeddings."""
    return Qwen3Config(**{**_SIZES, "tie_word_embeddings": True} | changes)


def gemma3(**changes: Any) -> Gemma3TextConfig:
    """A layer with a sliding window and a full one, each with its own rotary base; scaled and tied embeddings."""
    own = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    }
    return Gemma3TextConfig(**_SIZES | own | changes)


def moe(model_type: str, **changes: Any) -> PretrainedConfig:
    """Two layers, at least one of them with 4 routed experts of which a token gets 2 (llama4: 1)."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "pad_token_id": 0}
    ends = {"bos_token_id": None, "eos_token_id": None}  # some have these beyond our vocabulary
    return AutoConfig.for_model(model_type, **_SIZES | small | ends | MOE[model_type] | changes)


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
_SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 64}
_GROUPS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _EXPERTS | _SHARED,
    "qwen3_moe": _EXPERTS | {"num_experts": 4},
    "qwen3_5_moe_text": _EXPERTS
    | _SHARED
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _EXPERTS
    | _GROUPS
    | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    | {"num_key_value_heads": 2},
    "glm4_moe": _EXPERTS | _GROUPS,
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
}
"""Mixtures of experts by their model_type. All sizes of experts differ, so that a transposed weight does not fit."""
LEFT_DENSE = ("lm_head", "shared_expert_gate", "router", "in_proj_a", "in_proj_b")
"""Ends of the paths of linear layers that quantisers leave as they are."""


# Weights are drawn wider than by default, so that logits differ by more than rounding does.
_SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder in a real format, and the tensors of the dense model that it stands for.

    dense: every parameter by its name in the files; those of quantised layers are float32, (code - zero) * scale
    unrounded, [N, K]. packed: the paths of the quantised layers, those of experts too.
    """

    folder: Path
    dense: dict[str, Tensor]
    packed: tuple[str, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor in the checkpoint's files."""
        return {name: tensor for file in self.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}

    def reference(self, dtype: torch.dtype = torch.float32) -> Any:
        """The dense transformers model in `dtype`: all weights rounded to it once."""
        return random_checkpoint.dense_model(self.folder, self.dense, dtype)


def write_compressed_tensors(
    folder: Path, config: PretrainedConfig, *, group_index: bool = False, seed: int = 0, **settings: Any
) -> Checkpoint:
    """As compressed-tensors 0.20 writes it; `settings` as in bench/random_checkpoint.py.

    group_index: act-order with `weight_g_idx`, which older versions wrote; the columns of every weight are shuffled.
    """
    if config.model_type in MOE:
        settings = {"ignore": tuple(f"re:.*{name}$" for name in LEFT_DENSE)} | settings
    random_checkpoint.write_compressed_tensors(folder, config, seed=seed, **settings)
    dense = random_checkpoint.decompress(folder)
    names = Checkpoint(folder, {}, ()).tensors()
    packed = tuple(name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed"))
    if group_index:
        dense |= _shuffle_columns(folder, packed, dense, torch.Generator().manual_seed(seed))
    return Checkpoint(folder, dense, packed)


def _shuffle_columns(
    folder: Path, packed: tuple[str, ...], dense: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Moves the columns of every packed weight in the file, and their groups with them; returns the new weights."""
    (file,) = folder.glob("*.safetensors")
    tensors, moved = load_file(file), {}
    for path in packed:
        codes = unpack_from_int32(tensors[f"{path}.weight_packed"], 4, tensors[f"{path}.weight_shape"])
        weight, k = dense[f"{path}.weight"], codes.shape[1]
        to = torch.randperm(k, generator=generator)
        group_of_k = torch.arange(k) // (k // tensors[f"{path}.weight_scale"].shape[1])
        tensors[f"{path}.weight_packed"] = pack_to_int32(torch.empty_like(codes).index_copy_(1, to, codes), 4)
        tensors[f"{path}.weight_g_idx"] = torch.empty_like(group_of_k).index_copy_(0, to, group_of_k).to(torch.int32)
        moved[f"{path}.weight"] = torch.empty_like(weight).index_copy_(1, to, weight)
    save_file(tensors, file, metadata={"format": "pt"})
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    for group in quantization["config_groups"].values():
        group["weights"]["actorder"] = "group"
    set_quantization(folder, quantization)
    return moved


def write_gptq(
    folder: Path,
    config: PretrainedConfig,
    *,
    group_size: int = GROUP,
    desc_act: bool = False,
    v2: bool = False,
    scales_dtype: torch.dtype = torch.float16,
    left_dense: tuple[str, ...] = LEFT_DENSE,
    seed: int = 0,
    **settings: Any,
) -> Checkpoint:
    """GPTQ as AutoGPTQ (checkpoint_format gptq: a zero z is stored as z - 1) or GPTQModel (gptq_v2: as z) writes it.

    group_size: -1 for one group a row. left_dense: ends of the paths of linear layers that are not quantised.
    `settings` are added to the quantization_config.
    """
    offset = 0 if v2 else 1

    def pack(q: Quantised) -> dict[str, Tensor]:
        return {
            "qweight": pack_nibbles(q.codes, dim=1).t().contiguous(),
            "qzeros": pack_nibbles((q.zeros - offset).t(), dim=1),
            "scales": q.scales.t().contiguous(),
            "g_idx": q.group_of_k.to(torch.int32),
        }

    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    # With zeros stored as z - 1 there is no zero 0, but a zero 16.
    draw = Draw(None if group_size == -1 else group_size, scales_dtype, range(offset, 16 + offset), desc_act, seed)
    return _write(folder, config, quantization | settings, draw, pack, left_dense)


def write_awq(
    folder: Path,
    config: PretrainedConfig,
    *,
    group_size: int = GROUP,
    scales_dtype: torch.dtype = torch.float16,
    left_dense: tuple[str, ...] = LEFT_DENSE,
    seed: int = 0,
    **settings: Any,
) -> Checkpoint:
    """AWQ "gemm" as AutoAWQ writes it; the other arguments are write_gptq's."""

    def pack(q: Quantised) -> dict[str, Tensor]:
        return {
            "qweight": pack_nibbles(awq_columns(q.codes.t()), dim=1),
            "qzeros": pack_nibbles(awq_columns(q.zeros.t()), dim=1),
            "scales": q.scales.t().contiguous(),
        }

    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    draw = Draw(None if group_size == -1 else group_size, scales_dtype, range(16), False, seed)
    return _write(folder, config, quantization | settings, draw, pack, left_dense)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight in integers: codes int64 [N, K] in 0..15, zeros int64 and scales [N, K/G], group_of_k int64 [K]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group_of_k: Tensor

    def dense(self) -> Tensor:
        """float32 [N, K]: exact, since a difference of codes has 5 bits and a scale at most 11."""
        k = self.group_of_k
        return (self.codes - self.zeros[:, k]).float() * self.scales.float()[:, k]


class Draw:
    """Draws the integers of one layer after another."""

    def __init__(self, group_size: int | None, dtype: torch.dtype, zeros: range, shuffled: bool, seed: int) -> None:
        self.group_size, self.dtype, self.zeros, self.shuffled = group_size, dtype, zeros, shuffled
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, n: int, k: int) -> Quantised:
        groups = k // (self.group_size or k)
        group_of_k = torch.arange(k) // (k // groups)
        if self.shuffled:
            group_of_k = group_of_k[torch.randperm(k, generator=self.generator)]
        return Quantised(
            codes=torch.randint(16, (n, k), generator=self.generator),
            zeros=torch.randint(self.zeros.start, self.zeros.stop, (n, groups), generator=self.generator),
            scales=(torch.rand(n, groups, generator=self.generator) * 0.02 + 0.002).to(self.dtype),
            group_of_k=group_of_k,
        )


def pack_nibbles(codes: Tensor, dim: int) -> Tensor:
    """int32 words from codes in 0..15: value 8j + i of dimension `dim` goes to bits 4i..4i+3 of word j."""
    assert int(codes.min()) >= 0 and int(codes.max()) <= 15
    runs = codes.unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    words = sum(runs[..., i] * 16**i for i in range(8))
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32).contiguous()


def awq_columns(codes: Tensor) -> Tensor:
    """The columns of [rows, N] in AWQ's order: of each eight, 0 2 4 6 1 3 5 7."""
    return codes.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)


def _write(
    folder: Path,
    config: PretrainedConfig,
    quantization: dict[str, Any],
    draw: Draw,
    pack: Callable[[Quantised], dict[str, Tensor]],
    left_dense: tuple[str, ...],
) -> Checkpoint:
    """Replaces the linear layers of a random model by quantised ones and writes everything in fp16."""
    model = random_checkpoint.random_model(config, torch.float16, draw.generator.initial_seed())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    dense, packed = dict(stored), []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.endswith(left_dense):
            quantised = draw(module.out_features, module.in_features)
            del stored[f"{path}.weight"]
            stored |= {f"{path}.{name}": tensor for name, tensor in pack(quantised).items()}
            dense[f"{path}.weight"] = quantised.dense()
            packed.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    set_quantization(folder, quantization)
    save_file(_old_names(config, stored), folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder, _old_names(config, dense), tuple(_old_names(config, dict.fromkeys(packed))))


def _old_names(config: PretrainedConfig, named: dict[str, Any]) -> dict[str, Any]:
    if config.model_type not in random_checkpoint.OLD:
        return named
    return {name.replace(".mlp.", ".block_sparse_moe."): value for name, value in named.items()}


def set_quantization(folder: Path, quantization: dict[str, Any]) -> None:
    """Puts another quantization_config into a checkpoint's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=2))
