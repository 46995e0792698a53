"""Marlin for tokens that come batched by expert, [E, tokens, H], as an all-to-all delivers them. ``w4a16::moe`` has no
such tokens: it is for callers of ``run_batched``, and for the oracle of those who have."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from inductor_ext.kernels import Mlp, MoeProblem, Packed, Routing
from inductor_ext.kernels.external import marlin_moe

NAME = "batched_marlin"
CHECKS_WEIGHTS = False

usable, pack, unpack, layout = marlin_moe.usable, marlin_moe.pack, marlin_moe.unpack, marlin_moe.layout


def reject(problem: MoeProblem) -> str | None:
    if not problem.batched:
        return "The kernel takes tokens batched by expert, [E, tokens, H]; they come as [T, H] with ids."
    return marlin_moe.reject(dataclasses.replace(problem, batched=False))


def run(*args: Any) -> Tensor:
    raise RuntimeError("The kernel takes tokens batched by expert; call run_batched, or take kernel marlin.")


def run_batched(
    x: Tensor,
    expert_num_tokens: Tensor,
    w13: Packed,
    w2: Packed,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    mlp: Mlp,
    intermediate_size: int,
    group_sizes: tuple[int, int],
) -> Tensor:
    """x [E, T, H], of which expert e has the first expert_num_tokens[e] (int32 or int64 [E]) -> [E, T, H], unweighted.

    Rows beyond these are zero, whatever x has there. Raises RuntimeError for other shapes.
    """
    E = w13.qweight.shape[0]
    if x.dim() != 3 or x.shape[0] != E or expert_num_tokens.shape != (E,):
        raise RuntimeError(
            f"x must be [{E}, T, H] and expert_num_tokens [{E}]; they are {list(x.shape)} and"
            f" {list(expert_num_tokens.shape)}."
        )
    place = torch.arange(x.shape[1], device=x.device)
    experts = torch.arange(E, device=x.device)[:, None]
    ids = experts.where(place < expert_num_tokens[:, None], -1).view(-1, 1)
    routing = Routing(torch.ones(ids.shape, device=x.device), ids, None, E)
    flat = x.reshape(-1, x.shape[2])
    y = marlin_moe.run(flat, routing, w13, w2, w13_bias, w2_bias, mlp, intermediate_size, group_sizes)
    return y.view(x.shape)
