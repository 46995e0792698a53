"""gpt-oss's experts in MXFP4, packed as the checkpoint has them: in OpenAI's layout, or in Quark's, each expert by
itself and perhaps with scales for rounding activations to fp8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inductor_ext.formats import E2M1, MXFP4_GROUP
from inductor_ext.loader.experts import RoutedExperts
from inductor_ext.loader.filled import Filled
from inductor_ext.ops.fp8 import round_to_fp8

PROJECTIONS = ("gate_up", "down")


class Mxfp4Experts(RoutedExperts):
    """down(swiglu(gate_up(x))) with biases, as gpt-oss computes it: gates and ups interleaved, clamped.

    Buffers with OpenAI's names: `gate_up_proj_blocks` uint8 [E, 2I, H/32, 16] (the low nibble is the even k),
    `gate_up_proj_scales` uint8 [E, 2I, H/32] (e8m0), and `down_proj_*` [E, H, I/32, 16], [E, H, I/32]. Biases
    `gate_up_proj_bias` [E, 2I] and `down_proj_bias` [E, H].
    """

    pairs: Tensor
    """[256, 2]: both values of a byte."""
    intermediate_dim: int
    down_proj_scales: Tensor

    def __init__(self, module: Any, *, persistent: bool = True) -> None:
        """module: the one in whose place this stands. persistent: whether `state_dict()` has buffers and biases.

        Raises ValueError for sizes that are no whole groups.
        """
        super().__init__()
        self.num_experts, self.intermediate_dim, self.hidden_dim = (int(size) for size in module.down_proj.shape)
        self.alpha, self.limit = float(module.alpha), float(module.limit)
        for name, N, K in self._sizes():
            if K % MXFP4_GROUP:
                raise ValueError(f"{name}_proj has K = {K}, which is no multiple of {MXFP4_GROUP}")
            shape = (self.num_experts, N, K // MXFP4_GROUP)
            self._declare(f"{name}_proj_blocks", torch.empty(*shape, 16, dtype=torch.uint8, device="meta"), persistent)
            self._declare(f"{name}_proj_scales", torch.empty(*shape, dtype=torch.uint8, device="meta"), persistent)
            bias = getattr(module, f"{name}_proj_bias")
            if persistent:
                self.register_parameter(f"{name}_proj_bias", bias)
            else:
                self._declare(f"{name}_proj_bias", bias.detach(), False)
        self._declare("pairs", torch.tensor([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)]), False)

    def _declare(self, name: str, tensor: Tensor, persistent: bool) -> None:
        self.register_buffer(name, tensor, persistent=persistent)

    def _sizes(self) -> tuple[tuple[str, int, int], ...]:
        """(projection, N, K)"""
        H, I = self.hidden_dim, self.intermediate_dim  # noqa: E741
        return ("gate_up", 2 * I, H), ("down", H, I)

    def dequantize(self, projection: str, dtype: torch.dtype, experts: int | Tensor | None = None) -> Tensor:
        blocks, scales = (getattr(self, f"{projection}_proj_{part}") for part in ("blocks", "scales"))
        if experts is not None:
            blocks, scales = blocks[experts], scales[experts]
        # bfloat16 has every power of two that there is, and the product is rounded once there, too.
        compute = dtype if dtype == torch.bfloat16 else torch.float32
        values = self.pairs.to(compute)[blocks.int()].flatten(-2)
        return (values * _powers(scales).to(compute).unsqueeze(-1)).flatten(-2).to(dtype)

    def faults(self) -> list[str]:
        return []

    def _act(self, h: Tensor) -> Tensor:
        gate, up = h[..., ::2], h[..., 1::2]
        gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    def _biased(self, projection: str, y: Tensor, experts: int | Tensor) -> Tensor:
        bias: Tensor = getattr(self, f"{projection}_proj_bias")
        return y + bias[experts]

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return f"{sizes}, alpha={self.alpha}, limit={self.limit}"


def _powers(scales: Tensor) -> Tensor:
    """float32: 2 ** (scale - 127), NaN for 255. By its bits; 2 ** -127 is subnormal."""
    bits = scales.int()
    bits = torch.where(bits == 0, 0x00400000, torch.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.view(torch.float32)


class QuarkExperts(Filled, Mxfp4Experts):
    """The same from files that hold each expert by itself, in AMD Quark's naming: "3.gate_up_proj.weight" uint8 [N,
    K/2], ".weight_scale" uint8 [N, K/32], ".bias" [N] and, if activations are rounded to fp8 (W4A8), ".input_scale"
    float32, one element.

    The experts of a layer are given one input scale, the largest of theirs, as kernels for W4A8 take it.
    """

    def __init__(self, module: Any, input_scale_shape: tuple[int, ...] | None) -> None:
        """input_scale_shape: of one in the files, [] or [1]; None: there are none."""
        super().__init__(module, persistent=False)
        self.input_scale_shape = input_scale_shape
        for name in PROJECTIONS if input_scale_shape is not None else ():
            self._declare(f"{name}_input_scales", torch.empty(self.num_experts, device="meta"), False)
            self._declare(f"{name}_input_scale", torch.empty((), device="meta"), False)

    def declared(self) -> Iterator[tuple[str, Tensor]]:
        for expert in range(self.num_experts):
            for name, N, K in self._sizes():
                bias = getattr(self, f"{name}_proj_bias").dtype
                yield f"{expert}.{name}_proj.weight", torch.empty(N, K // 2, dtype=torch.uint8, device="meta")
                yield f"{expert}.{name}_proj.weight_scale", torch.empty(N, K // 32, dtype=torch.uint8, device="meta")
                yield f"{expert}.{name}_proj.bias", torch.empty(N, dtype=bias, device="meta")
                if self.input_scale_shape is not None:
                    yield f"{expert}.{name}_proj.input_scale", torch.empty(self.input_scale_shape, device="meta")

    def put(self, name: str, stored: Tensor) -> None:
        buffer, expert = self._buffer(name)
        whole = getattr(self, buffer)
        if whole.is_meta:
            whole = torch.empty_like(whole, device=stored.device)
            setattr(self, buffer, whole)
        whole[expert].copy_(stored.reshape(whole.shape[1:]))

    def get(self, name: str) -> Tensor:
        buffer, expert = self._buffer(name)
        part: Tensor = getattr(self, buffer)[expert]
        if buffer.endswith("blocks"):
            return part.flatten(1)
        return part.view(self.input_scale_shape or ()) if buffer.endswith("input_scales") else part

    def settle(self) -> None:
        for name in PROJECTIONS if self.input_scale_shape is not None else ():
            scales = getattr(self, f"{name}_input_scales")
            setattr(self, f"{name}_input_scale", scales.max())

    def faults(self) -> list[str]:
        given = [f"{name}_input_scales" for name in PROJECTIONS if self.input_scale_shape is not None]
        good = {name: bool(((s := getattr(self, name)) > 0).all() and s.isfinite().all()) for name in given}
        return [f"has {name} that are no positive numbers" for name, is_good in good.items() if not is_good]

    def _rounded(self, projection: str, x: Tensor) -> Tensor:
        if self.input_scale_shape is None:
            return x
        rounded: Tensor = round_to_fp8(x, getattr(self, f"{projection}_input_scale"))
        return rounded

    def _buffer(self, name: str) -> tuple[str, int]:
        expert, projection, leaf = name.split(".")
        parts = {"weight": "blocks", "weight_scale": "scales", "bias": "bias"}
        if leaf == "input_scale":
            return f"{projection.removesuffix('_proj')}_input_scales", int(expert)
        return f"{projection}_{parts[leaf]}", int(expert)

    def _home(self) -> Tensor:
        return self.down_proj_scales


def is_gpt_oss(module: nn.Module) -> bool:
    """Whether a module computes what Mxfp4Experts does: transformers' class is known by its name."""
    return type(module).__name__ == "GptOssExperts" and hasattr(module, "alpha") and hasattr(module, "limit")
