"""Tiny gpt-oss checkpoints with experts in MXFP4, as OpenAI and as AMD Quark store them, and what they stand for.
Nothing here uses the package's own readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import Checkpoint, set_quantization
from mxfp4_problems import e2m1
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

OPENAI = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
WEIGHT = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": False}
INPUT = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}


def quark(input_scales: bool) -> dict[str, Any]:
    settings = {
        "weight": WEIGHT,
        "input_tensors": INPUT if input_scales else None,
        "output_tensors": None,
        "bias": None,
    }
    return {
        "quant_method": "quark",
        "global_quant_config": settings,
        "layer_quant_config": {},
        "exclude": ["*self_attn*", "*router*", "lm_head"],
        "export": {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": []},
    }


def gpt_oss(**changes: Any) -> GptOssConfig:
    """Two layers with 8 experts of which a token gets 2; gates and ups reach beyond the limit."""
    sizes = {"vocab_size": 256, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "rope_scaling": None}
    return GptOssConfig(**sizes | heads | ends | {"sliding_window": 8, "initializer_range": 0.1, **changes})


class GptOss(Checkpoint):
    def reference(self, dtype: torch.dtype = torch.float32) -> Any:
        model = AutoModelForCausalLM.from_config(gpt_oss(), dtype=dtype).eval()
        model.load_state_dict({name: t.to(dtype) for name, t in self.dense.items()})
        return model


def write_gpt_oss(folder: Path, *, each: bool = False, scales: tuple[float, float] | None = None) -> GptOss:
    """each: Quark's layout. scales: input scales of both projections, which makes it W4A8; experts' differ a little,
    these are the largest."""
    torch.manual_seed(0)
    config = gpt_oss()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            parameter.data.normal_(std=0.5)
    dense = {name: t.clone() for name, t in model.state_dict().items()}
    stored, packed = dict(dense), []
    for name in list(dense):
        path, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            continue
        E, K, N = stored.pop(name).shape
        codes = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(121, 125, (E, N, K // 32), dtype=torch.uint8)
        values = e2m1(torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int())
        dense[name] = (values * 2.0 ** (exponents.double() - 127)[..., None]).flatten(-2).transpose(1, 2).float()
        packed.append(name)
        if not each:
            stored |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
            continue
        bias = stored.pop(f"{name}_bias")
        for e in range(E):
            own = f"{path}.{e}.{leaf}"
            stored |= {f"{own}.weight": codes[e].flatten(1).clone(), f"{own}.weight_scale": exponents[e].clone()}
            stored[f"{own}.bias"] = bias[e].clone()
            if scales is not None:
                scale = scales[leaf == "down_proj"] * (1 if e == 3 else 0.9)
                stored[f"{own}.input_scale"] = torch.tensor(scale)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    set_quantization(folder, quark(scales is not None) if each else OPENAI)
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return GptOss(folder, dense, tuple(packed))


class Rounded(torch.nn.Module):
    """transformers' experts with both projections' inputs rounded to fp8, in float64 in between."""

    def __init__(self, experts: Any, scales: tuple[float, float], e4m3: Any) -> None:
        super().__init__()
        self.experts, self.e4m3 = experts, e4m3
        self.scales = [float(torch.tensor(scale)) for scale in scales]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        m, out = self.experts, torch.zeros(x.shape, dtype=torch.float64)
        for e in ids.unique().tolist():
            t, j = (ids == e).nonzero(as_tuple=True)
            h = self._rounded(x[t].double(), 0) @ m.gate_up_proj[e].double() + m.gate_up_proj_bias[e].double()
            h = self._rounded(m._apply_gate(h), 1)
            y = h @ m.down_proj[e].double() + m.down_proj_bias[e].double()
            out.index_add_(0, t, y * weights[t, j, None].double())
        return out.to(x.dtype)

    def _rounded(self, x: Tensor, projection: int) -> Tensor:
        scale = self.scales[projection]
        return scale * self.e4m3((x / scale).float().double())
