"""What a model guards against and trials of ordinary values do not show: ids beyond its experts, infinities, a stored
tensor that it writes to. The compiled model gives what the model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inductor_ext
from inductor_ext.loader.experts import Canonical, _dequantize
from inductor_ext.passes import W4A16Pass

E, H, I, TOP_K, GROUP = 8, 64, 32, 2, 32  # noqa: E741


class Experts(nn.Module):
    """Gathered weights; the router knows of so many experts."""

    def __init__(self, routes: int = E) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.register_buffer("router", torch.randn(routes, H, generator=random))
        self.register_buffer("gain", torch.ones(()))
        for name, (N, K) in {"w13": (2 * I, H), "w2": (H, I)}.items():
            codes = torch.randint(-(2**31), 2**31 - 1, (E, N, K // 8), generator=random).int()
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scales", torch.rand(E, N, K // GROUP, generator=random) * 0.02 + 0.01)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(torch.softmax(x @ self.router.T, -1), TOP_K, -1)
        return ids, weights

    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, guard: Callable[[Tensor], Tensor] = lambda y: y
    ) -> Tensor:
        def project(name: str, rows: Tensor) -> Tensor:
            codes, scales = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales")
            weight = _dequantize(Canonical(codes, scales, None), x.dtype)
            return torch.bmm(weight[ids.reshape(-1)], rows.unsqueeze(-1)).squeeze(-1)

        gate, up = project("w13", x.repeat_interleave(TOP_K, 0)).chunk(2, -1)
        y = guard(project("w2", F.silu(gate) * up)) * weights.reshape(-1, 1)
        return y.view(-1, TOP_K, H).sum(1)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


X = torch.randn(16, H, generator=torch.Generator().manual_seed(1))


def zero_experts(m: Experts, x: Tensor) -> Tensor:
    """Half of the router's experts give back what they get."""
    ids, weights = m.route(x)
    real = (ids < E).to(x.dtype)
    return m(x, ids.clamp(max=E - 1), weights * real) + x * (weights * (1 - real)).sum(-1, keepdim=True)


def modulo(m: Experts, x: Tensor) -> Tensor:
    ids, weights = m.route(x)
    return m(x, ids % E, weights)


def null_experts(m: Experts, x: Tensor) -> Tensor:
    ids, weights = m.route(x)
    return m(x, ids.clamp(max=E - 1), weights * (ids < E))


def the_last_for_all(m: Experts, x: Tensor) -> Tensor:
    ids, weights = m.route(x)
    return m(x, ids.clamp(max=E - 1), weights)


@pytest.mark.parametrize("form", [zero_experts, modulo, null_experts, the_last_for_all])
def test_ids_beyond_the_experts(form: Callable[[Experts, Tensor], Tensor]) -> None:
    m = Experts(routes=2 * E)
    wanted = form(m, X)
    report = inductor_ext.explain(lambda x: form(m, x), X)
    torch.testing.assert_close(torch.compile(lambda x: form(m, x), backend="w4a16")(X), wanted, rtol=1e-4, atol=1e-5)
    assert [found.op for found in report.rewritten] == ["w4a16::moe"]


def test_ids_beyond_the_experts_are_an_error_where_the_model_has_one() -> None:
    """A limit that lets them through makes them nothing to skip."""
    m = Experts(routes=2 * E)

    def forward(x: Tensor) -> Tensor:
        ids, weights = m.route(x)
        return m(x, ids.clamp(min=0), weights)

    with pytest.raises(IndexError):
        forward(X)
    with pytest.raises((RuntimeError, IndexError), match=r"topk_ids must be -1 or 0\.\.7|out of"):
        torch.compile(forward, backend="w4a16")(X)


def no_infinities(y: Tensor) -> Tensor:
    y = y.clone()
    y[torch.isinf(y)] = 0
    return y


GUARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "isinf": no_infinities,
    "nan_to_num_": lambda y: y.clone().nan_to_num_(posinf=0.0, neginf=0.0),
    "clamp_max_": lambda y: y.clone().clamp_max_(1e30),
    "fmin": lambda y: torch.fmin(y, torch.tensor(1e30)),
    "is it infinite": lambda y: torch.where(y == torch.inf, 0, y),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_against_what_no_trial_has_is_left_alone(guard: str) -> None:
    m = Experts()

    def forward(x: Tensor) -> Tensor:
        return m(x, *m.route(x), GUARDS[guard])

    report = inductor_ext.explain(forward, X)
    assert report.rewritten == [] and report.left_alone
    large = X * torch.logspace(0, 37, len(X))[:, None]
    found, wanted = torch.compile(forward, backend="w4a16")(large), forward(large)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_stored_tensor_that_an_exported_program_writes_to_is_no_constant() -> None:
    class Decaying(Experts):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            y = super().forward(x, *self.route(x), lambda y: y * self.gain)
            self.gain.mul_(0.5)
            return y

    gm: Any = torch.export.export(Decaying(), (X,)).module()
    W4A16Pass()(gm.graph)
    gm.recompile()
    plain = Decaying()
    for _ in range(3):
        torch.testing.assert_close(gm(X), plain(X), rtol=1e-4, atol=1e-5)
