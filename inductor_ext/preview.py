"""`python -m inductor_ext doctor --device NAME`: what would run on a device that is not here, and why not the rest.

Answered by the kernels' own rejections, for problems of known models; nothing is run. A kernel counts whether or not
what it needs is installed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from inductor_ext import oracle
from inductor_ext.devices import Device, named
from inductor_ext.kernels import Mlp, MoeProblem, Problem, WeightKind, table

WIDTH = 2 + max(map(len, table.names()))
INDENT = " " * (WIDTH + 2)


def problems(device: Device) -> dict[str, Problem | MoeProblem]:
    """What is asked about, by name: dense layers of Llama-3-8B and experts of Qwen3-30B-A3B and others, as the usual
    quantisers store them."""
    dense = Problem(
        op="linear",
        device=device.type,
        arch=device.arch,
        dtype=torch.bfloat16,
        scale_dtype=torch.bfloat16,
        N=4096,
        K=4096,
        group_size=128,
        zeros="none",
        order=False,
        bias=False,
    )
    kind = WeightKind(torch.bfloat16, 128, "none")
    moe = MoeProblem(
        device=device.type,
        arch=device.arch,
        dtype=torch.bfloat16,
        E=128,
        top_k=8,
        H=2048,
        I=768,
        w13=kind,
        w2=kind,
        mlp=Mlp(),
        bias=False,
        expert_map=False,
    )

    def experts(of: WeightKind, **changes: object) -> MoeProblem:
        return dataclasses.replace(moe, w13=of, w2=of, **changes)  # type: ignore[arg-type]

    half = {"dtype": torch.float16, "scale_dtype": torch.float16}
    return {
        "dense": dense,
        "dense, float16": dataclasses.replace(dense, **half),  # type: ignore[arg-type]
        "dense, GPTQ or AWQ with zeros": dataclasses.replace(dense, zeros="int"),
        "dense, GPTQ with act-order": dataclasses.replace(dense, zeros="int", order=True),
        "dense, HQQ": dataclasses.replace(dense, zeros="float", group_size=64),
        "dense, groups of 32": dataclasses.replace(dense, group_size=32),
        "dense, one scale a channel": dataclasses.replace(dense, group_size=4096),
        "experts": moe,
        "experts, float16": experts(WeightKind(torch.float16, 128, "none"), dtype=torch.float16),
        "experts, GPTQ or AWQ with zeros": experts(WeightKind(torch.bfloat16, 128, "int")),
        "experts, groups of 32": experts(WeightKind(torch.bfloat16, 32, "none")),
        "experts with biases": experts(kind, bias=True, mlp=Mlp(activation="swigluoai", gate_up="interleaved")),
        "experts in parallel": experts(kind, E=16, expert_map=True),
    }


def main(name: str) -> int:
    """Prints a table for the device of this name. Raises ValueError for one that is not known."""
    device = named(name)
    print(f"what would run on {device}, by the kernels' own rules; none of it was run")
    for title, problem in problems(device).items():
        for line in lines(title, problem):
            print(line)
    return 0


def lines(title: str, problem: Problem | MoeProblem) -> Iterator[str]:
    """What would run, why not the others, and what could take its place."""
    verdicts = oracle.verdicts(problem, elsewhere=True)
    can = [name for name, reason in verdicts.items() if reason is None]
    yield f"{can[0]:<{WIDTH}}{title}: {problem}"
    for name in can[:1]:
        if package := table.rows(problem.op)[name].package:
            yield f"{INDENT}needs {package}"
    for name, reason in verdicts.items():
        if reason is not None:
            yield f"{INDENT}not {name}: {reason}"
    if can[1:]:
        yield f"{INDENT}else {', '.join(can[1:])}"
