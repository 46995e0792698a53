"""Tokens a second that whole models generate on a GPU, one after the other: packed int4 with backend="w4a16", the same
model with backend="inductor", and the dense bfloat16 model. Each has a process of its own.

    python bench/decode_gpu.py [--models llama qwen3_moe] [--layers 4] [--tokens 64] [--json FILE]

The models have the sizes of Llama-3-8B and Qwen3-30B-A3B in all but their layers, which are few, and their vocabulary,
which is small so that head and embedding do not outweigh those. Weights are random, symmetric int4 in groups of 128, in
the modules that inductor_ext.from_pretrained makes; the dense model has the same weights, dequantised. All are compiled
with mode="reduce-overhead" and have transformers' static cache. "gathered" is Inductor on experts that are dequantised
after a token's are chosen, which suits one token; as loaded all experts are dequantised.

A time is that of a token by the clock, with all that Python does for it; the median over runs of 8 tokens. "GPU" is the
time the GPU was busy for a token, as the profiler has it: with few layers Python may be what takes longer. "off" is how
far the logits of the first token are from the dense model's. "compile s" is the time until these are there, with what a
fresh process loads for it. The script fails if a layer was not computed by the Triton kernels.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_time import DEVICE, about
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig, StaticCache
from transformers import __version__ as transformers_version

from inductor_ext import kernels
from inductor_ext.loader import _parameters_on_meta
from inductor_ext.loader.config import Scheme
from inductor_ext.loader.experts import Canonical, PackedExperts
from inductor_ext.loader.modules import CompressedTensorsLinear, PackedLinear

GROUP = 128
SCHEME = Scheme("compressed-tensors", GROUP, zeros=False)
PROMPT, CACHE = 16, 512
RUN = 8
"""Tokens that are timed together."""
COMMON = {"vocab_size": 8192, "max_position_embeddings": CACHE, "bos_token_id": None, "eos_token_id": None}


def configs(layers: int) -> dict[str, PretrainedConfig]:
    return {
        "llama": LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            **COMMON,
        ),
        "qwen3_moe": Qwen3MoeConfig(
            num_hidden_layers=layers,
            hidden_size=2048,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            **COMMON,
        ),
    }


# -- models ------------------------------------------------------------------------------------------------------------


def empty(config: PretrainedConfig) -> Any:
    """Parameters on the meta device."""
    with _parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def packed_model(config: PretrainedConfig) -> Any:
    """The same weights in every process."""
    torch.manual_seed(0)
    model = empty(config)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            model.set_submodule(path, CompressedTensorsLinear(module, SCHEME))
        elif isinstance(getattr(module, "down_proj", None), nn.Parameter):
            gate_up, down = (canonical(p) for p in (module.gate_up_proj, module.down_proj))
            model.set_submodule(path, PackedExperts(module.act_fn, gate_up, down))
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: drawn(name, t) for name, t in tensors.items() if t is not None and t.is_meta}
    return model.to(DEVICE)


def canonical(like: Tensor) -> Canonical:
    E, N, K = like.shape
    codes = torch.empty(E, N, K // 8, dtype=torch.int32, device="meta")
    return Canonical(codes, torch.empty(E, N, K // GROUP, dtype=torch.bfloat16, device="meta"), None)


def drawn(name: str, like: Tensor) -> Tensor:
    """Codes, the shape that is stored beside them, scales, norms, or other weights."""
    if name == "weight_shape":
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.dtype == torch.int32:
        value = torch.randint(-(2**31), 2**31 - 1, like.shape, dtype=torch.int32, device=DEVICE)
    elif "scale" in name:
        value = (torch.rand(like.shape, device=DEVICE) + 0.5) / (5 * (like.shape[-1] * GROUP) ** 0.5)
        return value.bfloat16()
    elif like.dim() == 1:
        value = torch.ones(like.shape, device=DEVICE)
    else:
        value = torch.randn(like.shape, device=DEVICE) / like.shape[-1] ** 0.5
    value = value.to(like.dtype)
    return nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value


def dense_model(config: PretrainedConfig, packed: Any) -> Any:
    """With the same weights."""
    tensors = dict(packed.named_parameters())
    for path, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            tensors[f"{path}.weight"] = module.dequantize(torch.bfloat16)
        elif isinstance(module, PackedExperts):
            for name in ("gate_up", "down"):
                tensors[f"{path}.{name}_proj"] = module.dequantize(name, torch.bfloat16)
    model = empty(config)
    model.load_state_dict(tensors, assign=True)
    return model.to(DEVICE)


# -- generating --------------------------------------------------------------------------------------------------------


class Generation:
    """A prompt, and after it one token at a time."""

    def __init__(self, model: Any, backend: str) -> None:
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        prompt = torch.arange(1, PROMPT + 1, device=DEVICE)[None]
        model(prompt, past_key_values=self.cache, position_ids=torch.arange(PROMPT, device=DEVICE)[None])
        self.compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
        self.token, self.position = prompt[:, -1:], torch.tensor([[PROMPT]], device=DEVICE)

    def next(self) -> Tensor:
        """The logits."""
        torch.compiler.cudagraph_mark_step_begin()
        given = {"past_key_values": self.cache, "position_ids": self.position}
        logits: Tensor = self.compiled(self.token, **given).logits[:, -1]
        self.token, self.position = logits.argmax(-1, keepdim=True), self.position + 1
        return logits

    def seconds(self, runs: int) -> float:
        """Of a token."""
        for _ in range(2 * RUN):
            self.next()
        times = []
        for _ in range(runs):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(RUN):
                self.next()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) / RUN)
        return statistics.median(times)

    def busy(self) -> float:
        """Seconds that the GPU works for a token."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(RUN):
                self.next()
            torch.cuda.synchronize()
        events = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
        return sum(event.self_device_time_total for event in events) / RUN / 1e6


def counted(op: str, calls: collections.Counter[str]) -> Callable[[], None]:
    """Counts the calls of the Triton kernel for this op from now on; the function ends that."""
    kernel = kernels.load_for(op, "triton")
    run = kernel.run

    def counting(*args: Any, **named: Any) -> Tensor:
        calls[op] += 1
        result: Tensor = run(*args, **named)
        return result

    kernel.run = counting
    return lambda: setattr(kernel, "run", run)


def first_logits(model: Any, generation: Generation, ours: bool) -> Tensor:
    """The script ends if a packed layer of ours was computed by anything but the Triton kernels."""
    calls: collections.Counter[str] = collections.Counter()
    ends = [counted(op, calls) for op in ("linear", "moe")]
    logits = generation.next().clone()
    for end in ends:
        end()
    for op, kind in (("linear", PackedLinear), ("moe", PackedExperts)):
        wanted = sum(isinstance(module, kind) for module in model.modules()) if ours else 0
        if calls[op] < wanted:
            raise SystemExit(f"{calls[op]} of {wanted} packed layers were computed by the Triton kernel for {op}.")
    return logits


@torch.no_grad()
def timed(config: PretrainedConfig, way: str, runs: int) -> dict[str, Any]:
    """Seconds until a first token's logits, of a token by the clock, and of a token on the GPU; and those logits."""
    model = packed_model(config)
    if way == "bfloat16":
        model = dense_model(config, model)
    if way == "gathered":
        PackedExperts._grouped = PackedExperts._gathered  # type: ignore[method-assign]
    begin = time.perf_counter()
    generation = Generation(model, "w4a16" if way == "w4a16" else "inductor")
    logits = first_logits(model, generation, way == "w4a16").float()
    ready = time.perf_counter() - begin
    seconds = generation.seconds(runs)
    return {"ready": ready, "seconds": seconds, "busy": generation.busy(), "logits": logits.tolist()}


def timed_alone(config: PretrainedConfig, way: str, runs: int) -> dict[str, Any]:
    """In a fresh process: after another way in the same one a token took up to twice as long by the clock, not every
    time. What is raised there is raised here, with its traceback."""
    # Not a multiprocessing.Pool, which waits for ever where a task ends by SystemExit or its process dies.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(timed, config, way, runs).result()


def measure(name: str, config: PretrainedConfig, runs: int) -> list[dict[str, Any]]:
    ways = ["bfloat16", "w4a16", "inductor"]
    if name == "qwen3_moe":
        ways.append("gathered")
    results: list[dict[str, Any]] = []
    truth = None
    for way in ways:
        found = timed_alone(config, way, runs)
        logits, seconds, busy = torch.tensor(found["logits"]), found["seconds"], found["busy"]
        truth = logits if truth is None else truth
        off = float((logits - truth).norm() / truth.norm())
        results.append({"model": name, "way": way, "seconds": seconds, "busy": busy, "off": off})
        print(
            f"{name:>10} {way:>10} {1 / seconds:12.1f} {seconds * 1e6:12.0f} {busy * 1e6:12.0f}"
            f" {off:10.1e} {found['ready']:10.1f}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=configs(1), default=list(configs(1)))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (reason := kernels.why_unusable("linear", "triton")) is not None:
        raise SystemExit(reason)
    document: dict[str, Any] = about() | {"transformers": transformers_version, "layers": options.layers}
    print("# " + ", ".join(f"{key} {value}" for key, value in document.items()))
    heads = ("tokens/s", "us/token", "GPU us/token")
    print(f"{'model':>10} {'way':>10} {heads[0]:>12} {heads[1]:>12} {heads[2]:>12} {'off':>10} {'compile s':>10}")
    chosen = {name: configs(options.layers)[name] for name in options.models}
    results = [row for name, config in chosen.items() for row in measure(name, config, -(-options.tokens // RUN))]
    if options.json:
        options.json.write_text(json.dumps(document | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
