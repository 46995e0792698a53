"""The whole way, once: a random W4A16 Llama is written to disk, loaded packed, compiled, generates, and is compared.

    python bench/demo.py

Exits with 1 if the compiled model is farther from the float32 dequantised model than 1.1 times what the dense bfloat16
model is.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import decompress, dense_model, write_compressed_tensors, write_tokenizer
from torch import Tensor
from transformers import LlamaConfig
from transformers.utils import logging as transformers_logging

import inductor_ext
from inductor_ext.generate import greedy

PROMPT = torch.arange(1, 17).view(1, 16)
NEW_TOKENS = 32
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=256,
    initializer_range=0.05,
    bos_token_id=None,
    eos_token_id=None,  # a random model would end its text at random
)


def main() -> int:
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_compressed_tensors(folder, CONFIG, group_size=128)
        write_tokenizer(folder, CONFIG.vocab_size)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(
            f"compressed-tensors wrote a random W4A16 Llama of {CONFIG.num_hidden_layers} layers, {size / 1e6:.1f} MB."
        )
        model = inductor_ext.from_pretrained(folder, dtype=torch.bfloat16)
        dense = decompress(folder)
        exact, plain = (dense_model(folder, dense, dtype) for dtype in (torch.float32, torch.bfloat16))

    print("\n" + str(inductor_ext.explain(model, PROMPT)) + "\n")
    times = {}
    for backend in ("w4a16", "inductor"):
        torch.compiler.reset()
        start = time.perf_counter()
        done = greedy(model, PROMPT, NEW_TOKENS, backend=backend)
        times[backend] = done.seconds_per_token or float("nan")
        print(f"{backend:>8}: {NEW_TOKENS} tokens in {time.perf_counter() - start:.1f} s with compiling,", end=" ")
        print(f"then {1e3 * times[backend]:.2f} ms/token")
        if backend == "w4a16":
            tokens = done.tokens
    print(f"  {times['inductor'] / times['w4a16']:.1f} times as fast as backend='inductor' on the same packed model\n")
    return compare(torch.compile(model, backend="w4a16"), plain, exact, tokens)


@torch.no_grad()
def compare(compiled: Any, plain: Any, exact: Any, tokens: Tensor) -> int:
    """Prints how far two bfloat16 models are from the float32 one over the generated text; returns the exit code."""
    truth = exact(tokens).logits
    errors = [distance(model(tokens).logits, truth) for model in (compiled, plain)]
    chosen, first = tokens[0, PROMPT.shape[1] :], truth[0, PROMPT.shape[1] - 1 : -1].argmax(-1)
    print(f"Generated: {' '.join(map(str, chosen.tolist()))}")
    print(f"  {int((chosen == first).sum())} of {NEW_TOKENS} are what the float32 dequantised model chooses there.")
    print("Logits, relative distance to the float32 dequantised model:")
    print(f"  packed, compiled, bfloat16: {errors[0]:.2e}\n  dense, bfloat16:            {errors[1]:.2e}")
    right = errors[0] <= 1.1 * errors[1]
    print("As near as the dense model." if right else "WRONG: farther than 1.1 times the dense model.")
    return 0 if right else 1


def distance(found: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - truth.double()) / torch.linalg.vector_norm(truth.double()))


if __name__ == "__main__":
    sys.exit(main())
