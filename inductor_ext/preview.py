"""`python -m inductor_ext doctor --device NAME`: what would run on a device that is not here, and why not the rest.

Answered by the kernels' own rejections, for problems of known models; nothing is run. A kernel counts whether or not
what it needs is installed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from inductor_ext import oracle
from inductor_ext.devices import Device, named
from inductor_ext.kernels import Mlp, MoeProblem, Problem, WeightKind, table

WIDTH = 2 + max(map(len, table.names()))


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

    mxfp4, swiglu = WeightKind(torch.uint8, 32, "none", "mxfp4"), Mlp("swigluoai", "interleaved", limit=7.0)
    gpt_oss = {"top_k": 4, "H": 2880, "I": 2880, "bias": True, "mlp": swiglu}
    half = {"dtype": torch.float16, "scale_dtype": torch.float16}
    return {
        "dense": dense,
        "dense, float16": dataclasses.replace(dense, **half),  # type: ignore[arg-type]
        "dense, GPTQ or AWQ with zeros": dataclasses.replace(dense, zeros="int"),
        "dense, GPTQ with act-order": dataclasses.replace(dense, zeros="int", order=True),
        "dense, HQQ": dataclasses.replace(dense, zeros="float", group_size=64),
        "dense, groups of 32": dataclasses.replace(dense, group_size=32),
        "dense, one scale a channel": dataclasses.replace(dense, group_size=4096),
        "dense, int8": dataclasses.replace(dense, codes="int8"),
        "experts": moe,
        "experts, float16": experts(WeightKind(torch.float16, 128, "none"), dtype=torch.float16),
        "experts, GPTQ or AWQ with zeros": experts(WeightKind(torch.bfloat16, 128, "int")),
        "experts, groups of 32": experts(WeightKind(torch.bfloat16, 32, "none")),
        "experts with biases": experts(kind, bias=True, mlp=Mlp("swigluoai", "interleaved", limit=7.0)),
        "experts in MXFP4 (gpt-oss)": experts(mxfp4, op="moe_mxfp4", **gpt_oss),
        "experts in MXFP4, fp8 activations": experts(mxfp4, op="moe_mxfp4", fp8=True, **gpt_oss),
        "experts in parallel": experts(kind, E=16, expert_map=True),
        "experts, int8": experts(WeightKind(torch.bfloat16, 128, "none", "int8")),
    }


def main(name: str) -> int:
    """Prints a table for the device of this name. Raises ValueError for one that is not known."""
    device = named(name)
    print(f"what would run on {device}, by the kernels' own rules; none of it was run")
    asked = problems(device)
    for op in dict.fromkeys(problem.op for problem in asked.values()):
        print(op)
        for line in lines({title: problem for title, problem in asked.items() if problem.op == op}):
            print(f"  {line}")
    return 0


def lines(asked: Mapping[str, Problem | MoeProblem]) -> Iterator[str]:
    """Of problems of one op: what would run, what could take its place, and why not the others. What is said of a
    kernel for all of them is said once."""
    verdicts = {title: oracle.verdicts(problem, elsewhere=True) for title, problem in asked.items()}
    said: dict[str, set[str | None]] = {}
    for found in verdicts.values():
        for name, reason in found.items():
            said.setdefault(name, set()).add(reason)
    never = {name: reasons.pop() for name, reasons in said.items() if len(reasons) == 1 and None not in reasons}
    for name, reason in never.items():
        yield f"not {name}: {reason}"
    packages = {name: row.package for name, row in table.rows(next(iter(asked.values())).op).items() if row.package}
    for name in packages:
        if name in said and name not in never:
            yield f"{name} needs {packages[name]}"
    for title, problem in asked.items():
        can = [name for name, reason in verdicts[title].items() if reason is None]
        others = f"; else {', '.join(can[1:])}" if can[1:] else ""
        yield f"{can[0]:<{WIDTH}}{title}: {problem}{others}"
        for name, reason in verdicts[title].items():
            if reason is not None and name not in never:
                yield f"{'':<{WIDTH}}  not {name}: {reason}"
