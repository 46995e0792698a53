"""``torch.ops.w4a16.moe_align_block_size``: tokens sorted by expert into blocks of one size, as kernels for routed
experts want them."""

from __future__ import annotations

import torch
from torch import Tensor

from inductor_ext.ops.linear import LIB

# -- schema ------------------------------------------------------------------------------------------------------------
# topk_ids [T, k] int32 | int64, global expert ids; expert_map None or int32 [num_experts], global id -> local row or
# -1. A slot is the flat number t * k + j of a choice, a block is block_size entries of the sorted ids.
# Returns, all int32:
#   sorted_token_ids [C]: slots by expert, in their own order within one, each expert's padded with T * k to whole
#     blocks; C = T k + min(T k, num_experts) (block_size - 1), and everything beyond the last block is T * k.
#   expert_ids [ceil(C / block_size)]: the row of each block's expert, -1 for one that is not here and beyond the last.
#   num_tokens_post_padded [1]: where the last block ends.
# An id outside 0..num_experts-1 is left out. A foreign expert's slots (expert_map -1) stay, in blocks of -1, or are
# left out as well with ignore_invalid_experts.
LIB.define(
    "moe_align_block_size(Tensor topk_ids, int block_size, int num_experts, Tensor? expert_map=None, "
    "bool ignore_invalid_experts=False) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None) -> None:
    """Raises RuntimeError naming the argument, what it was and what is allowed."""
    for ok, message in (
        (topk_ids.dtype in (torch.int32, torch.int64), f"topk_ids must be int32 or int64, it is {topk_ids.dtype}."),
        (topk_ids.dim() == 2, f"topk_ids must be [T, k], it has {topk_ids.dim()} dimensions."),
        (block_size >= 1, f"block_size must be at least 1, it is {block_size}."),
        (num_experts >= 1, f"num_experts must be at least 1, it is {num_experts}."),
    ):
        torch._check(ok, lambda message=message: f"w4a16::moe_align_block_size: {message}")
    if expert_map is not None:
        fits = expert_map.dtype == torch.int32 and expert_map.shape == (num_experts,)
        torch._check(
            fits and expert_map.device == topk_ids.device,
            lambda: (
                f"w4a16::moe_align_block_size: expert_map must be int32 [{num_experts}] on {topk_ids.device}, it is"
                f" {expert_map.dtype} {list(expert_map.shape)} on {expert_map.device}."
            ),
        )


def _capacity(slots: int, block_size: int, num_experts: int) -> tuple[int, int]:
    """Lengths of sorted_token_ids and expert_ids. No branch: the number of slots may be symbolic."""
    length = slots + torch.sym_min(slots, num_experts) * (block_size - 1)
    return length, (length + block_size - 1) // block_size


# -- fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("w4a16::moe_align_block_size", lib=LIB)
def _(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    ignore_invalid_experts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(topk_ids, block_size, num_experts, expert_map)
    length, blocks = _capacity(topk_ids.numel(), block_size, num_experts)
    ids, experts, end = (topk_ids.new_empty(n, dtype=torch.int32) for n in (length, blocks, 1))
    return ids, experts, end


# -- implementation ----------------------------------------------------------------------------------------------------


def _align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    ignore_invalid_experts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Only reads through indices, so nothing depends on the order of writes, and nothing waits for the host."""
    _check(topk_ids, block_size, num_experts, expert_map)
    flat = topk_ids.reshape(-1).long()
    length, blocks = _capacity(flat.numel(), block_size, num_experts)
    if expert_map is not None and ignore_invalid_experts:
        flat = flat.where(expert_map[flat.clamp(0, num_experts - 1)] >= 0, -1)
    experts, order = flat.sort(stable=True)
    # What is left out lies before the first of these or behind the last.
    bounds = torch.searchsorted(experts, torch.arange(num_experts + 1, device=flat.device))
    starts, counts = bounds[:-1], bounds.diff()
    padded = (counts + block_size - 1) // block_size * block_size
    ends = padded.cumsum(0)

    place = torch.arange(length, device=flat.device)
    owner = torch.searchsorted(ends, place, right=True)
    safe = owner.clamp(max=num_experts - 1)
    rank = place - (ends - padded)[safe]
    real = (owner < num_experts) & (rank < counts[safe])
    sorted_ids = order[(starts[safe] + rank).where(real, 0)].where(real, flat.numel())

    owner = torch.searchsorted(ends, torch.arange(blocks, device=flat.device) * block_size, right=True)
    row = owner if expert_map is None else expert_map[owner.clamp(max=num_experts - 1)].long()
    expert_ids = row.where(owner < num_experts, -1)
    return sorted_ids.int(), expert_ids.int(), ends[-1:].int()


LIB.impl("moe_align_block_size", _align, "CompositeExplicitAutograd")

moe_align_block_size = torch.ops.w4a16.moe_align_block_size.default
