"""`inductor_ext.from_pretrained`: checkpoints in the real formats against dense models made without the loader."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    Checkpoint,
    gemma3,
    llama,
    qwen3,
    set_quantization,
    write_awq,
    write_compressed_tensors,
    write_gptq,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PretrainedConfig

import inductor_ext
from inductor_ext import loader
from inductor_ext.loader.modules import PackedLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODELS: dict[str, Callable[..., PretrainedConfig]] = {"llama": llama, "qwen3": qwen3, "gemma3": gemma3}
FORMATS: dict[str, tuple[Callable[..., Checkpoint], dict[str, Any]]] = {
    "ct-group": (write_compressed_tensors, {}),
    "ct-group-asym": (write_compressed_tensors, {"symmetric": False}),
    "ct-channel": (write_compressed_tensors, {"group_size": None}),
    "ct-channel-asym-fp16": (
        write_compressed_tensors,
        {"group_size": None, "symmetric": False, "dtype": torch.float16},
    ),
    "ct-actorder": (write_compressed_tensors, {"group_index": True}),
    "ct-actorder-asym": (write_compressed_tensors, {"group_index": True, "symmetric": False}),
    "gptq": (write_gptq, {}),
    "gptq-v2": (write_gptq, {"v2": True}),
    "gptq-desc-act": (write_gptq, {"desc_act": True}),
    "gptq-channel-bf16": (write_gptq, {"group_size": -1, "scales_dtype": torch.bfloat16}),
    "awq": (write_awq, {}),
    "awq-fp32-scales": (write_awq, {"group_size": 64, "scales_dtype": torch.float32}),
}
IDS = (torch.arange(24).view(2, 12) * 37 + 5) % 256
every_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(folder: Path, name: str, config: PretrainedConfig, **changes: Any) -> Checkpoint:
    writer, settings = FORMATS[name]
    return writer(folder, config, **settings | changes)


def load(checkpoint: Checkpoint | Path, **settings: Any) -> Any:
    folder = checkpoint.folder if isinstance(checkpoint, Checkpoint) else checkpoint
    return inductor_ext.from_pretrained(folder, progress=False, **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}


@every_format
@pytest.mark.parametrize("family", MODELS)
def test_a_loaded_model_computes_what_the_dense_one_does(tmp_path: Path, family: str, name: str) -> None:
    checkpoint = write(tmp_path, name, MODELS[family]())
    for dtype in DTYPES:
        model = load(checkpoint, dtype=dtype)
        layers = packed_layers(model)
        assert set(layers) == set(checkpoint.packed) and len(layers) == 14
        for path, layer in layers.items():
            assert torch.equal(layer.dequantize(dtype), checkpoint.dense[f"{path}.weight"].to(dtype))
        # The weights are the same bits; a matmul may still read them in another order of memory.
        rounding = torch.finfo(dtype).eps * 8
        torch.testing.assert_close(logits(model), logits(checkpoint.reference(dtype)), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("settings", [{}, {"group_size": None}], ids=["group", "channel"])
def test_transformers_own_loader_agrees(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_compressed_tensors(tmp_path, llama(), **settings)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert isinstance(dense.model.layers[0].mlp.down_proj.weight, nn.Parameter)
    assert torch.equal(logits(load(tmp_path)), logits(dense))


@every_format
def test_the_state_dict_is_what_the_files_hold(tmp_path: Path, name: str) -> None:
    checkpoint = write(tmp_path / "a", name, llama())
    model = load(checkpoint, dtype=torch.float32)
    state, files = model.state_dict(), checkpoint.tensors()
    assert set(state) == set(files)
    for key, tensor in files.items():
        if key.startswith(checkpoint.packed):
            assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key
        else:
            assert torch.equal(state[key], tensor.float()), key
    other = load(write(tmp_path / "b", name, llama(), seed=1), dtype=torch.float32)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("name", ["ct-group", "ct-channel", "ct-actorder-asym", "gptq-desc-act", "awq"])
def test_a_loaded_model_is_captured_whole(tmp_path: Path, name: str) -> None:
    model = load(write(tmp_path, name, llama(num_hidden_layers=1)), dtype=torch.float32)
    expected = logits(model)
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.testing.assert_close(logits(torch.compile(model, backend=keep, fullgraph=True)), expected)
    (graph,) = graphs
    torch._dynamo.reset()
    with torch.device("cpu"):  # a default device, with which Dynamo has no graph for some methods
        torch.testing.assert_close(logits(torch.compile(model, backend=keep, fullgraph=True)), expected)
    # No custom op, whose target would be an OpOverload; and no value read back from a tensor.
    targets = [node.target for node in graph.graph.nodes]
    assert not [target for target in targets if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)]
    assert "item" not in targets


def test_ignored_layers_stay_dense(tmp_path: Path) -> None:
    ignore = ("lm_head", "re:.*down_proj$", "model.layers.0.self_attn.q_proj")
    checkpoint = write_compressed_tensors(tmp_path, llama(), ignore=ignore)
    # compressed-tensors writes the names it found; exports by other tools keep the patterns.
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    set_quantization(tmp_path, quantization | {"ignore": list(ignore)})
    model = load(checkpoint, dtype=torch.float32)
    assert set(packed_layers(model)) == set(checkpoint.packed) and len(checkpoint.packed) == 14 - 2 - 1
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    torch.testing.assert_close(logits(model), logits(checkpoint.reference()))


@pytest.mark.parametrize("targets", [("re:.*mlp.*",), ("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj")])
def test_only_targeted_layers_are_packed(tmp_path: Path, targets: tuple[str, ...]) -> None:
    checkpoint = write_compressed_tensors(tmp_path, llama(), targets=targets)
    model = load(checkpoint, dtype=torch.float32)
    assert set(packed_layers(model)) == set(checkpoint.packed) and len(checkpoint.packed) < 14
    torch.testing.assert_close(logits(model), logits(checkpoint.reference()))


@pytest.mark.parametrize(
    ("writer", "settings"),
    [
        (write_awq, {"modules_to_not_convert": ["down_proj"]}),
        (write_awq, {}),  # nothing in the config tells which layers were skipped
        (write_gptq, {"dynamic": {"-:.*down_proj": {}}}),
        (write_gptq, {}),
    ],
)
def test_layers_that_gptq_and_awq_skipped_stay_dense(tmp_path: Path, writer: Any, settings: dict[str, Any]) -> None:
    checkpoint = writer(tmp_path, llama(), left_dense=("lm_head", "down_proj"), **settings)
    model = load(checkpoint, dtype=torch.float32)
    assert set(packed_layers(model)) == set(checkpoint.packed) and len(checkpoint.packed) == 12
    torch.testing.assert_close(logits(model), logits(checkpoint.reference()))


@pytest.mark.parametrize(
    ("writer", "settings"), [(write_compressed_tensors, {"ignore": ()}), (write_gptq, {"left_dense": ("no layer",)})]
)
def test_a_quantised_lm_head_is_packed(tmp_path: Path, writer: Any, settings: dict[str, Any]) -> None:
    checkpoint = writer(tmp_path, llama(), **settings)
    model = load(checkpoint, dtype=torch.float32)
    assert "lm_head" in packed_layers(model)
    torch.testing.assert_close(logits(model), logits(checkpoint.reference()))


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    checkpoint = write_compressed_tensors(tmp_path, qwen3())
    assert "lm_head.weight" not in checkpoint.tensors()
    model = load(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" in model.state_dict()


def test_tied_embeddings_that_the_file_holds_twice_are_one_tensor_if_equal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = write_awq(tmp_path, qwen3())
    file = tmp_path / "model.safetensors"
    tensors = checkpoint.tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not caplog.records
    tensors["lm_head.weight"] += 1
    save_file(tensors, file)
    with caplog.at_level(logging.WARNING, logger="inductor_ext"):
        model = load(tmp_path)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].to(torch.bfloat16))
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"].to(torch.bfloat16))
    assert "lm_head" in caplog.text or "weight" in caplog.text


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    write_compressed_tensors(tmp_path / "one", llama())
    write_compressed_tensors(tmp_path / "many", llama(), max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert set(one) == set(many)
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_dtype_is_that_of_what_is_not_quantised(tmp_path: Path) -> None:
    checkpoint = write_compressed_tensors(tmp_path, gemma3())
    for dtype in DTYPES:
        model = load(checkpoint, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert {layer.weight_scale.dtype for layer in packed_layers(model).values()} == {torch.bfloat16}
        assert logits(model).dtype == dtype and model.config.dtype == dtype
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; it must be one of torch\.float16, torch\.bfloat16"):
        load(checkpoint, dtype=torch.int8)


def test_buffers_that_no_file_holds_are_those_of_a_fresh_model(tmp_path: Path) -> None:
    checkpoint = write_compressed_tensors(tmp_path, gemma3(rope_parameters=None, rope_local_base_freq=123.0))
    model, fresh = load(checkpoint, dtype=torch.float32), checkpoint.reference()
    buffers = {name: buffer for name, buffer in model.named_buffers() if "proj" not in name}
    assert {name.rpartition(".")[2] for name in buffers} >= {"embed_scale", "full_attention_inv_freq"}
    for name, buffer in buffers.items():
        assert torch.equal(buffer, fresh.get_buffer(name)), name
    sliding, full = (model.get_buffer(f"model.rotary_emb.{kind}_attention_inv_freq") for kind in ("sliding", "full"))
    assert not torch.equal(sliding, full)


def test_biases_of_quantised_layers_are_loaded(tmp_path: Path) -> None:
    checkpoint = write_gptq(tmp_path, llama(attention_bias=True))
    tensors = checkpoint.tensors()
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == 8
    for name in biases:
        tensors[name] = torch.randn(tensors[name].shape).to(torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path, dtype=torch.float32)
    layer, x = packed_layers(model)["model.layers.0.self_attn.k_proj"], torch.randn(3, 128)
    bias = tensors["model.layers.0.self_attn.k_proj.bias"].float()
    torch.testing.assert_close(layer(x), x @ checkpoint.dense["model.layers.0.self_attn.k_proj.weight"].T + bias)


def test_a_loaded_model_is_ready_to_generate(tmp_path: Path) -> None:
    checkpoint = write_compressed_tensors(tmp_path, llama())
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "eos_token_id": 255}))
    model = load(checkpoint)
    assert not model.training
    assert model.generation_config.max_new_tokens == 5
    assert not hasattr(model.config, "quantization_config")
    assert model.checkpoint_quantization["format"] == "pack-quantized"
    reference = checkpoint.reference()
    tokens = load(checkpoint, dtype=torch.float32).generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False)
    expected = reference.generate(
        IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=5, eos_token_id=255
    )
    assert tokens.shape == (2, 17) and torch.equal(tokens, expected)


def test_the_whole_model_goes_to_the_device(tmp_path: Path) -> None:
    model = load(write_awq(tmp_path, gemma3()), device="meta")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_progress_is_shown_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_compressed_tensors(tmp_path, llama(num_hidden_layers=1))
    capsys.readouterr()
    load(checkpoint)
    assert "Loading" not in capsys.readouterr().err
    inductor_ext.from_pretrained(checkpoint.folder)
    assert "Loading: 100%" in capsys.readouterr().err


def test_modules_made_after_loading_or_in_another_thread_are_real(tmp_path: Path) -> None:
    load(write_compressed_tensors(tmp_path, llama(num_hidden_layers=1)))
    assert not nn.Linear(2, 2).weight.is_meta
    with loader._parameters_on_meta(), ThreadPoolExecutor(1) as other:
        assert nn.Linear(2, 2).weight.is_meta
        assert not other.submit(nn.Linear, 2, 2).result().weight.is_meta


def test_a_repository_name_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_compressed_tensors(tmp_path / "cache", llama(num_hidden_layers=1))
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        files = ("model.safetensors", "pytorch_model.bin", "original/model.safetensors", "metal/config.json")
        asked.append(
            (name, list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        )
        return str(checkpoint.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert packed_layers(inductor_ext.from_pretrained("someone/model-w4a16", progress=False))
    assert asked == [("someone/model-w4a16", ["model.safetensors"])]
    assert packed_layers(inductor_ext.from_pretrained("cache", progress=False))
    for path in ("./someone/model", "cache2", "/no/folder", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            inductor_ext.from_pretrained(path)
    assert len(asked) == 1


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers, not installed here: pip install inductor-ext\[transf"):
        loader.from_pretrained("anywhere")


def test_importing_the_loader_imports_no_optional_package() -> None:
    code = (
        "import sys; from inductor_ext import from_pretrained;"
        "print(*({'transformers', 'safetensors', 'compressed_tensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


MEASURE = """
import sys, inductor_ext

def memory(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))

inductor_ext.from_pretrained(sys.argv[1], progress=False)  # imports, and what torch allocates once
before = memory("VmRSS:")
model = inductor_ext.from_pretrained(sys.argv[2], progress=False)
print(memory("VmHWM:") - before)  # the peak
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_no_more_memory_than_the_packed_model_and_one_layer(tmp_path: Path) -> None:
    write_awq(tmp_path / "tiny", llama(num_hidden_layers=1))
    layers, layer_bytes = 6, write_wide_awq(tmp_path / "wide", layers=6)
    files = sorted((tmp_path / "wide").glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    assert len(files) == 2 and layers * layer_bytes <= total <= 300e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "tiny", tmp_path / "wide"],
        capture_output=True,
        text=True,
        check=True,
    )
    growth, slack = int(done.stdout), 16e6
    assert files[0].stat().st_size > layer_bytes + 2 * slack, "else a loader that holds whole shards would pass"
    assert total * 0.95 < growth < total + layer_bytes + slack


def write_wide_awq(folder: Path, layers: int) -> int:
    """A checkpoint of random words in two shards, wide layers and few tokens; returns the bytes of one layer."""
    config = llama(num_hidden_layers=layers, hidden_size=2048, intermediate_size=8192, head_dim=512)
    config.save_pretrained(folder)
    set_quantization(folder, {"quant_method": "awq", "bits": 4, "group_size": 128})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        if not name.endswith("_proj.weight"):
            tensors[name] = torch.ones(parameter.shape, dtype=torch.float16)
            continue
        path, (n, k) = name.removesuffix(".weight"), parameter.shape
        tensors[f"{path}.qweight"] = torch.full((k, n // 8), 0x12345678, dtype=torch.int32)
        tensors[f"{path}.qzeros"] = torch.full((k // 128, n // 8), 0x11111111, dtype=torch.int32)
        tensors[f"{path}.scales"] = torch.ones(k // 128, n, dtype=torch.float16)
    half = {name for name in tensors if any(f"layers.{i}." in name for i in range(layers // 2))}
    shards = {"a.safetensors": half, "b.safetensors": set(tensors) - half}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for name, tensor in tensors.items() if "layers.0." in name)
