"""Linear layers that keep a checkpoint's int4 tensors as they are on disk and dequantise them in every forward.

The forwards are plain PyTorch, which `torch.compile(model, backend="w4a16")` recognises as it would anybody's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inductor_ext.formats import EXLLAMA, SEQUENTIAL, BitOrder
from inductor_ext.loader.config import Scheme

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedLinear(nn.Module):
    """y = x @ W.T + bias with W [N, K] = (code - zero) * scale.

    Codes, zeros and scales are buffers with the checkpoint's own names, shapes and dtypes. They start on the meta
    device and are filled by the loader.

    in_features, out_features: K and N. format: the checkpoint's ("compressed-tensors", "gptq", "awq").
    group_size: how many k share a scale and a zero. zero_offset: what is added to a stored zero.
    """

    PARTS: ClassVar[dict[str, str]]
    """The names of the stored tensors that hold codes, scales and zeros, and what these are called in canonical form:
    "qweight" int32 [N, K/8], "scales" [N, K/G], "zeros" uint8 [N, K/G]."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        """As large as `linear`, whose bias it takes over. Raises ValueError for a shape that the format cannot hold."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format = scheme.format
        self.group_size = scheme.group_size or self.in_features
        self.zero_offset = scheme.zero_offset
        if self.in_features % self.group_size:
            raise ValueError(f"K = {self.in_features} is not a multiple of the group size {self.group_size}")
        self.register_parameter("bias", linear.bias)

    def codes_zeros_scales(self) -> tuple[Tensor, Tensor | int, Tensor]:
        """Codes uint8 [N, K] in 0..15; zeros uint8 [N, K/G] in 0..16, or 8; scales [N, K/G]."""
        raise NotImplementedError

    def group_of_k(self) -> Tensor | None:
        """int32 [K]: the group of every k, or None if the groups are runs of `group_size` neighbours."""
        return None

    def to_canonical(self, name: str, stored: Tensor) -> Tensor:
        """The canonical form of the stored tensor of this name, which is one of PARTS; K is a multiple of 8."""
        raise NotImplementedError

    def from_canonical(self, name: str, canonical: Tensor) -> Tensor:
        """The inverse of `to_canonical`."""
        raise NotImplementedError

    def implied(self) -> dict[str, Tensor]:
        """The other stored tensors, with the only values that they have if columns are in no order of their own."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] in `dtype`: (code - zero) * scale, computed in `dtype` if the scales have it, else in float32."""
        codes, zeros, scales = self.codes_zeros_scales()
        group_of_k = self.group_of_k()
        if group_of_k is None:
            # Not unflatten: with a default device set, Dynamo breaks the graph there.
            codes, scales = codes.reshape(codes.shape[0], -1, self.group_size), scales.unsqueeze(-1)
            zeros = zeros.unsqueeze(-1) if isinstance(zeros, Tensor) else zeros
        else:
            scales = scales.index_select(1, group_of_k)
            zeros = zeros.index_select(1, group_of_k) if isinstance(zeros, Tensor) else zeros
        compute = dtype if scales.dtype == dtype else torch.float32
        # Codes, zeros and their differences are small integers, exact in every float dtype.
        weight = (codes.to(compute) - zeros) * scales.to(compute)
        return weight.reshape(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def faults(self) -> list[str]:
        """What is wrong with the values of the loaded tensors, as far as it can be told: a sentence each."""
        group_of_k = self.group_of_k()
        groups = self.in_features // self.group_size
        if group_of_k is None or (group_of_k.min() >= 0 and group_of_k.max() < groups):
            return []
        return [f"names a group outside 0..{groups - 1} in its index of groups"]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" format={self.format}, group_size={self.group_size}"
        )

    def _runs(self) -> Tensor:
        return torch.arange(self.in_features, dtype=torch.int32) // self.group_size

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))


class CompressedTensorsLinear(PackedLinear):
    """compressed-tensors "pack-quantized".

    weight_packed int32 [N, ceil(K/8)] along K; weight_scale [N, K/G]; weight_shape int64 [2], which is N, K;
    weight_zero_point int32 [ceil(N/8), K/G] along N, if asymmetric; weight_g_idx int32 [K], if act-order.
    """

    PARTS: ClassVar = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "zeros"}

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_g_idx: Tensor
    weight_shape: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__(linear, scheme)
        n, k, groups = self.out_features, self.in_features, self.in_features // self.group_size
        self.symmetric, self.group_index = not scheme.zeros, scheme.group_index
        self._declare("weight_packed", (n, _words(k)), torch.int32)
        self._declare("weight_scale", (n, groups), torch.float32)
        self._declare("weight_shape", (2,), torch.int64)
        if scheme.zeros:
            self._declare("weight_zero_point", (_words(n), groups), torch.int32)
        if scheme.group_index:
            self._declare("weight_g_idx", (k,), torch.int32)

    def codes_zeros_scales(self) -> tuple[Tensor, Tensor | int, Tensor]:
        n, k, groups = self.out_features, self.in_features, self.in_features // self.group_size
        codes = SEQUENTIAL.unpack(self.weight_packed, 1, n, 8 * _words(k))[:, :k]
        if self.symmetric:
            return codes, 8, self.weight_scale
        zeros = SEQUENTIAL.unpack(self.weight_zero_point, 0, 8 * _words(n), groups)[:n]
        return codes, zeros, self.weight_scale

    def group_of_k(self) -> Tensor | None:
        return self.weight_g_idx if self.group_index else None

    def to_canonical(self, name: str, stored: Tensor) -> Tensor:
        n, groups = self.out_features, self.in_features // self.group_size
        return SEQUENTIAL.unpack(stored, 0, 8 * _words(n), groups)[:n] if name == "weight_zero_point" else stored

    def from_canonical(self, name: str, canonical: Tensor) -> Tensor:
        if name != "weight_zero_point":
            return canonical
        return SEQUENTIAL.pack(F.pad(canonical, (0, 0, 0, -self.out_features % 8)), 0)

    def implied(self) -> dict[str, Tensor]:
        shape = torch.tensor([self.out_features, self.in_features])
        return {"weight_shape": shape, "weight_g_idx": self._runs()} if self.group_index else {"weight_shape": shape}

    def faults(self) -> list[str]:
        shape = [self.out_features, self.in_features]
        if self.weight_shape.tolist() == shape:
            return super().faults()
        return [*super().faults(), f"has weight_shape {self.weight_shape.tolist()}, the model needs {shape}"]


class ColumnsLinear(PackedLinear):
    """What GPTQ and AWQ have in common: W^T is stored, as qweight, qzeros packed along N, and scales [K/G, N]."""

    PARTS: ClassVar = {"qweight": "qweight", "scales": "scales", "qzeros": "zeros"}
    ORDER: ClassVar[BitOrder]
    DIM: ClassVar[int]
    """The dimension of qweight that is packed: 0 is K, 1 is N."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__(linear, scheme)
        n, k, groups = self.out_features, self.in_features, self.in_features // self.group_size
        if self.DIM == 0:
            _require_multiples_of_8(N=n, K=k)
        else:
            _require_multiples_of_8(N=n)
        self._declare("qweight", (k // 8, n) if self.DIM == 0 else (k, n // 8), torch.int32)
        self._declare("qzeros", (groups, n // 8), torch.int32)
        self._declare("scales", (groups, n), torch.float32)

    def codes_zeros_scales(self) -> tuple[Tensor, Tensor | int, Tensor]:
        return self._codes(self.qweight), self._zeros(self.qzeros), self.scales.t()

    def _codes(self, qweight: Tensor) -> Tensor:
        return self.ORDER.unpack(qweight, self.DIM, self.in_features, self.out_features).t()

    def _zeros(self, qzeros: Tensor) -> Tensor:
        stored = self.ORDER.unpack(qzeros, 1, self.in_features // self.group_size, self.out_features)
        return (stored + self.zero_offset if self.zero_offset else stored).t()

    def to_canonical(self, name: str, stored: Tensor) -> Tensor:
        if name == "qweight":
            return SEQUENTIAL.pack(self._codes(stored), 1)
        return self._zeros(stored) if name == "qzeros" else stored.t()

    def from_canonical(self, name: str, canonical: Tensor) -> Tensor:
        if name == "qweight":
            codes = SEQUENTIAL.unpack(canonical, 1, self.out_features, self.in_features)
            return self.ORDER.pack(codes.t(), self.DIM)
        if name == "qzeros":
            return self.ORDER.pack((canonical - self.zero_offset).t(), 1)
        return canonical.t().contiguous()

    def implied(self) -> dict[str, Tensor]:
        return {}


class GPTQLinear(ColumnsLinear):
    """GPTQ.

    qweight int32 [K/8, N] along K; qzeros int32 [K/G, N/8] along N; scales [K/G, N]; g_idx int32 [K], if stored.
    """

    ORDER, DIM = SEQUENTIAL, 0

    g_idx: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__(linear, scheme)
        self.group_index = scheme.group_index
        if scheme.group_index:
            self._declare("g_idx", (self.in_features,), torch.int32)

    def group_of_k(self) -> Tensor | None:
        return self.g_idx if self.group_index else None

    def implied(self) -> dict[str, Tensor]:
        return {"g_idx": self._runs()} if self.group_index else {}


class AWQLinear(ColumnsLinear):
    """AWQ "gemm".

    qweight int32 [K, N/8] and qzeros int32 [K/G, N/8], both along N and with even columns first; scales [K/G, N].
    """

    ORDER, DIM = EXLLAMA, 1


LAYERS: dict[str, type[PackedLinear]] = {
    "compressed-tensors": CompressedTensorsLinear,
    "gptq": GPTQLinear,
    "awq": AWQLinear,
}


def _words(codes: int) -> int:
    return (codes + 7) // 8


def _require_multiples_of_8(**sizes: int) -> None:
    for name, size in sizes.items():
        if size % 8:
            raise ValueError(f"{name} = {size} is not a multiple of 8, so its codes do not fill whole int32 words")
