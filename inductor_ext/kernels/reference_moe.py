"""The reference kernel for routed experts, and the gradient of every kernel: dequantise rows of one expert in float32,
multiply. Runs everywhere, reads the canonical layout, is last in every list.

Slots (token t, choice j; flat t * k + j) are sorted by expert into blocks of a fixed size, so that how much is done
follows from the sizes alone: on a GPU nothing waits for the host, and a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_ext.formats import PackedInt, PackedMxfp4, packed_int
from inductor_ext.fp8 import to_fp8
from inductor_ext.kernels import Layout, Mlp, MoeProblem, Packed, Routing, canonical
from inductor_ext.kernels.rows import rows
from inductor_ext.ops.align import moe_align_block_size

NAME = "reference"
CHECKS_WEIGHTS = False

_MOST_ROWS = 256
"""Of one block: its float32 intermediates stay at a few MB."""


def usable() -> str | None:
    return None


def reject(problem: MoeProblem) -> str | None:
    return None


pack, unpack = canonical.pack_experts, canonical.unpack_experts


def layout(packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
    return canonical.of_experts(E, canonical.layout_of_either(packed, N, K, group_size))


def run(
    x: Tensor,
    routing: Routing,
    w13: Packed,
    w2: Packed,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    mlp: Mlp,
    intermediate_size: int,
    group_sizes: tuple[int, int],
) -> Tensor:
    return compute(x, routing, Experts(w13, w2, w13_bias, w2_bias, mlp))


def compute(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """[T, H] in x's dtype."""
    mlp = experts.mlp
    topk_weights, topk_ids = routing.topk_weights.float().contiguous(), rows(routing, experts.number)
    y = _slots(topk_ids, x.shape[1])
    for block in _blocks(x, topk_weights, topk_ids, experts.number):
        y.index_copy_(0, block.slots, experts.of(block.expert).forward(block.x, block.weights))
    # A choice of nobody has no block; its weight may be anything, NaN too.
    weights = None if mlp.apply_router_weight_on_input else topk_weights.where(topk_ids >= 0, 0)
    total = _sum(y, weights, topk_ids)
    return total.mul_(mlp.routed_scaling).to(x.dtype)


def gradient(
    grad: Tensor, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to x [T, H] and topk_weights [T, k], in float32, of what ``run`` gives for the same
    arguments; grad is [T, H], of any float dtype."""
    grad = grad.float() * experts.mlp.routed_scaling
    grad_x, grad_weights = _slots(topk_ids, x.shape[1]), _slots(topk_ids, 1)
    for block in _blocks(x, topk_weights, topk_ids, experts.number):
        rows = grad.index_select(0, block.tokens)
        for_x, for_weights = experts.of(block.expert).backward(block.x, block.weights, rows)
        grad_x.index_copy_(0, block.slots, for_x)
        grad_weights.index_copy_(0, block.slots, for_weights)
    return _sum(grad_x, None, topk_ids), grad_weights[:-1].view(topk_ids.shape)


# -- slots -------------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Slots of one expert. Those beyond its last are padding, with slot T * k and any token."""

    expert: Tensor
    """int32 [1], the row of its weights; on a GPU any row, where the whole block is padding."""
    slots: Tensor
    """int64 [B]."""
    tokens: Tensor
    """int64 [B]."""
    x: Tensor
    """float32 [B, H]."""
    weights: Tensor
    """float32 [B, 1]."""


def _blocks(x: Tensor, weights: Tensor, topk_ids: Tensor, experts: int) -> Iterator[_Block]:
    if topk_ids.numel() == 0:
        return
    rows = min(max(1, topk_ids.numel() // experts), _MOST_ROWS)
    order, owners, padded = moe_align_block_size(topk_ids, rows, experts)
    # Only the host's own memory can be read without waiting.
    number = int(padded) // rows if x.device.type == "cpu" else owners.numel()
    for i in range(number):
        slots = order[i * rows : (i + 1) * rows].long()
        real = slots.clamp(max=topk_ids.numel() - 1)
        tokens = real // topk_ids.shape[1]
        yield _Block(
            owners[i : i + 1].clamp(min=0),
            slots,
            tokens,
            x.index_select(0, tokens).float(),
            weights.view(-1, 1).index_select(0, real),
        )


def _slots(topk_ids: Tensor, width: int) -> Tensor:
    """Zeros [T * k + 1, width]: a row for each slot, and the last for padding."""
    return torch.zeros(topk_ids.numel() + 1, width, dtype=torch.float32, device=topk_ids.device)


def _sum(slots: Tensor, weights: Tensor | None, topk_ids: Tensor) -> Tensor:
    """[T, width]: the sum over each token's choices, in their order."""
    T, k = topk_ids.shape
    values = slots[:-1].view(T, k, slots.shape[1])
    total = torch.zeros(T, slots.shape[1], dtype=torch.float32, device=slots.device)
    for j in range(k):
        total += values[:, j] if weights is None else weights[:, j, None] * values[:, j]
    return total


# -- one expert --------------------------------------------------------------------------------------------------------


Weight = PackedInt | PackedMxfp4
Scales = tuple[Tensor | None, Tensor | None]


class Experts(NamedTuple):
    """The weights [E, N, ...] of all experts, in the canonical layout, and what is computed with them."""

    w13: Packed
    w2: Packed
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    mlp: Mlp
    mxfp4: bool = False
    """Codes are MXFP4's."""
    input_scales: Scales = (None, None)
    """By which x and act(h) are rounded to fp8, if they are."""

    @property
    def number(self) -> int:
        return self.w13.qweight.shape[0]

    def of(self, row: Tensor) -> Expert:
        """That of the row int32 [1]."""

        def chosen(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.index_select(0, row)[0]

        def weight(w: Packed) -> Weight:
            codes, scales = w.qweight.index_select(0, row)[0], w.scales.index_select(0, row)[0]
            return PackedMxfp4(codes, scales) if self.mxfp4 else packed_int(codes, scales, chosen(w.zeros))

        biases = chosen(self.w13_bias), chosen(self.w2_bias)
        return Expert(weight(self.w13), weight(self.w2), *biases, self.mlp, self.input_scales)


class Expert(NamedTuple):
    """One expert's MLP in float32, for rows x [B, H] with the router's weights [B, 1]."""

    w13: Weight
    w2: Weight
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    mlp: Mlp
    input_scales: Scales = (None, None)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """[B, H]: y, to which the router's weight is not yet applied, unless it belongs on the input."""
        x = x * weights if self.mlp.apply_router_weight_on_input else x
        s1, s2 = self.input_scales
        h = _times(x, self.w13, self.w13_bias, s1)
        return _times(activate(h, self.mlp), self.w2, self.w2_bias, s2)

    def backward(self, x: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients [B, H] and [B, 1] of x and the weights, from that of the weighted y. There are none through
        fp8."""
        on_input = self.mlp.apply_router_weight_on_input
        h = _times(x * weights if on_input else x, self.w13, self.w13_bias)
        grad_y = grad if on_input else grad * weights
        grad_in = _back(activate_backward(_back(grad_y, self.w2), h, self.mlp), self.w13)
        if on_input:
            return grad_in * weights, (grad_in * x).sum(1, keepdim=True)
        y = _times(activate(h, self.mlp), self.w2, self.w2_bias)
        return grad_in, (grad * y).sum(1, keepdim=True)


def _times(x: Tensor, weight: Weight, bias: Tensor | None, input_scale: Tensor | None = None) -> Tensor:
    """x @ W^T + bias, x rounded to fp8 if there is a scale for it; the dequantised weight never exists as a whole."""
    x = x if input_scale is None else to_fp8(x, input_scale).float()
    out = torch.empty(x.shape[0], weight.N, dtype=torch.float32, device=x.device)
    for some, block in weight.blocks():
        out[:, some] = F.linear(x, block.dequantize())
    out = out if input_scale is None else out.mul_(input_scale.view(()))
    return out if bias is None else out.add_(bias.float())


def _back(grad: Tensor, weight: Weight) -> Tensor:
    """grad @ W."""
    out = torch.zeros(grad.shape[0], weight.K, dtype=torch.float32, device=grad.device)
    for some, block in weight.blocks():
        out.addmm_(grad[:, some], block.dequantize())
    return out


# -- activations -------------------------------------------------------------------------------------------------------

_PLAIN: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
_PLAIN_BACKWARD: dict[str, Callable[..., Any]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": functools.partial(torch.ops.aten.threshold_backward, threshold=0),
}


def activate(h: Tensor, mlp: Mlp) -> Tensor:
    """act(h) [B, I] of h, which is [B, 2 I], or [B, I] without a gate."""
    if mlp.gate_up == "none":
        return _PLAIN[mlp.activation](h)
    gate, up = _gate_up(h, mlp)
    if mlp.activation != "swigluoai":
        return _PLAIN[mlp.activation](gate) * up
    gate, up = _clamped(gate, up, mlp)
    return (up + 1) * gate * torch.sigmoid(mlp.alpha * gate)


def activate_backward(grad: Tensor, h: Tensor, mlp: Mlp) -> Tensor:
    """The gradient of h, from that of act(h)."""
    if mlp.gate_up == "none":
        found: Tensor = _PLAIN_BACKWARD[mlp.activation](grad, h)
        return found
    gate, up = _gate_up(h, mlp)
    if mlp.activation != "swigluoai":
        for_gate = _PLAIN_BACKWARD[mlp.activation](grad * up, gate)
        for_up = grad * _PLAIN[mlp.activation](gate)
    else:
        within_gate, within_up = (t == c for t, c in zip((gate, up), _clamped(gate, up, mlp), strict=True))
        gate, up = _clamped(gate, up, mlp)
        s = torch.sigmoid(mlp.alpha * gate)
        for_gate = within_gate * grad * (up + 1) * s * (1 + mlp.alpha * gate * (1 - s))
        for_up = within_up * grad * gate * s
    if mlp.gate_up == "halves":
        return torch.cat((for_gate, for_up), dim=1)
    return torch.stack((for_gate, for_up), dim=2).flatten(1)


def _gate_up(h: Tensor, mlp: Mlp) -> tuple[Tensor, Tensor]:
    gate, up = h.chunk(2, dim=1) if mlp.gate_up == "halves" else (h[:, ::2], h[:, 1::2])
    return gate, up


def _clamped(gate: Tensor, up: Tensor, mlp: Mlp) -> tuple[Tensor, Tensor]:
    if mlp.limit is None:
        return gate, up
    return gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
