"""What every entry is made of: random numbers, a packer of its own, and a module that spells the computation.

Nothing here uses inductor_ext: a mistake in the package must not hide behind the same mistake in its tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, Any]
Make = Callable[[int, int, int, torch.dtype, torch.Generator], Made]


@dataclasses.dataclass(frozen=True)
class Idiom:
    """One way to write "dequantise int4, then matmul", or one near miss.

    make(N, K, group, dtype, generator) gives (module, dense). ``dense`` is the exact float64 weight [N, K] (a list of
    them for modules with several), drawn before packing; ``module.expected(x, dense)`` is what the module computes, in
    float64.
    """

    name: str
    make: Make
    positive: bool | None = True
    """True: must be rewritten. False: must be refused. None: either, but the result must be right."""
    reason: str = ""
    """Of a refusal: a regular expression that its reason contains."""
    rewritten: int = 1
    """How many matmuls are rewritten."""
    leading: tuple[tuple[int, ...], ...] = ((5,), (2, 3))
    """The shapes of x before K that the spelling is tried with."""
    core: bool = False
    """Also compiled, not only explained, and in every dtype."""


ZOO: list[Idiom] = []


class Draw:
    """The random numbers behind a weight of N rows, K columns, in groups of ``group`` along K.

    codes int64 [N, K] and zeros int64 [N, K/group] in 0..15, all of which occur; scales [N, K/group] in ``dtype``, of
    both signs; g_idx int64 [K], which gives every group as many columns, in random places.
    """

    def __init__(self, N: int, K: int, group: int, dtype: torch.dtype, generator: torch.Generator):
        self.N, self.K, self.group, self.dtype, self.generator = N, K, group, dtype, generator
        self.codes = self.each_of(16, (N, K))
        self.zeros = self.each_of(16, (N, K // group))
        self.scales = self.floats(N, K // group)
        self.g_idx = self.each_of(K // group, (K,))

    @classmethod
    def channelwise(cls, d: Draw) -> Draw:
        """Another draw of the same shape, with one group a row."""
        return cls(d.N, d.K, d.K, d.dtype, d.generator)

    def each_of(self, n: int, shape: tuple[int, ...]) -> Tensor:
        """int64: 0..n-1 in random places, as often each as the shape allows."""
        size = int(np.prod(shape))
        return (torch.randperm(size, generator=self.generator) % n).view(shape)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers of both signs, 0.01 to 0.06 in size."""
        size = torch.rand(shape, generator=self.generator) * 0.05 + 0.01
        sign = torch.randint(2, shape, generator=self.generator) * 2 - 1
        return (size * sign).to(dtype or self.dtype)

    def dense(
        self,
        zeros: Tensor | int = 8,
        codes: Tensor | None = None,
        scales: Tensor | None = None,
        g_idx: Tensor | None = None,
    ) -> Tensor:
        """float64 [N, K]: (codes - zeros) * scales, column k being of group g_idx[k], or k // group."""
        if g_idx is None:
            g_idx = torch.arange(self.K) // self.group
        q = (self.codes if codes is None else codes).double()
        s = (self.scales if scales is None else scales).double()[:, g_idx]
        return (q - (zeros if isinstance(zeros, int) else zeros.double()[:, g_idx])) * s


def pack(codes: Tensor, dim: int, dtype: torch.dtype = torch.int32, order: Sequence[int] | None = None) -> Tensor:
    """Words of ``dtype`` along ``dim`` of integers 0..15: bits 4i..4i+3 of a word hold value order[i] of its run."""
    per_word = dtype.itemsize * 2
    runs = np.moveaxis(codes.numpy().astype(np.uint64), dim, -1)
    runs = runs.reshape(*runs.shape[:-1], -1, per_word)
    words = np.zeros(runs.shape[:-1], np.uint64)
    for i, source in enumerate(order or range(per_word)):
        words |= runs[..., source] << np.uint64(4 * i)
    unsigned = words.astype(f"u{dtype.itemsize}")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(unsigned, -1, dim))).view(dtype)


class Layer(nn.Module):
    """matmul(m, x, dequant(m)): the two functions are the spelling, the tensors are kept as buffers."""

    bias: Tensor | None

    def __init__(
        self,
        d: Draw,
        dequant: Callable[[Any], Tensor],
        *,
        matmul: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
        bias: Tensor | None = None,
        arguments: tuple[Tensor, ...] = (),
        **tensors: Tensor | None,
    ):
        super().__init__()
        self.N, self.K, self.group, self.dtype = d.N, d.K, d.group, d.dtype
        self.dequant, self.matmul = dequant, matmul or linear
        self.arguments = arguments
        for name, tensor in {"bias": bias, **tensors}.items():
            self.register_buffer(name, None if tensor is None else tensor.contiguous())

    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        return self.matmul(self, x, self.dequant(self, *arguments))

    def expected(self, x: Tensor, dense: Tensor) -> Tensor:
        """What forward computes, in float64."""
        y = x.double() @ dense.T
        return y if self.bias is None else y + self.bias.double()


def linear(m: Any, x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w, m.bias)


def times_kn(m: Any, x: Tensor, w: Tensor) -> Tensor:
    """The weight is stored [K, N], as GPTQ and AWQ have it."""
    return torch.matmul(x, w)


def grouped(m: Any, q: Tensor, zeros: Tensor | int = 8) -> Tensor:
    """(q - zeros) * m.scales over [N, K/G, G], the plainest spelling, for entries whose point is elsewhere."""
    q = q.view(m.N, -1, m.group).to(m.dtype)
    zeros = zeros if isinstance(zeros, int) else zeros.unsqueeze(-1).to(m.dtype)
    return ((q - zeros) * m.scales.unsqueeze(-1)).view(m.N, m.K)


Build = Callable[[Draw], Made]


def positive(name: str, **fields: Any) -> Callable[[Build], Build]:
    """Registers a spelling that must be rewritten."""
    return _register(name, positive=True, **fields)


def negative(name: str, reason: str, **fields: Any) -> Callable[[Build], Build]:
    """Registers a near miss that must be refused, with a reason that matches."""
    return _register(name, positive=False, reason=reason, **fields)


def either(name: str, **fields: Any) -> Callable[[Build], Build]:
    """Registers a computation that may be rewritten or refused."""
    return _register(name, positive=None, **fields)


def _register(name: str, **fields: Any) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        def make(N: int, K: int, group: int, dtype: torch.dtype, generator: torch.Generator) -> Made:
            return build(Draw(N, K, group, dtype, generator))

        ZOO.append(Idiom(name, make, **fields))
        return build

    return register


def given(
    idiom: Idiom,
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (64, 128, 32),
    leading: tuple[int, ...] | None = None,
) -> tuple[Any, Any, Tensor]:
    """The idiom at (N, K, group) = ``shape``: module, dense and an input x [*leading, K]; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    module, dense = idiom.make(*shape, dtype, generator)
    leading = idiom.leading[0] if leading is None else leading
    return module, dense, torch.randn(*leading, shape[1], generator=generator).to(dtype)


def call(module: Any, x: Tensor) -> Tensor:
    """module(x), with the other arguments that a few refusals need."""
    y: Tensor = module(x, *getattr(module, "arguments", ()))
    return y


def distance(y: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float(((y.double() - expected).norm() / expected.norm()).detach())


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Nothing compiled before or left behind; one thread, since on matrices this small threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)
