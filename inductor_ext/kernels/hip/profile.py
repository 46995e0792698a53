"""What a profiler sees of routed experts: a scope with the sizes and how the router filled the blocks.

Only with INDUCTOR_EXT_PROFILE=1, since the counts are read back from the GPU: each call waits for it then.
"""

from __future__ import annotations

import contextlib
import json
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from inductor_ext.kernels import Packed, Routing


def scope(
    x: Tensor, routing: Routing, w13: Packed, w2: Packed, group_sizes: tuple[int, int], block_m: int
) -> AbstractContextManager[Any]:
    """A ``torch.profiler.record_function`` named "w4a16::moe " and, as JSON, M, N and K of both products, E, top_k, g,
    block_m, valid_blocks, n_routed and the slots of each expert; or nothing."""
    if os.environ.get("INDUCTOR_EXT_PROFILE") != "1":
        return contextlib.nullcontext()
    ids, E = routing.topk_ids.reshape(-1).long(), w13.qweight.shape[0]
    rows = ids[(ids >= 0) & (ids < routing.number)]
    if routing.expert_map is not None:
        rows = routing.expert_map.long()[rows]
    slots = torch.bincount(rows[(rows >= 0) & (rows < E)], minlength=E).tolist()
    told = {
        "M": x.shape[0],
        "N": [w13.qweight.shape[2], w2.qweight.shape[2]],
        "K": [w13.qweight.shape[1] * 8, w2.qweight.shape[1] * 8],
        "E": E,
        "top_k": routing.topk_ids.shape[1],
        "g": list(group_sizes),
        "block_m": block_m,
        "valid_blocks": sum(-(-count // block_m) for count in slots),
        "n_routed": sum(slots),
        "slots": slots,
    }
    return torch.profiler.record_function("w4a16::moe " + json.dumps(told, separators=(",", ":")))
