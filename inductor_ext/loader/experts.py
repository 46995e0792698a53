"""The experts of a mixture-of-experts layer as one module whose weights stay packed.

The forwards are plain PyTorch, which `torch.compile(model, backend="w4a16")` recognises as it would anybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What an expert's gate, up and down are called, in files and where every expert is a module of its own."""


class Canonical(NamedTuple):
    """The weights [N, K] of all experts: (code - zero) * scale, where G neighbours along K share a scale and a zero.

    qweight: int32 [E, N, K/8], nibble i of word j is the code at k = 8j + i. scales: float [E, N, K/G].
    zeros: [E, N, K/G], uint8 holding 0..16, or float; None: every zero is 8.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None


class RoutedExperts(nn.Module):
    """What every expert of a layer computes, down(act(gate_up(x))), and the weighted sum over a token's experts.

    A subclass gives the weights, gate_up [2I, H] and down [H, I] for hidden size H and intermediate size I, and the
    activation; perhaps biases, and rounding of what is multiplied with the weights.
    """

    num_experts: int
    hidden_dim: int

    def dequantize(self, projection: str, dtype: torch.dtype, experts: int | Tensor | None = None) -> Tensor:
        """W [E, N, K] of "gate_up" or "down" in `dtype`; of one expert [N, K], of expert indices [S] [S, N, K]."""
        raise NotImplementedError

    def _act(self, h: Tensor) -> Tensor:
        """[.., 2I] -> [.., I]."""
        raise NotImplementedError

    def _biased(self, projection: str, y: Tensor, experts: int | Tensor) -> Tensor:
        """y [S, N] and the bias of one expert, or of indices [S]."""
        return y

    def _rounded(self, projection: str, x: Tensor) -> Tensor:
        """What the projection is given in the place of x."""
        return x

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """x [T, H] -> [T, H] in x's dtype: token t's sum over j of top_k_weights[t, j] * expert top_k_index[t, j] of x.

        top_k_index: integers [T, k] in 0..E-1. top_k_weights: floats [T, k].
        Without these (llama4): x [E*T, H] -> [E*T, H], the first T rows by expert 0, the next by expert 1, ...

        Raises IndexError for an index out of range, if run eagerly.
        """
        if top_k_index is None:
            blocks = hidden_states.view(self.num_experts, hidden_states.shape[0] // self.num_experts, self.hidden_dim)
            return (self._all if torch.compiler.is_compiling() else self._each)(blocks).view(-1, self.hidden_dim)
        if top_k_weights is None:
            raise TypeError("top_k_index was given without top_k_weights.")
        if not torch.compiler.is_compiling():
            return self._selected(hidden_states, top_k_index, top_k_weights)
        if hidden_states.dtype == torch.bfloat16:
            return self._grouped(hidden_states, top_k_index, top_k_weights)
        # Under torch.compile grouped_mm takes no other dtype.
        return self._gathered(hidden_states, top_k_index, top_k_weights)

    # -- eager: one expert's weights at a time -------------------------------------------------------------------------

    def _selected(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for expert in ids.unique().tolist():
            if not 0 <= expert < self.num_experts:
                raise IndexError(f"Expert {expert} was selected; the experts are 0..{self.num_experts - 1}.")
            token, slot = torch.where(ids == expert)
            y = self._expert(expert, x[token]).to(out.dtype)
            out.index_add_(0, token, y * weights[token, slot, None].to(out.dtype))
        return out.to(x.dtype)

    def _each(self, blocks: Tensor) -> Tensor:
        # An expert gives zero for zero: llama4 sets the rows of tokens to zero that are not for this expert.
        out = [self._expert(i, block) if block.any() else block for i, block in enumerate(blocks.unbind())]
        return torch.stack(out)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        h = F.linear(self._rounded("gate_up", x), self.dequantize("gate_up", x.dtype, expert))
        h = self._rounded("down", self._act(self._biased("gate_up", h, expert)))
        return self._biased("down", F.linear(h, self.dequantize("down", x.dtype, expert)), expert)

    # -- compiled: forms without a branch on a value, spelled as transformers spells them ------------------------------

    def _grouped(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        (tokens, top_k), flat = ids.shape, ids.reshape(-1)
        sorted_ids, perm = torch.sort(flat)
        counted = sorted_ids.float() if x.device.type in ("cpu", "mps") else sorted_ids.int()
        counts = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        gate_up, down = (self.dequantize(name, x.dtype).transpose(-2, -1) for name in ("gate_up", "down"))
        h = F.grouped_mm(self._rounded("gate_up", x)[perm // top_k], gate_up, offs=offsets)
        h = self._rounded("down", self._act(self._biased("gate_up", h, sorted_ids)))
        y = self._biased("down", F.grouped_mm(h, down, offs=offsets), sorted_ids)
        y = y * weights.reshape(-1)[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.shape[0], device=x.device)
        return y[inverse].view(tokens, top_k, self.hidden_dim).sum(dim=1).to(x.dtype)

    def _gathered(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        (tokens, top_k), flat = ids.shape, ids.reshape(-1)
        rows = self._rounded("gate_up", x).repeat_interleave(top_k, dim=0).unsqueeze(-1)
        h = torch.bmm(self.dequantize("gate_up", x.dtype, flat), rows).squeeze(-1)
        h = self._rounded("down", self._act(self._biased("gate_up", h, flat)))
        y = torch.bmm(self.dequantize("down", x.dtype, flat), h.unsqueeze(-1)).squeeze(-1)
        y = self._biased("down", y, flat) * weights.reshape(-1).unsqueeze(-1)
        return y.view(tokens, top_k, self.hidden_dim).sum(dim=1).to(x.dtype)

    def _all(self, blocks: Tensor) -> Tensor:
        gate_up, down = (self.dequantize(name, blocks.dtype).transpose(-2, -1) for name in ("gate_up", "down"))
        return torch.bmm(self._act(torch.bmm(blocks, gate_up)), down)


class PackedExperts(RoutedExperts):
    """down(act(gate(x)) * up(x)) with int4 weights.

    Buffers `gate_up_qweight`, `gate_up_scales`, `gate_up_zeros` and `down_qweight`, `down_scales`, `down_zeros`, as in
    Canonical: gate_up has the rows of all gates before those of all ups.
    """

    gate_up_scales: Tensor
    down_scales: Tensor

    def __init__(
        self, act_fn: Callable[[Tensor], Tensor], gate_up: Canonical, down: Canonical, *, persistent: bool = True
    ) -> None:
        """act_fn: the model's own activation. persistent: whether `state_dict()` has the buffers."""
        super().__init__()
        self.act_fn = act_fn
        self.num_experts = down.qweight.shape[0]
        self.hidden_dim, self.intermediate_dim = down.qweight.shape[1], down.qweight.shape[2] * 8
        for name, weight in (("gate_up", gate_up), ("down", down)):
            for part, tensor in weight._asdict().items():
                self.register_buffer(f"{name}_{part}", tensor, persistent=persistent)

    def dequantize(self, projection: str, dtype: torch.dtype, experts: int | Tensor | None = None) -> Tensor:
        """As RoutedExperts has it. (code - zero) * scale is computed in `dtype` if the scales have it, else in
        float32."""
        weight = Canonical(*(getattr(self, f"{projection}_{part}") for part in Canonical._fields))
        if experts is not None:
            zeros = None if weight.zeros is None else weight.zeros[experts]
            weight = Canonical(weight.qweight[experts], weight.scales[experts], zeros)
        return _dequantize(weight, dtype)

    def _act(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def extra_repr(self) -> str:
        groups = self.hidden_dim // self.gate_up_scales.shape[2], self.intermediate_dim // self.down_scales.shape[2]
        sizes = f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return f"{sizes}, group_size={groups[0]}/{groups[1]}"


def _dequantize(weight: Canonical, dtype: torch.dtype) -> Tensor:
    words, scales, zeros = weight
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = ((words.unsqueeze(-1) >> shifts) & 15).reshape(*scales.shape, 8 * words.shape[-1] // scales.shape[-1])
    compute = dtype if scales.dtype == dtype else torch.float32
    # Codes, integer zeros and their differences are small integers, exact in every float dtype.
    centred: Tensor = codes.to(compute) - (8 if zeros is None else zeros.unsqueeze(-1))
    return (centred * scales.unsqueeze(-1).to(compute)).flatten(-2).to(dtype)
