"""Time of one layer of routed experts on the CPU: torch.compile with backend="w4a16" against backend="inductor".

    python bench/moe_cpu.py [--json build/moe_cpu.json] [--rounds 9] [--tokens 1 16 64 512]
                            [--experts 64] [--top-k 8] [--hidden 1024] [--intermediate 512] [--group 128] [--isa avx2]

Both backends compile the same modules: bfloat16, symmetric int4 experts that are dequantised in the graph, written as
transformers has them. "gather" takes for each (token, slot) pair its own weights, W[ids], and multiplies by bmm
(batched_mm there); it gathers the packed weights, which is less than the dequantised ones. "grouped" sorts the pairs by
expert and multiplies by grouped_mm. Inductor's faster one of the two is what we compare with; gather is left out where
the selected weights alone need more than 4 GB. The script fails if explain() does not say that the experts were
rewritten.

The ways take turns. A turn is eight calls, one after the other as a model's layers are, with other tokens and so with
other experts, which do not fit the cache together; and a ninth before them, which is not timed, for it would pay for
what the other ways have driven out of the caches, code of Python's among it. The numbers are ms of a call: the median
over the turns, and the best one, which says more on a machine that others use too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inductor_ext
from inductor_ext.kernels import cpu

CALLS = 8
"""Of a turn."""
MOST_GATHERED = 4 << 30

Inputs = tuple[Tensor, Tensor, Tensor]


class Experts(nn.Module):
    """Random packed experts: codes int32 [E, N, K/8], nibble i of word j is k = 8j + i; scales bfloat16 [E, N, K/G]."""

    def __init__(self, E: int, H: int, I: int, G: int) -> None:  # noqa: E741
        super().__init__()
        self.group = G
        for name, N, K in (("gate_up", 2 * I, H), ("down", H, I)):
            codes = torch.randint(-(2**31), 2**31 - 1, (E, N, K // 8), dtype=torch.int32)
            scales = (torch.rand(E, N, K // G) + 0.5) / (5 * K**0.5)
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scales", scales.bfloat16())

    def dequantise(self, codes: Tensor, scales: Tensor) -> Tensor:
        """[.., N, K] in bfloat16."""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
        q = ((codes.unsqueeze(-1) >> shifts) & 15).flatten(-2) - 8
        return (q.unflatten(-1, (-1, self.group)) * scales.unsqueeze(-1)).flatten(-2)


class Gather(Experts):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        T, k = ids.shape
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(k, dim=0).unsqueeze(-1)
        h = torch.bmm(self.dequantise(self.gate_up_codes[flat], self.gate_up_scales[flat]), rows).squeeze(-1)
        gate, up = h.chunk(2, dim=-1)
        h = (F.silu(gate) * up).unsqueeze(-1)
        y = torch.bmm(self.dequantise(self.down_codes[flat], self.down_scales[flat]), h).squeeze(-1)
        y = y * weights.reshape(-1, 1)
        return y.view(T, k, -1).sum(dim=1).to(x.dtype)


class Grouped(Experts):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        (T, k), E = ids.shape, self.gate_up_codes.shape[0]
        sorted_ids, order = torch.sort(ids.reshape(-1))
        counts = torch.histc(sorted_ids.float(), bins=E, min=0, max=E - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        gate_up = self.dequantise(self.gate_up_codes, self.gate_up_scales)
        h = F.grouped_mm(x[order // k], gate_up.transpose(-2, -1), offs=ends)
        gate, up = h.chunk(2, dim=-1)
        down = self.dequantise(self.down_codes, self.down_scales)
        y = F.grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=ends)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0])
        return y[place].view(T, k, -1).sum(dim=1).to(x.dtype)


def inputs(T: int, E: int, k: int, H: int) -> list[Inputs]:
    """Those of a turn: tokens that choose k experts each, at random, and no expert twice while there are others."""
    result = []
    chosen = itertools.cycle(torch.randperm(E).split(k))
    for _ in range(CALLS):
        ids = next(chosen).view(1, k) if T == 1 and E % k == 0 else torch.rand(T, E).topk(k).indices
        result.append((torch.randn(T, H).bfloat16(), ids, torch.rand(T, k).softmax(-1)))
    return result


def assert_rewritten(module: nn.Module, example: Inputs) -> None:
    report = inductor_ext.explain(module, *example)
    if [r.op for r in report.rewritten] != ["w4a16::moe"] or report.left_alone:
        raise SystemExit(f"The experts were not rewritten, so there is nothing to compare:\n{report}")
    print(f"{type(module).__name__}: {report.rewritten[0].op} by {report.rewritten[0].kernel}", end=", ")
    print(report.rewritten[0].problem)


Way = tuple[str, str, Callable[..., Tensor]]


def ways(forms: list[Experts], T: int, k: int) -> list[Way]:
    torch._dynamo.reset()  # every T is compiled for itself, as is best for Inductor
    found: list[Way] = []
    for form in forms:
        name = type(form).__name__.lower()
        size = T * k * 16 * max(form.gate_up_codes[0].numel(), form.down_codes[0].numel())
        if name == "gather" and size > MOST_GATHERED:
            continue
        for backend in ("w4a16", "inductor"):
            found.append((backend, name, torch.compile(form, backend=backend, dynamic=False, fullgraph=True)))
    return found


def measure(all_ways: list[Way], examples: list[Inputs], rounds: int) -> list[tuple[float, float]]:
    """Seconds of a call, for each way: median and best of the turns. All ways must agree."""
    times: list[list[float]] = [[] for _ in all_ways]
    results = [way[2](*examples[0]).float() for way in all_ways]
    for result in results[1:]:
        if (result - results[0]).norm() > 1e-2 * results[0].norm():
            raise SystemExit("Two ways to compute the same layer do not agree.")
    for _ in range(rounds):
        for way, seconds in zip(all_ways, times, strict=True):
            way[2](*examples[-1])
            begin = time.perf_counter()
            for example in examples:
                way[2](*example)
            seconds.append((time.perf_counter() - begin) / len(examples))
    return [(statistics.median(t), min(t)) for t in times]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 512])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--isa", help="one of the CPU kernel's instruction sets, instead of the best")
    given = parser.parse_args()
    E, k, H, I = given.experts, given.top_k, given.hidden, given.intermediate  # noqa: E741
    if (reason := cpu.usable()) is not None:
        raise SystemExit(reason)
    if given.isa:
        torch.ops.w4a16_cpu.set_isa(given.isa)

    gather = Gather(E, H, I, given.group)
    grouped = Grouped(E, H, I, given.group)
    grouped.load_state_dict(gather.state_dict(), assign=True)
    for form in (gather, grouped):
        assert_rewritten(form, inputs(1, E, k, H)[0])

    rows: list[dict[str, Any]] = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'T':>5}  {'backend':<9} {'form':<8} {'ms':>9} {'best':>9} {'Inductor / this':>16}")
    for T in given.tokens:
        all_ways = ways([gather, grouped], T, k)
        times = measure(all_ways, inputs(T, E, k, H), given.rounds)
        rival = min(t[0] for t, way in zip(times, all_ways, strict=True) if way[0] == "inductor")
        for (backend, form, _), (seconds, best) in zip(all_ways, times, strict=True):
            print(f"{T:5}  {backend:<9} {form:<8} {seconds * 1e3:9.3f} {best * 1e3:9.3f} {rival / seconds:16.1f}")
            rows.append({"T": T, "backend": backend, "form": form, "seconds": seconds, "best": best})
    if given.json:
        problem = {"E": E, "top_k": k, "H": H, "I": I, "group_size": given.group, "dtype": "bfloat16"}
        document = {"torch": torch.__version__, "threads": torch.get_num_threads(), **problem, "results": rows}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
