"""Packed linear layers as people write them; what they compute is told by a slow way in float64.

Nothing here uses inductor_ext: tests import this file in processes that must not have imported it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OWED = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Relative L2 against float64 that one op owes; `rel_l2` measures it."""


def rel_l2(y: Tensor, expected: Tensor) -> float:
    """Relative L2 distance of y from expected."""
    return float((y.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def pack(codes: Tensor, dim: int) -> Tensor:
    """int32 words of 8 codes (0..15) along ``dim``, low bits first."""
    words = sum(codes.long().unflatten(dim, (-1, 8)).select(dim + 1, i) << (4 * i) for i in range(8))
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32).contiguous()


def unpack(words: Tensor, dim: int) -> Tensor:
    """int64 codes: the inverse of pack."""
    return torch.stack([(words.long() >> (4 * i)) & 15 for i in range(8)], dim + 1).flatten(dim, dim + 1)


class Packed(nn.Module):
    """y = x @ W.T + bias with W [N, K] = (code - zero) * scale, dequantised in every forward.

    ``dense()`` is W in float64 as the tensors are now; ``expected(x)`` is y in float64.
    """

    def __init__(
        self, N: int, K: int, *, group: int = 32, dtype: torch.dtype = torch.float32, bias: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.N, self.K, self.group = N, K, group
        random = torch.Generator().manual_seed(seed)
        codes = torch.randint(16, (N, K), generator=random)
        zeros = torch.randint(15, (N, K // group), generator=random)
        scales = (torch.rand(N, K // group, generator=random) + 0.5).to(dtype) / 32
        self.bias = nn.Parameter(torch.randn(N, generator=random).to(dtype)) if bias else None
        self.store(codes, zeros, scales)

    def store(self, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
        raise NotImplementedError

    def dense(self) -> Tensor:
        raise NotImplementedError

    def expected(self, x: Tensor) -> Tensor:
        y = x.double() @ self.dense().T
        return y if self.bias is None else y + self.bias.double()


class CompressedTensors(Packed):
    """Symmetric, words [N, K/8] along K: the canonical form itself, so nothing is converted."""

    def store(self, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
        self.register_buffer("weight_packed", pack(codes, 1))
        self.register_buffer("weight_scale", scales)

    def forward(self, x: Tensor) -> Tensor:
        q = (self.weight_packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        q = (q.reshape(self.N, -1, self.group) - 8).to(x.dtype)
        return F.linear(x, (q * self.weight_scale.unsqueeze(-1)).view(self.N, self.K), self.bias)

    def dense(self) -> Tensor:
        scales = self.weight_scale.double().repeat_interleave(self.group, 1)
        return (unpack(self.weight_packed, 1) - 8) * scales


class GPTQ(Packed):
    """Words [K/8, N] along K, zeros stored less 1 along N, g_idx: every tensor needs conversion."""

    def store(self, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
        self.register_buffer("qweight", pack(codes.T.contiguous(), 0))
        self.register_buffer("qzeros", pack(zeros.T.contiguous(), 1))
        self.register_buffer("scales", scales.T.contiguous())
        self.register_buffer("g_idx", torch.arange(self.K, dtype=torch.int32) // self.group)

    def act_order_(self, seed: int = 0) -> GPTQ:
        """Puts the columns into groups at random, in place."""
        self.g_idx.copy_(self.g_idx[torch.randperm(self.K, generator=torch.Generator().manual_seed(seed))].clone())
        return self

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        q = ((self.qweight[:, None, :] >> shifts[:, None]) & 15).reshape(self.K, self.N)
        z = ((self.qzeros[:, :, None] >> shifts) & 15).reshape(-1, self.N) + 1
        g = self.g_idx.long()
        y = torch.matmul(x, (q - z[g]).to(x.dtype) * self.scales[g])
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        g = self.g_idx.long()
        q, z = unpack(self.qweight, 0), unpack(self.qzeros, 1) + 1
        return ((q - z[g]) * self.scales.double()[g]).T


class Int8(Packed):
    """One int8 an element, -8..7: a layer of the same graph may hold integers beyond 4 bits."""

    def store(self, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
        self.register_buffer("values", (codes - 8).to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        q = self.values.view(self.N, -1, self.group).to(x.dtype)
        return F.linear(x, (q * self.scales.unsqueeze(-1)).view(self.N, self.K), self.bias)

    def dense(self) -> Tensor:
        return self.values.double() * self.scales.double().repeat_interleave(self.group, 1)


SPELLINGS = (CompressedTensors, GPTQ)


def chain(*layers: Packed) -> Any:
    """The layers one after another, and ``expected`` for the whole."""
    model: Any = nn.Sequential(*layers)
    model.expected = lambda x: _expected(layers, x)
    return model


def _expected(layers: tuple[Packed, ...], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer.expected(x)
    return x


def recompiles() -> int:
    """How many graphs Dynamo has compiled since the last torch.compiler.reset()."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Calls:
    """Of packed kernels of any op, during a test. A right answer is not enough: it must come from the fused op."""

    def __init__(self, patch: Any) -> None:
        """``patch``: pytest's monkeypatch."""
        from inductor_ext import kernels, passes

        patch.setattr(passes, "DIRECT", False)

        self.packs = 0
        self.ran: list[str] = []
        """The kernels that ran, by name."""
        self.addresses: list[int] = []
        """Of the packed tensors of the last run."""
        self.packed: list[weakref.ref[Tensor]] = []
        """Every packed tensor that a kernel was run with."""
        for op, name in [(row.op, row.name) for row in kernels.table.TABLE]:
            if kernels.why_unusable(op, name) is None:
                kernel = kernels.load_for(op, name)
                patch.setattr(kernel, "run", self._run(name, kernel.run))
                patch.setattr(kernel, "pack", self._pack(kernel.pack))

    @property
    def runs(self) -> int:
        return len(self.ran)

    def _run(self, name: str, run: Any) -> Any:
        from inductor_ext.kernels import Packed

        def watched(*args: Any) -> Any:
            tensors = [t for packed in args if isinstance(packed, Packed) for t in packed if t is not None]
            self.ran.append(name)
            self.addresses = [t.data_ptr() for t in tensors]
            self.packed += [weakref.ref(t) for t in tensors]
            return run(*args)

        return watched

    def _pack(self, pack: Any) -> Any:
        def watched(*args: Any) -> Any:
            self.packs += 1
            return pack(*args)

        return watched


def x_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same activations every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def two_layers(**kwargs: Any) -> Any:
    """A layer that is read as it is and one that is converted, [*, 64] -> [*, 32]."""
    return chain(CompressedTensors(96, 64, seed=1, **kwargs), GPTQ(32, 96, seed=2, **kwargs).act_order_())
