"""Checkpoints that `inductor_ext.from_pretrained` refuses, with all that is wrong in them; and how configs are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, set_quantization, write_awq, write_compressed_tensors, write_gptq
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, Qwen3MoeConfig

import inductor_ext
from inductor_ext.loader.config import read_plan
from inductor_ext.loader.stream import CheckpointError


def load(folder: Path) -> Any:
    return inductor_ext.from_pretrained(folder, progress=False)


def test_every_wrong_tensor_is_listed_in_one_error(tmp_path: Path) -> None:
    tensors = write_gptq(tmp_path, llama()).tensors()
    del tensors["model.layers.0.mlp.up_proj.scales"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.surprise"] = torch.zeros(3)
    tensors["model.layers.1.mlp.up_proj.qweight"] = torch.zeros(16, 8, dtype=torch.int32)
    tensors["model.layers.1.mlp.up_proj.qzeros"] = torch.zeros(4, 32, dtype=torch.int64)
    tensors["model.layers.1.mlp.up_proj.scales"] = torch.zeros(4, 256, dtype=torch.float64)
    tensors["lm_head.weight"] = torch.zeros(256, 128, dtype=torch.uint8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)  # old checkpoints have it: no error
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    first, *listed = str(error.value).splitlines()
    assert str(tmp_path) in first and "LlamaForCausalLM" in first
    assert sorted(line.strip() for line in listed) == [
        "dtype: lm_head.weight is uint8, the model needs float64 or float32 or float16 or bfloat16",
        "dtype: model.layers.1.mlp.up_proj.qzeros is int64, the model needs int32",
        "dtype: model.layers.1.mlp.up_proj.scales is float64, the model needs float16 or bfloat16 or float32",
        "missing: model.layers.0.mlp.up_proj.scales, float16 or bfloat16 or float32 [4, 256]",
        "missing: model.norm.weight, float64 or float32 or float16 or bfloat16 [128]",
        "shape: model.layers.1.mlp.up_proj.qweight is [16, 8], the model needs [16, 256]",
        "surplus: model.layers.0.mlp.up_proj.surprise, float32 [3]",
    ]


def test_values_that_cannot_be_right_are_listed(tmp_path: Path) -> None:
    tensors = write_gptq(tmp_path / "gptq", llama(num_hidden_layers=1)).tensors()
    tensors["model.layers.0.mlp.up_proj.g_idx"][7] = 4
    save_file(tensors, tmp_path / "gptq" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"values: model\.layers\.0\.mlp\.up_proj names a group outside 0\.\.3"):
        load(tmp_path / "gptq")
    tensors = write_compressed_tensors(tmp_path / "ct", llama(num_hidden_layers=1)).tensors()
    tensors["model.layers.0.mlp.up_proj.weight_shape"][1] = 127
    save_file(tensors, tmp_path / "ct" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj has weight_shape \[256, 127\], the model needs \[256, 128\]"):
        load(tmp_path / "ct")


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, llama(num_hidden_layers=1), max_shard_size="60KB")
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(first) | load_file(last), last)
    with pytest.raises(CheckpointError, match=rf"{first.name} and .*{last.name} both hold "):
        load(tmp_path)
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"{last.name} cannot be read \(.*\); copy or download it again"):
        load(tmp_path)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=rf"model\.safetensors\.index\.json names {last.name}"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor model\.safetensors\.index"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: it holds no config\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load(tmp_path / "nowhere")


def test_two_sets_of_files_are_one_too_many(tmp_path: Path) -> None:
    """transformers would take the single file, others the index."""
    write_compressed_tensors(tmp_path, llama(num_hidden_layers=1))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="names other files; remove what is out of date"):
        load(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load(tmp_path)


def test_a_layer_named_as_not_converted_is_not_packed_even_if_the_file_packs_it(tmp_path: Path) -> None:
    write_awq(tmp_path, llama(num_hidden_layers=1), modules_to_not_convert=["down_proj"])
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.mlp\.down_proj\.weight, "):
        load(tmp_path)


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def ct(weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | (weights or {})} | (group or {})}
    return {**CT, "config_groups": groups} | top


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({"quant_method": "bitsandbytes"}, "has quant_method 'bitsandbytes'"),
        ({}, "has no quantization_config"),
        (ct({"num_bits": 8}), "num_bits 8"),
        (ct(group={"targets": "Linear"}), "has targets 'Linear', which is no list"),
        (ct(ignore="lm_head"), "has ignore 'lm_head', which is no list of names"),
        ({"quant_method": "gptq", "bits": 4, "rotation": "hadamard"}, "has rotation hadamard"),
        (ct({"type": "float"}), "type 'float'"),
        (ct({"strategy": "tensor", "group_size": None}), "strategy 'tensor'"),
        (ct({"dynamic": True}), "dynamic True"),
        (ct({"group_size": 0}), "group_size 0"),
        (ct(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (ct(group={"format": "float-quantized"}), "format 'float-quantized'"),
        (ct(group={"input_activations": {"num_bits": 8}}), "input_activations {'num_bits': 8}"),
        (ct(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme {'num_bits': 8}"),
        (ct(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (ct(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (ct(config_groups={"W4A16": ["Linear"]}), "names 'W4A16' without spelling it out"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "has bits 3"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "has group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format=True"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {".*q_proj": {"bits": 8}}}, "has bits 8"),
        ({"quant_method": "awq", "bits": 8}, "has bits 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "has version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "has zero_point false"),
    ],
)
def test_what_is_not_supported_is_named(quantization: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match="Supported are dense decoder models") as error:
        read_plan(quantization)
    assert found in str(error.value)


def test_unsupported_checkpoints_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, llama(num_hidden_layers=1))
    (tmp_path / "model.safetensors").unlink()
    set_quantization(tmp_path, ct({"num_bits": 8}))
    with pytest.raises(ValueError, match="num_bits 8"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "group_size", "reason"),
    [
        (llama(), 96, r"k_proj cannot be stored as awq: K = 128 is not a multiple of the group size 96"),
        (llama(head_dim=34), 32, r"k_proj cannot be stored as awq: N = 68 is not a multiple of 8"),
    ],
)
def test_a_layer_that_the_format_cannot_hold_is_named(
    tmp_path: Path, config: PretrainedConfig, group_size: int, reason: str
) -> None:
    config.save_pretrained(tmp_path)
    set_quantization(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": group_size})
    save_file({"model.layers.0.self_attn.k_proj.qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=reason):
        load(tmp_path)


def test_a_checkpoint_that_quantises_nothing_is_refused(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, llama(num_hidden_layers=1))
    set_quantization(tmp_path, ct(ignore=["re:.*"]))
    with pytest.raises(ValueError, match="none of the model's linear layers is quantised"):
        load(tmp_path)


def test_mixtures_of_experts_are_refused(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(num_hidden_layers=1, num_experts=4, hidden_size=64, moe_intermediate_size=32, vocab_size=64)
    config.save_pretrained(tmp_path)
    set_quantization(tmp_path, ct())
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM is a mixture of experts"):
        load(tmp_path)


def test_gptqmodels_settings_for_single_layers_are_read() -> None:
    plan = read_plan(
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "dynamic": {"-:.*k_proj": {}, r"+:.*\.0\.mlp\..*": {"group_size": 64}, ".*up_proj": {"desc_act": True}},
        }
    )

    def scheme(path: str) -> Any:
        return plan.scheme(path, {"Linear"}, {f"{path}.qweight"})

    assert scheme("layers.0.k_proj") is None
    assert scheme("layers.0.mlp.down_proj").group_size == 64
    assert scheme("layers.1.mlp.up_proj").group_index and scheme("layers.1.mlp.up_proj").group_size == 128
    assert not scheme("layers.1.mlp.down_proj").group_index


def test_a_rule_for_one_layer_beats_patterns_and_classes() -> None:
    def group(size: int, *targets: str) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
        return {"targets": targets, "weights": weights}

    plan = read_plan(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["re:.*v_proj"],
            "config_groups": {
                "a": group(32, "Linear"),
                "b": group(64, "re:.*k_proj"),
                "c": group(128, "layers.0.k_proj", "layers.0.v_proj"),
            },
        }
    )
    sizes = [plan.scheme(f"layers.{i}.{p}_proj", {"Linear"}, ()) for i in (0, 1) for p in "qkv"]
    assert [scheme and scheme.group_size for scheme in sizes] == [32, 128, None, 32, 64, None]
    assert plan.scheme("layers.0.q_proj", {"Embedding"}, ()) is None
