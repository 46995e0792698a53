"""What a graph writes to, returns or computes twice is what it would be without us: by whatever name a stored tensor is
written, no stale copy of it is used, and only what a matmul's weight is made of is computed once for several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inductor_ext

N = K = 64
GROUPS = 2


class Layer(nn.Module):
    """As GPTQ stores weights: scales are copied when they are packed."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.register_buffer(
            "words", torch.randint(-(2**31), 2**31, (K // 8, N), generator=random, dtype=torch.int64).int()
        )
        self.register_buffer("scales", torch.rand(GROUPS, N, generator=random) + 0.5)
        self.register_buffer("flat", torch.rand(GROUPS * N, generator=random) + 0.5)
        self.register_buffer("empty", torch.zeros(3, N))
        self.register_buffer("shifts", torch.arange(0, 32, 4, dtype=torch.int32).view(1, 8, 1))
        self.register_buffer("bias", torch.rand(N, generator=random))
        self.gain = nn.Parameter(torch.rand(N, generator=random) + 0.5)

    def weight(self, scales: Tensor) -> Tensor:
        q = ((self.words.unsqueeze(1) >> self.shifts) & 15).view(GROUPS, K // GROUPS, N).float() - 8
        return (q * scales.unsqueeze(1)).view(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight(self.scales)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def same(forward: Callable[[Layer, Tensor], Tensor], rewritten: int) -> None:
    """As without compiling, and what it left in the module too; with so many matmuls rewritten."""
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    plain, ours, examined = Layer(), Layer(), Layer()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                torch.compile(lambda x: forward(ours, x), backend="w4a16")(x), forward(plain, x), rtol=1e-4, atol=1e-3
            )
        report = inductor_ext.explain(lambda x: forward(examined, x), x)
    for own, wanted in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-3)
    assert len(report.rewritten) == rewritten, report


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda s: s.data.mul_(2),
    "to": lambda s: s.to(torch.float32).mul_(2),
    "float": lambda s: s.float().mul_(2),
    "contiguous": lambda s: s.contiguous().mul_(2),
    "as_strided": lambda s: torch.as_strided(s, (N,), (1,)).mul_(2),
    "diagonal": lambda s: s.diagonal().mul_(2),
    "unfold": lambda s: s.unfold(0, 2, 2).mul_(2),
    "foreach": lambda s: torch._foreach_mul_([s], 2.0),
    "view": lambda s: s.view(-1)[3:].mul_(2),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_stored_tensor_is_written_to(how: str) -> None:
    def forward(m: Layer, x: Tensor) -> Tensor:
        WRITES[how](m.scales)
        return m(x)

    same(forward, rewritten=0)


def test_a_stored_tensor_is_written_to_where_its_weight_is_made() -> None:
    def forward(m: Layer, x: Tensor) -> Tensor:
        scales = m.scales.float()
        scales.mul_(2)
        return x @ m.weight(scales)

    same(forward, rewritten=0)


def test_another_tensor_in_the_same_memory_is_written_to() -> None:
    def forward(m: Layer, x: Tensor) -> Tensor:
        m.flat.mul_(2)
        return x @ m.weight(m.scales)

    def made() -> Layer:
        m = Layer()
        m.scales = m.flat.view(GROUPS, N)
        return m

    x = torch.randn(3, K)
    plain, ours = made(), made()
    with torch.no_grad():
        got = torch.compile(lambda x: forward(ours, x), backend="w4a16")(x)
    torch.testing.assert_close(got, forward(plain, x), rtol=1e-4, atol=1e-3)


def test_what_is_returned_twice_is_two_tensors() -> None:
    m, x = Layer(), torch.randn(3, K)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return m(x), m.empty.clone(), m.empty.clone()

    with torch.no_grad():
        _, first, second = torch.compile(forward, backend="w4a16")(x)
    first.add_(1)
    assert not second.any()


def test_with_gradients_and_without_are_two_things() -> None:
    m, x = Layer(), torch.randn(3, K)

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = (m.gain * 2).norm()
        return m(x) * (m.gain * 2) / norm

    torch.compile(forward, backend="w4a16")(x).sum().backward()
    found, m.gain.grad = m.gain.grad, None
    forward(x).sum().backward()
    assert found is not None and m.gain.grad is not None
    torch.testing.assert_close(found, m.gain.grad, rtol=1e-4, atol=1e-4)


def test_one_weight_for_two_matmuls_is_made_once() -> None:
    same(lambda m, x: m(x) + m(x + 1), rewritten=2)


def test_addmm_into_another_tensor_is_left_alone() -> None:
    def forward(m: Layer, x: Tensor) -> Tensor:
        out = torch.empty(3, N)
        torch.addmm(m.bias, x, m.weight(m.scales), out=out)
        return out * 2

    same(forward, rewritten=0)


@pytest.mark.parametrize("shape", [(), (1,), (1, N), (3, N)], ids=str)
def test_a_bias_that_is_none_of_ours_is_left_alone(shape: tuple[int, ...]) -> None:
    bias = torch.rand(shape)
    same(lambda m, x: F.linear(x, m.weight(m.scales).t(), bias), rewritten=0)


def test_einsum_that_broadcasts_k_is_left_alone() -> None:
    same(lambda m, x: torch.einsum("bk,kn->bn", x[:, :1], m.weight(m.scales)), rewritten=0)


def test_a_square_weight_that_is_turned_is_proved_again() -> None:
    """In the same memory and version."""

    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-8, 8, (N, K), dtype=torch.int8), requires_grad=False)
            self.register_buffer("scales", torch.rand(N, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.codes.float() * self.scales)

    m, x = Codes(), torch.randn(3, K)
    compiled = torch.compile(m, backend="w4a16")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), m(x), rtol=1e-4, atol=1e-3)
        m.codes.data = m.codes.data.t()
        torch.testing.assert_close(compiled(x), m(x), rtol=1e-4, atol=1e-3)
