"""What the Triton kernels for int8 weights compute: on a GPU, or with TRITON_INTERPRET=1 on the CPU, as test_int8.py
runs this file."""

from __future__ import annotations

from collections.abc import Iterator

import int8
import pytest
import torch
from interpreter import DEVICE, DTYPES, needs_a_device
from models import OWED, rel_l2
from moe_problems import MLPS
from torch import Tensor

import inductor_ext.ops  # noqa: F401  registers torch.ops.w4a16
from inductor_ext.formats import PackedInt8
from inductor_ext.kernels import Packed, Routing
from inductor_ext.kernels import reference_moe as reference
from inductor_ext.kernels.gpu import experts_int8, linear_int8

pytestmark = needs_a_device


@pytest.fixture(autouse=True)
def no_memory_is_zero_by_chance() -> Iterator[None]:
    """Memory that is not written to is NaN, and -1 or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on(packed: Packed) -> Packed:
    return Packed(*(None if t is None else t.to(DEVICE) for t in packed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K", "G", "zeros", "order", "bias"),
    [
        (1, 64, 256, 32, "none", False, False),
        (17, 70, 384, 96, "int", True, True),
        (5, 8, 256, 256, "int", False, True),
    ],
)
def test_dense(M: int, N: int, K: int, G: int, zeros: str, order: bool, bias: bool, dtype: torch.dtype) -> None:
    w = int8.weight(N, K, G, zeros, order, dtype)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    b = torch.randn(N).to(dtype) if bias else None
    packed = on(linear_int8.pack(w))
    own = (t if t is None else t.to(DEVICE) for t in (*packed, b))
    y = torch.ops.w4a16.linear(x.to(DEVICE), *own, N, G, "triton_int8")
    wanted = x.double() @ w.dequantize(torch.float64).T + (0 if b is None else b.double())
    assert rel_l2(y.cpu(), wanted) <= OWED[dtype]


def experts(E: int, N: int, K: int, G: int, zeros: str, dtype: torch.dtype) -> tuple[Packed, PackedInt8]:
    w = int8.weight(E * N, K, G, zeros, False, dtype, seed=N)
    return on(experts_int8.pack(w, E)), w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mlp", "T", "zeros", "bias"),
    [
        ("silu", 2, "none", False),
        ("swigluoai interleaved", 9, "int", True),
        ("weight on the input", 5, "none", True),
        ("scaled", 40, "int", False),
    ],
)
def test_experts(mlp: str, T: int, zeros: str, bias: bool, dtype: torch.dtype) -> None:
    """Five ids, of which one is of nobody here, and choices of nobody with weights that are NaN."""
    E, H, I, k = 4, 64, 96, 2  # noqa: E741
    random = torch.Generator().manual_seed(T)
    (w13, _), (w2, _) = experts(E, 2 * I, H, 32, zeros, dtype), experts(E, H, I, 96, zeros, dtype)
    ids = torch.rand(T, 5, generator=random).argsort(1)[:, :k]
    weights = torch.rand(T, k, generator=random)
    ids[0, 0], weights[0, 0] = -1, float("nan")
    expert_map = torch.tensor([1, -1, 0, 3, 2]).int()
    biases: list[Tensor | None] = [None, None]
    if bias:
        biases = [torch.randn(E, n, generator=random).to(dtype).to(DEVICE) for n in (2 * I, H)]
    x = torch.randn(T, H, generator=random).to(dtype).to(DEVICE)
    routing = Routing(weights.to(DEVICE), ids.to(DEVICE), expert_map.to(DEVICE), 5)
    given = (routing, w13, w2, *biases, MLPS[mlp], I, (32, 96))
    y = experts_int8.run(x, *given)
    wanted = reference.run(x.float(), *given)
    assert rel_l2(y.cpu(), wanted.cpu().double()) <= OWED[dtype]
    assert torch.equal(y, experts_int8.run(x, *given))
