"""The whole way, for a dense model and for a mixture of experts: a random W4A16 checkpoint is written to disk, loaded
packed, compiled, generates, and is compared.

    python bench/demo.py [FOLDER]

FOLDER keeps the checkpoints, for `python -m inductor_ext run FOLDER/llama --prompt "w1 w2 w3"`.
Exits with 1 if an int4 matmul was left alone, or if a compiled model is farther from the float32 dequantised model than
1.1 times what the dense bfloat16 model is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import decompress, dense_model, write_compressed_tensors, write_tokenizer
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig
from transformers.utils import logging as transformers_logging

import inductor_ext
from inductor_ext.generate import greedy

PROMPT = torch.arange(1, 17).view(1, 16)
TEXTS = torch.randperm(1024, generator=torch.Generator().manual_seed(0))[:96].view(12, 8)
NEW_TOKENS = 32
SIZES = {
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": None,  # a random model would end its text at random
}
CONFIGS = {
    "llama": LlamaConfig(
        num_hidden_layers=2,
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=4,
        **SIZES,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        num_hidden_layers=1,
        hidden_size=512,
        moe_intermediate_size=256,
        num_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        **SIZES,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    kept: Path | None = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        done = [run(config, (kept or Path(temporary)) / name) for name, config in CONFIGS.items()]
    return 0 if all(done) else 1


def run(config: PretrainedConfig, folder: Path) -> bool:
    """Does it all with one model; says if everything was rewritten and is right."""
    torch.compiler.reset()
    model, plain, exact = prepare(config, folder)
    report = inductor_ext.explain(model, PROMPT)
    print(f"\n{report}\n")
    tokens = generate(model)
    near = compare(torch.compile(model, backend="w4a16"), plain, exact, tokens)
    return near and not report.left_alone


def prepare(config: PretrainedConfig, folder: Path) -> tuple[Any, Any, Any]:
    """Writes a checkpoint; returns the packed model, and the dense ones in bfloat16 and float32."""
    transformers_logging.disable_progress_bar()
    write_compressed_tensors(folder, config, group_size=128)
    write_tokenizer(folder, config.vocab_size)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    print(f"compressed-tensors wrote a random W4A16 {folder.name}, layers: {config.num_hidden_layers}, {size:.1f} MB.")
    packed = inductor_ext.from_pretrained(folder, dtype=torch.bfloat16)
    tensors = decompress(folder)
    return packed, dense_model(folder, tensors, torch.bfloat16), dense_model(folder, tensors, torch.float32)


def generate(model: Any) -> Tensor:
    """Prints the time a token takes with our backend and with Inductor alone; returns our tokens, int64 [1, T]."""
    done, seconds = {}, {}
    for backend in ("w4a16", "inductor"):
        torch.compiler.reset()
        start = time.perf_counter()
        done[backend] = greedy(model, PROMPT, NEW_TOKENS, backend=backend)
        seconds[backend] = done[backend].seconds_per_token
        print(f"{backend:>8}: {NEW_TOKENS} tokens in {time.perf_counter() - start:.1f} s with compiling,", end=" ")
        print(f"then {1e3 * seconds[backend]:.2f} ms/token")
    ratio = seconds["inductor"] / seconds["w4a16"]
    print(f"  {ratio:.1f} times as fast as backend='inductor' on the same packed model\n")
    return done["w4a16"].tokens


@torch.no_grad()
def compare(compiled: Any, plain: Any, exact: Any, tokens: Tensor) -> bool:
    """Prints what the float32 model makes of the generated tokens, and how far two bfloat16 models are from it over
    short texts; says if ours is near."""
    chosen, first = tokens[0, PROMPT.shape[1] :], exact(tokens).logits[0, PROMPT.shape[1] - 1 : -1].argmax(-1)
    print(f"Generated: {' '.join(map(str, chosen.tolist()))}")
    print(f"  {int((chosen == first).sum())} of {NEW_TOKENS} are what the float32 dequantised model chooses there.")
    truth = exact(TEXTS).logits
    errors = [distance(model(TEXTS).logits, truth) for model in (compiled, plain)]
    print("Logits, relative distance to the float32 dequantised model, median over the tokens of short texts:")
    print(f"  packed, compiled, bfloat16: {errors[0]:.2e}\n  dense, bfloat16:            {errors[1]:.2e}")
    right = errors[0] <= 1.1 * errors[1]
    print("As near as the dense model.\n" if right else "WRONG: farther than 1.1 times the dense model.")
    return right


def distance(found: Tensor, truth: Tensor) -> float:
    """The median over the tokens [T, vocabulary]: where a router's scores are all but equal, bfloat16 chooses another
    expert, and that token is far off, in any model."""
    difference = torch.linalg.vector_norm(found.double() - truth.double(), dim=-1)
    return float((difference / torch.linalg.vector_norm(truth.double(), dim=-1)).median())


if __name__ == "__main__":
    sys.exit(main())
