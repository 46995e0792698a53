"""Mixtures of experts from checkpoints that hold each expert by itself, against dense models made without it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    MOE,
    Checkpoint,
    moe,
    pack_nibbles,
    random_checkpoint,
    set_quantization,
    write_awq,
    write_compressed_tensors,
    write_gptq,
)
from safetensors.torch import save_file
from test_loader import MEASURE, load, logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import inductor_ext
from inductor_ext.loader.experts import PackedExperts
from inductor_ext.loader.modules import PackedLinear
from inductor_ext.loader.stream import CheckpointError

FORMATS: dict[str, tuple[Callable[..., Checkpoint], dict[str, Any]]] = {
    "ct-group": (write_compressed_tensors, {}),
    "ct-group-asym": (write_compressed_tensors, {"symmetric": False}),
    "ct-channel": (write_compressed_tensors, {"group_size": None}),
    "ct-channel-asym-fp16": (
        write_compressed_tensors,
        {"group_size": None, "symmetric": False, "dtype": torch.float16},
    ),
    "gptq": (write_gptq, {}),
    "gptq-v2": (write_gptq, {"v2": True}),
    "gptq-channel-bf16": (write_gptq, {"group_size": -1, "scales_dtype": torch.bfloat16}),
    "awq": (write_awq, {}),
    "awq-fp32-scales": (write_awq, {"group_size": 16, "scales_dtype": torch.float32}),
}
PAIRS = [("qwen3_moe", name) for name in FORMATS]
PAIRS += [(family, name) for family in MOE if family != "qwen3_moe" for name in ("ct-group-asym", "gptq")]
each_format = pytest.mark.parametrize("name", FORMATS)
IDS = (torch.arange(24).view(2, 12) * 37 + 5) % 256


def write(folder: Path, name: str, family: str = "qwen3_moe", seed: int = 0, **changes: Any) -> Checkpoint:
    writer, settings = FORMATS[name]
    return writer(folder, moe(family, **changes), seed=seed, **settings)


def experts_of(model: nn.Module) -> dict[str, PackedExperts]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedExperts)}


def generated(model: Any, **settings: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    tokens: Tensor = model.generate(IDS, attention_mask=mask, do_sample=False, max_new_tokens=12, **settings)
    return tokens


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_loaded_model_computes_what_the_dense_one_does(tmp_path: Path, family: str, name: str) -> None:
    checkpoint = write(tmp_path, name, family)
    model, reference = load(checkpoint, dtype=torch.float32), checkpoint.reference()
    experts = experts_of(model)
    assert len(experts) == (1 if family in ("deepseek_v3", "glm4_moe") else 2)
    for path, module in experts.items():
        dense, turn = reference.get_submodule(path), family == "llama4_text"
        for weight, parameter in (("gate_up", dense.gate_up_proj), ("down", dense.down_proj)):
            exact = parameter.transpose(1, 2) if turn else parameter
            assert torch.equal(module.dequantize(weight, torch.float32), exact)
        assert (module.gate_up_zeros is None) == (module.down_zeros is None) == (name in ("ct-group", "ct-channel"))
    linear = {path for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    in_files = {path.replace(".block_sparse_moe.", ".mlp.") for path in checkpoint.packed}
    assert linear == {path for path in in_files if ".experts." not in path}
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-6, atol=1e-6)
    assert torch.equal(generated(model), generated(reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ct-group-asym", "gptq", "awq-fp32-scales"])
def test_logits_in_half_precision_are_as_near_as_the_dense_models(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    checkpoint = write(tmp_path, name)
    model, plain, exact = load(checkpoint, dtype=dtype), checkpoint.reference(dtype), checkpoint.reference()
    for path, module in experts_of(model).items():
        assert torch.equal(module.dequantize("gate_up", dtype), plain.get_submodule(path).gate_up_proj)
        assert torch.equal(module.dequantize("down", dtype), plain.get_submodule(path).down_proj)
    ours, theirs = ((logits(m).double() - logits(exact)).norm() for m in (model, plain))
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_transformers_own_loader_agrees(tmp_path: Path, family: str) -> None:
    write(tmp_path, "ct-group", family)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for path, module in experts_of(load(tmp_path, dtype=torch.bfloat16)).items():
        theirs = dense.get_submodule(path)
        assert torch.equal(module.dequantize("gate_up", torch.bfloat16), theirs.gate_up_proj)
        assert torch.equal(module.dequantize("down", torch.bfloat16), theirs.down_proj)


# -- what the files call things ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"), [*PAIRS[: len(FORMATS)], ("mixtral", "gptq"), ("minimax_m2", "ct-group-asym")]
)
def test_the_state_dict_is_what_the_files_hold(tmp_path: Path, family: str, name: str) -> None:
    checkpoint = write(tmp_path / "a", name, family)
    model = load(checkpoint, dtype=torch.float32)
    state, files = model.state_dict(), checkpoint.tensors()
    assert set(state) == set(files)
    for key, tensor in files.items():
        if key.startswith(checkpoint.packed):
            assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key
        else:
            assert torch.equal(state[key], tensor.float()), key
    other = load(write(tmp_path / "b", name, family, seed=1), dtype=torch.float32)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert set(copied.state_dict()) == set(files) and torch.equal(logits(copied), logits(model))


def test_mixtral_under_the_names_of_others(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "gptq", "mixtral")
    old = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    tensors = checkpoint.tensors()
    assert all(any(part in name for name in tensors) for part in old)
    for part, new in old.items():
        tensors = {name.replace(part, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(model), logits(checkpoint.reference()))
    assert set(model.state_dict()) == set(tensors)


def test_a_text_model_from_the_files_of_one_that_also_sees(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "gptq", "qwen3_5_moe_text")
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in checkpoint.tensors().items()}
    save_file(tensors | {"model.visual.patch_embed.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    model = load(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(checkpoint.reference()), rtol=1e-6, atol=1e-6)
    assert set(model.state_dict()) == set(tensors)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq", "mixtral").tensors()
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.block_sparse_moe.gate.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"hold both .*gate\.weight and .*gate\.weight, which stand for the same"):
        load(tmp_path)


@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_config_json_may_speak_of_the_models_paths_or_the_files(tmp_path: Path, block: str) -> None:
    checkpoint = write_compressed_tensors(tmp_path, moe("mixtral"), targets=("re:.*experts.*",))
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["targets"] = [rf"re:model\.layers\.\d\.{block}\.experts\..*"]
    set_quantization(tmp_path, quantization | {"ignore": [f"model.layers.0.{block}.gate"]})
    assert len(experts_of(load(checkpoint))) == 2


def test_a_routers_name_in_modules_to_not_convert_is_no_experts(tmp_path: Path) -> None:
    checkpoint = write_awq(tmp_path, moe("qwen2_moe", mlp_only_layers=[0]), modules_to_not_convert=["gate", "lm_head"])
    model = load(checkpoint, dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.gate_proj, PackedLinear) and len(experts_of(model)) == 1
    assert torch.equal(logits(model), logits(checkpoint.reference()))


# -- formats -----------------------------------------------------------------------------------------------------------


def test_zeros_that_are_all_8_need_no_memory_but_come_back(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "a", "gptq")
    tensors = checkpoint.tensors()
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name] = pack_nibbles(torch.full((tensors[name].shape[0], 8 * tensors[name].shape[1]), 7), 1)
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    model = load(tmp_path / "a", dtype=torch.float32)
    (first, *_), expected = experts_of(model).values(), logits(model)
    assert first.gate_up_zeros is None and first.down_zeros is None
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items() if name.endswith("qzeros"))
    other = load(write(tmp_path / "b", "gptq", seed=1), dtype=torch.float32)
    model.load_state_dict(other.state_dict())
    assert first.gate_up_zeros is not None and torch.equal(logits(model), logits(other))
    model.load_state_dict(state)
    assert first.gate_up_zeros is None and torch.equal(logits(model), expected)


def test_biases_of_routers_stay_in_float32_as_transformers_has_them(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq", "deepseek_v3").tensors()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = torch.rand(4)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path, dtype=torch.bfloat16)  # the router's weight too from transformers 5.24 on
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, tensors[name])
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_dense_experts_in_the_models_own_form_stay_dense(tmp_path: Path) -> None:
    checkpoint = write_compressed_tensors(tmp_path, moe("qwen3_moe"), targets=("re:.*self_attn.*",))
    reference, tensors = checkpoint.reference(), checkpoint.tensors()
    each = {name: tensors.pop(name) for name in [*tensors] if ".experts." in name}
    for path, module in random_checkpoint.fused_experts(reference):
        assert f"{path}.0.gate_proj.weight" in each
        tensors |= {f"{path}.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path, dtype=torch.float32)
    assert not experts_of(model) and len(random_checkpoint.fused_experts(model)) == 2
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-6, atol=1e-6)


def test_the_whole_model_goes_to_the_device(tmp_path: Path) -> None:
    model = load(write(tmp_path, "awq"), device="meta")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write(tmp_path, "ct-group", num_hidden_layers=1)
    capsys.readouterr()
    inductor_ext.from_pretrained(checkpoint.folder)
    assert "Loading: 100%" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_no_more_memory_than_the_packed_model_and_one_tensor(tmp_path: Path) -> None:
    write(tmp_path / "tiny", "awq")
    write_wide_awq(tmp_path / "wide", layers=2)
    total = (tmp_path / "wide" / "model.safetensors").stat().st_size
    arguments = [sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path / "wide"]
    growth = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    slack = 16e6  # what an expert's largest tensor needs on its way is a third of that
    assert 6 * slack < total < 150e6, "else a loader that holds a layer twice would pass"
    assert total * 0.9 < growth < total + slack


def write_wide_awq(folder: Path, layers: int) -> None:
    """A checkpoint of the same words everywhere, wide experts and few tokens."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 32, "head_dim": 512}
    config = moe("qwen3_moe", num_hidden_layers=layers, **sizes)
    config.save_pretrained(folder)
    set_quantization(folder, {"quant_method": "awq", "bits": 4, "group_size": 128})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {
        name: torch.ones(p.shape, dtype=torch.float16) for name, p in model.named_parameters() if "proj" not in name
    }
    experts = [f"model.layers.{i}.mlp.experts.{e}" for i in range(layers) for e in range(32)]
    linear = {path: module.weight.shape for path, module in model.named_modules() if path.endswith("_proj")}
    linear |= {f"{path}.{name}": (1024, 1024) for path in experts for name in ("gate_proj", "up_proj", "down_proj")}
    for path, (n, k) in linear.items():
        tensors[f"{path}.qweight"] = torch.full((k, n // 8), 0x12345678, dtype=torch.int32)
        tensors[f"{path}.qzeros"] = torch.full((k // 128, n // 8), 0x11111111, dtype=torch.int32)
        tensors[f"{path}.scales"] = torch.ones(k // 128, n, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")


def test_a_qwen3_moe_from_disk_runs_rewritten_and_generates_the_dense_models_tokens(
    tmp_path: Path, without_codegen: None
) -> None:
    checkpoint = write_compressed_tensors(tmp_path, moe("qwen3_moe"), symmetric=False)
    model, reference = load(checkpoint, dtype=torch.float32), checkpoint.reference()
    torch.compiler.reset()
    report = inductor_ext.explain(model, IDS)
    assert not report.left_alone
    torch.compiler.reset()
    with torch.device("cpu"):  # a default device, with which Dynamo has no graph for some methods
        assert inductor_ext.explain(model, IDS).rewritten == report.rewritten
    rewritten = [(entry.where, entry.op) for entry in report.rewritten]
    layers = [(f"model.layers.{i}.mlp.experts", "w4a16::moe") for i in range(2)]
    assert [pair for pair in rewritten if pair[1] != "w4a16::linear"] == layers and len(rewritten) == 2 * (4 + 1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="w4a16", fullgraph=True, options={"w4a16.strict": True})
    torch.testing.assert_close(logits(compiled), logits(reference), rtol=1e-5, atol=1e-5)
    wanted = generated(reference)
    model.forward = torch.compile(model.forward, backend="w4a16", options={"w4a16.strict": True})
    assert torch.equal(generated(model), wanted)
