"""What torch.compile costs with backend="w4a16" against backend="inductor": the first call of a packed 32-layer Llama.

    python bench/compile_overhead.py [--layers 32] [--rounds 1] [--json build/compile_overhead.json]

Each measurement is a process of its own. "cold" begins with empty caches on disk, "warm" finds those of the cold one.
first call: seconds with capture, compilation and C++ compiler; later call: without, the median of seven. rewriting:
what of the first call went into recognising, proving and converting. The model is narrow (hidden size 64), so that
compiling is what is measured. Needs the extra "demo". Each number is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("inductor", "w4a16")


def write_checkpoint(folder: Path, layers: int) -> None:
    from random_checkpoint import write_compressed_tensors
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    write_compressed_tensors(folder, config, group_size=32)


@torch.no_grad()
def measure(backend: str, folder: Path) -> dict[str, Any]:
    """In this process: the seconds of the first call and of later ones, and of rewriting."""
    import inductor_ext
    from inductor_ext import backend as ours

    rewriting = []
    rewrite = ours.rewrite

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return rewrite(*args)
        finally:
            rewriting.append(time.perf_counter() - start)

    ours.rewrite = timed
    model = inductor_ext.from_pretrained(folder, dtype=torch.bfloat16, progress=False)
    ids = torch.arange(8).view(1, 8)
    compiled = torch.compile(model, backend=backend)
    calls = []
    for _ in range(8):
        start = time.perf_counter()
        compiled(ids, use_cache=False)
        calls.append(time.perf_counter() - start)
    return {"first_call": calls[0], "later_call": statistics.median(calls[1:]), "rewriting": sum(rewriting)}


def another_process(backend: str, folder: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", backend, str(folder)]
    # One thread: on a busy machine, threads of so narrow a model wait for each other longer than they work.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("build/compile_overhead.json"))
    parser.add_argument("--measure", nargs=2, metavar=("BACKEND", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure[0], Path(given.measure[1]))))
        return

    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name) / "model", given.layers)
        for i in range(given.rounds):
            for backend in BACKENDS:
                for state in ("cold", "warm"):
                    found = another_process(backend, Path(name) / "model", Path(name) / f"cache-{backend}-{i}")
                    results.setdefault((state, backend), []).append(found)

    rows = []
    print(f"{given.layers} layers, torch {torch.__version__}, {os.cpu_count()} CPUs, kernels on one thread; seconds")
    print(f"{'caches':<7} {'backend':<9} {'first call':>10} {'later call':>12} {'rewriting':>10}")
    for state, backend in sorted(results):
        runs = results[state, backend]
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append({"caches": state, "backend": backend, **row})
        numbers = f"{row['first_call']:10.2f} {row['later_call']:12.4f} {row['rewriting']:10.2f}"
        print(f"{state:<7} {backend:<9} {numbers}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"torch": torch.__version__, "cpus": os.cpu_count(), "layers": given.layers, "results": rows}
    given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
