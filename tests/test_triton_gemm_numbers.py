"""What `torch.ops.w4a16.triton_w4a16_gemm` computes: on a GPU, or with TRITON_INTERPRET=1 on the CPU, as
test_triton_gemm.py runs this file."""

from __future__ import annotations

import pytest
import torch
from field import check, gemm, problem
from interpreter import DEVICE, DTYPES, needs_a_device
from models import pack

pytestmark = needs_a_device


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["one zero", "zeros"])
@pytest.mark.parametrize("G", [32, 64, 128, 256, 512])
def test_every_group_size(G: int, zeros: bool, dtype: torch.dtype) -> None:
    """512 is K. With 32 a block of 64 would take one group's scale for two: a bug that the field once had."""
    check(5, 136, 512, G, zeros, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 31, 33, 64, 65, 130])
def test_rows_that_fill_no_tile(M: int, dtype: torch.dtype) -> None:
    check(M, 72, 128, 64, True, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 24, 40, 96, 200])
@pytest.mark.parametrize("N", [8, 128, 264])
def test_columns_that_fill_no_tile(N: int, K: int, dtype: torch.dtype) -> None:
    """K is the one group here, of any size."""
    check(3, N, K, K, True, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zp_bias", [0, 7, 16])
def test_another_zero(zp_bias: int, dtype: torch.dtype) -> None:
    check(3, 40, 64, 32, False, dtype, zp_bias)


def test_stored_zeros_win_over_zp_bias() -> None:
    check(3, 40, 64, 32, True, torch.float16, zp_bias=1)


def test_each_code_of_each_column_by_hand() -> None:
    """Row k of the identity picks row k of the weight: every nibble is where the contract has it."""
    codes = (torch.arange(32)[:, None] + 3 * torch.arange(24)) % 16
    scales = torch.arange(1, 25).half()[None]
    zeros = torch.arange(24)[None] % 16
    eye = torch.eye(32).half()
    y = gemm(*(t.to(DEVICE) for t in (eye, pack(codes, 1), scales, pack(zeros, 1))), 32)
    assert torch.equal(y.cpu(), ((codes - zeros) * scales).half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(0, 16, 64), (3, 0, 64), (3, 16, 0)], ids=["M", "N", "K"])
def test_nothing_to_compute(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    a = torch.ones(M, K, dtype=dtype, device=DEVICE)
    words = torch.ones(K, N // 8, dtype=torch.int32, device=DEVICE)
    scales = torch.ones(K // 32, N, dtype=dtype, device=DEVICE)
    y = gemm(a, words, scales, None, 32)
    assert torch.equal(y, torch.zeros(M, N, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("zeros", [False, True], ids=["one zero", "zeros"])
def test_the_op_keeps_pytorch_s_rules(zeros: bool) -> None:
    args, _ = problem(3, 16, 64, 32, zeros, torch.float16)
    torch.library.opcheck(gemm.default, tuple(args.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype) -> None:
    args, _ = problem(33, 136, 256, 64, True, dtype)
    first = gemm(**args)
    assert all(torch.equal(gemm(**args), first) for _ in range(3))
