"""Mixtures of experts that `inductor_ext.from_pretrained` refuses, with all that is wrong; and state dicts likewise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import moe, set_quantization, write_awq, write_compressed_tensors, write_gptq
from safetensors.torch import save_file
from test_loader import load
from test_loader_moe import experts_of, write
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from inductor_ext.loader.stream import CheckpointError


def test_every_wrong_tensor_is_listed_in_one_error(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gptq", "mixtral").tensors()
    path = "model.layers.0.block_sparse_moe.experts"
    del tensors[f"{path}.2.w1.scales"]
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{path}.3.w2.{name}"]
    tensors[f"{path}.4.w1.qweight"] = torch.zeros(8, 96, dtype=torch.int32)
    tensors[f"{path}.0.w3.qweight"] = torch.zeros(8, 64, dtype=torch.int32)
    tensors[f"{path}.1.w1.g_idx"] = torch.zeros(64, dtype=torch.int64)
    tensors[f"{path}.1.w2.scales"] = tensors[f"{path}.1.w2.scales"].float()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    in_model = "model.layers.0.mlp.experts"
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        f"dtype: {path}.1.w1.g_idx is int64, the model needs int32",
        f"dtype: {path}.1.w2.scales is float32, the model needs float16",
        f"missing: {in_model}.2.w1.scales, float16 [2, 96]",
        f"missing: {in_model}.3.w2.g_idx, int32 [96]",
        f"missing: {in_model}.3.w2.qweight, int32 [12, 64]",
        f"missing: {in_model}.3.w2.qzeros, int32 [3, 8]",
        f"missing: {in_model}.3.w2.scales, float16 [3, 64]",
        f"shape: {path}.0.w3.qweight is [8, 64], the model needs [8, 96]",
        f"surplus: {path}.4.w1.qweight, int32 [8, 96]",
    ]


@pytest.mark.parametrize("writer", [write_gptq, write_compressed_tensors], ids=["gptq", "compressed-tensors"])
def test_act_order_is_refused_for_experts_and_every_layer_named(tmp_path: Path, writer: Any) -> None:
    order = {"desc_act": True} if writer is write_gptq else {"group_index": True}
    checkpoint = writer(tmp_path, moe("qwen3_moe"), **order)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    listed = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(listed) == len([path for path in checkpoint.packed if ".experts." in path]) == 24
    name = "g_idx" if writer is write_gptq else "weight_g_idx"
    assert (
        f"values: model.layers.1.mlp.experts has 3.down_proj in act-order ({name} is not k // 32), which experts cannot"
        " have" in listed
    )


def test_a_wrong_weight_shape_is_named(tmp_path: Path) -> None:
    tensors = write(tmp_path, "ct-group").tensors()
    tensors["model.layers.0.mlp.experts.1.up_proj.weight_shape"][0] = 95
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"experts has 1\.up_proj\.weight_shape \[95, 64\], the model needs \[96, "
    ):
        load(tmp_path)


GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 64}


def config_of(model_type: str, folder: Path, **sizes: Any) -> None:
    small = {"num_hidden_layers": 1, "vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    AutoConfig.for_model(model_type, **small | sizes).save_pretrained(folder)
    set_quantization(folder, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "model.safetensors")


def test_experts_that_compute_something_else_are_refused(tmp_path: Path) -> None:
    config_of("gpt_oss", tmp_path, **GPT_OSS)
    with pytest.raises(
        ValueError,
        match=r"GptOssForCausalLM is a mixture of experts \(model\.layers\.0\.mlp\.experts\), "
        r"and GptOssExperts joins gate and up in a way of its own\. Supported are dense decoder models and",
    ):
        load(tmp_path)


def change(attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, attribute, value)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (change("has_bias", True), "and Qwen3MoeExperts has biases"),
        (change("has_post_expert_norm", True), "and Qwen3MoeExperts has a norm after each expert"),
        (change("has_gate", False), "and Qwen3MoeExperts has no gates"),
        (lambda module: delattr(module, "is_transposed"), "and Qwen3MoeExperts is no kind of experts that is known"),
        (change("is_transposed", True), r"and the shapes \[4, 192, 64\] and \[4, 64, 96\] are not those of gates and"),
    ],
)
def test_experts_that_are_not_understood_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: Callable[[Any], None], reason: str
) -> None:
    checkpoint, made = write(tmp_path, "gptq"), Qwen3MoeExperts.__init__

    def init(self: Any, config: Any) -> None:
        made(self, config)
        changed(self)

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", init)
    with pytest.raises(ValueError, match=reason):
        load(checkpoint)


def test_experts_in_an_unknown_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, made = write(tmp_path, "gptq"), Qwen3MoeExperts.__init__

    def init(self: Any, config: Any) -> None:
        made(self, config)
        self.down_proj = nn.Parameter(self.down_proj.unsqueeze(0))

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", init)
    with pytest.raises(
        ValueError, match=r"experts of an unknown kind \(model\.layers\.0\.mlp\.experts\.gate_up_proj\)"
    ):
        load(checkpoint)


def test_experts_that_the_files_hold_dense_one_by_one_are_refused(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path, moe("qwen3_moe"), targets=("re:.*self_attn.*",))
    with pytest.raises(
        ValueError, match=r"experts \(model\.layers\.0\.mlp\.experts\), which the files hold dense, each"
    ):
        load(tmp_path)


def test_experts_without_any_tensor_in_the_files_are_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, "gptq")
    tensors = {name: tensor for name, tensor in checkpoint.tensors().items() if "layers.1.mlp.experts" not in name}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"\(model\.layers\.1\.mlp\.experts\), and the files hold no packed tensors of"
    ):
        load(tmp_path)


def test_experts_that_config_json_calls_dense_are_refused(tmp_path: Path) -> None:
    write_awq(tmp_path, moe("qwen3_moe"), modules_to_not_convert=["layers.1.mlp.experts"])
    with pytest.raises(
        ValueError, match=r"by config\.json this is no packed tensor: model\.layers\.1\.mlp\.experts\.0\.ga"
    ):
        load(tmp_path)


def test_gates_and_ups_that_are_stored_differently_are_refused(tmp_path: Path) -> None:
    write_gptq(tmp_path, moe("qwen3_moe"), dynamic={".*up_proj": {"group_size": 64}})
    with pytest.raises(
        ValueError, match=r"whose gates and ups are stored in different ways: .*group_size=32.* and .*=64"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"moe_intermediate_size": 80}, r"cannot be stored as awq: K = 80 is not a multiple of the group size 32"),
        ({"moe_intermediate_size": 100, "group": 4}, r"cannot be stored as awq: N = 100 is not a multiple of 8"),
        ({"hidden_size": 36, "group": 4}, r"cannot be stored as awq: K = 36 is not a multiple of 8, so its codes"),
    ],
)
def test_sizes_that_cannot_be_packed_are_refused(tmp_path: Path, sizes: dict[str, int], reason: str) -> None:
    group = sizes.pop("group", 32)
    moe("qwen3_moe", **sizes).save_pretrained(tmp_path)
    set_quantization(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": group})
    save_file({"model.layers.0.mlp.experts.0.up_proj.qweight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=reason):
        load(tmp_path)


def test_a_state_dict_that_does_not_fit_is_named_and_nothing_of_it_is_taken(tmp_path: Path) -> None:
    model = load(write(tmp_path / "a", "gptq", num_hidden_layers=1), dtype=torch.float32)
    state = load(write(tmp_path / "b", "gptq", num_hidden_layers=1, seed=1), dtype=torch.float32).state_dict()
    (experts,) = experts_of(model).values()
    before, path = experts.gate_up_qweight.clone(), "model.layers.0.mlp.experts"
    state[f"{path}.1.up_proj.qweight"] = torch.zeros(3, dtype=torch.int32)
    state[f"{path}.2.up_proj.g_idx"] = state[f"{path}.2.up_proj.g_idx"].flip(0)
    del state[f"{path}.3.up_proj.scales"]
    state[f"{path}.4.up_proj.scales"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    for said in (
        f"{path}.1.up_proj.qweight is torch.int32 [3]; torch.int32 [8, 96] is needed",
        f"{path} has 2.up_proj in act-order",
        f'Missing key(s) in state_dict: "{path}.3.up_proj.scales"',
        f'Unexpected key(s) in state_dict: "{path}.4.up_proj.scales"',
    ):
        assert said in str(error.value)
    assert torch.equal(experts.gate_up_qweight, before)
