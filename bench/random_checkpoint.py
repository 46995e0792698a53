"""Writes W4A16 checkpoints with random weights, as compressed-tensors itself writes them: for demo and tests.

transformers has the experts of a layer in one module; quantised checkpoints hold linear layers for every expert, as
tools write them that split that module before they quantise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor, compress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

OLD = ("mixtral", "minimax_m2")
"""Models whose files have old names: `block_sparse_moe.experts.0.w1`, where others have `mlp.experts.0.gate_proj`."""
TRANSPOSED = ("Llama4TextExperts",)
"""Experts that hold W^T."""


def write_compressed_tensors(
    folder: Path,
    config: PretrainedConfig,
    *,
    group_size: int | None = 32,
    symmetric: bool = True,
    targets: tuple[str, ...] = ("Linear",),
    ignore: tuple[str, ...] = ("lm_head",),
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    seed: int = 0,
) -> None:
    """A checkpoint of a random causal language model, its linear layers rounded to the nearest int4 value.

    group_size: how many neighbours along K share a scale; None: all of a row.
    targets, ignore: which modules are quantised, by compressed-tensors' rules.
    dtype: of the scales and of everything that is not quantised.
    """
    model = random_model(config, dtype, seed)
    strategy = "channel" if group_size is None else "group"
    weights = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, group_size=group_size)
    scheme = QuantizationScheme(targets=list(targets), weights=weights)
    quantization = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore))
    apply_quantization_config(model, quantization, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            runs = module.weight.detach().unflatten(-1, (-1, group_size or module.in_features))
            scale, zero = calculate_qparams(runs.amin(-1), runs.amax(-1), weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
            compress_module(module)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    ModelCompressor.from_pretrained_model(model).update_config(str(folder))


def random_model(config: PretrainedConfig, dtype: torch.dtype, seed: int) -> Any:
    """A causal language model with random weights, biases of its routers too; each expert has its own linear layers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    gate, up, down = ("w1", "w3", "w2") if config.model_type in OLD else ("gate_proj", "up_proj", "down_proj")
    for path, module in fused_experts(model):
        experts = nn.ModuleList()
        turn = type(module).__name__ in TRANSPOSED
        for gate_up, last in zip(module.gate_up_proj.detach(), module.down_proj.detach(), strict=True):
            first, second = (gate_up.t() if turn else gate_up).chunk(2)
            expert = nn.Module()
            for name, weight in ((gate, first), (up, second), (down, last.t() if turn else last)):
                linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
                linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
                setattr(expert, name, linear)
            experts.append(expert)
        model.set_submodule(path, experts)
    return model


def fused_experts(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold the weights of several experts, with their paths."""
    modules = [(path, module) for path, module in model.named_modules() if hasattr(module, "down_proj")]
    return [(path, module) for path, module in modules if isinstance(module.down_proj, nn.Parameter)]


def decompress(folder: Path) -> dict[str, Tensor]:
    """The dense model's tensors: weights by compressed-tensors' own decompressor, in float32; the rest as stored."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    (scheme,) = AutoConfig.from_pretrained(folder).quantization_config["config_groups"].values()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for path in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        own = {
            name.removeprefix(f"{path}."): stored.pop(name) for name in [*stored] if name.startswith(f"{path}.weight_")
        }
        own["weight_scale"] = own["weight_scale"].float()
        stored[f"{path}.weight"] = compressor.decompress(own, QuantizationScheme(**scheme))["weight"]
    return stored


def dense_model(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """The plain transformers model of a checkpoint's config.json, with these tensors, rounded to `dtype` once.

    tensors: by the names in the checkpoint's files, a matrix for each linear layer of each expert.
    """
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in tensors.items()}
    for path, module in fused_experts(model):
        w = [f"{path}.{expert}.%s.weight" for expert in range(module.num_experts)]
        gate, up, down = (
            torch.stack([tensors.pop(p % new) if p % new in tensors else tensors.pop(p % old) for p in w])
            for new, old in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        )
        gate_up, turn = torch.cat((gate, up), 1), type(module).__name__ in TRANSPOSED
        tensors[f"{path}.gate_up_proj"] = gate_up.transpose(1, 2) if turn else gate_up
        tensors[f"{path}.down_proj"] = down.transpose(1, 2) if turn else down
    missing, surplus = model.load_state_dict(tensors, strict=False)
    if surplus or (missing and not (missing == ["lm_head.weight"] and config.tie_word_embeddings)):
        raise ValueError(f"These tensors do not fill {type(model).__name__}: {missing} are missing, {surplus} surplus.")
    return model.eval()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of `vocab_size` words, w0 w1 w2 ..., beside a checkpoint; an unknown word becomes w0."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
