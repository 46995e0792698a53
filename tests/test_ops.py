"""`torch.ops.w4a16.linear` by itself: right, well-behaved under PyTorch's own checks, and clear about bad input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import OWED, pack, recompiles, rel_l2
from torch import Tensor

import inductor_ext.ops  # registers torch.ops.w4a16
from inductor_ext import kernels

DTYPES = list(OWED)
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(kernels.load(name).usable() is not None, reason="not usable here"))
    for name in ("cpu", "reference")
]
ZEROS = ("none", "int", "float")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def problem(
    *,
    N: int = 32,
    K: int = 64,
    G: int = 32,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    zeros: str = "none",
    order: bool = False,
    bias: bool = False,
    kernel: str = "reference",
) -> tuple[dict[str, Any], Tensor]:
    """The op's arguments but x, and the weight they stand for in float64, computed without the package."""
    random = torch.Generator().manual_seed(N * K + G)
    codes = torch.randint(16, (N, K), generator=random)
    scales = (torch.randn(N, K // G, generator=random) / 16).to(scale_dtype or dtype)
    zero: Tensor | None = None
    if zeros == "int":
        zero = torch.randint(17, (N, K // G), generator=random).to(torch.uint8)
    elif zeros == "float":
        zero = (torch.rand(N, K // G, generator=random) * 15).to(dtype)
    groups = torch.arange(K) // G
    z64 = torch.full((N, K), 8.0).double() if zero is None else zero.double()[:, groups]
    dense = (codes - z64) * scales.double()[:, groups]
    permutation = torch.randperm(K, generator=random).int() if order else None
    args = {
        "qweight": pack(codes, 1),
        "scales": scales,
        "zeros": zero,
        "order": permutation,
        "bias": torch.randn(N, generator=random).to(dtype) if bias else None,
        "out_features": N,
        "group_size": G,
        "kernel": kernel,
    }
    return args, dense if permutation is None else dense[:, permutation.long()]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def linear(x: Tensor, args: dict[str, Any]) -> Tensor:
    y: Tensor = torch.ops.w4a16.linear(x, *args.values())
    return y


# -- right -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_op_is_as_exact_as_its_dtype_allows(kernel: str, dtype: torch.dtype, zeros: str) -> None:
    """rel-L2 against float64: 4e-3 in bfloat16, 6e-4 in float16, 2e-6 in float32, for every kind of weight."""
    shapes = ((32, 64, 32), (40, 256, 128), (8, 192, 192), (96, 64, 16), (1, 128, 32))
    for (N, K, G), (order, bias), M in itertools.product(shapes, ((False, True), (True, False)), (1, 4, 19)):
        args, dense = problem(N=N, K=K, G=G, dtype=dtype, zeros=zeros, order=order, bias=bias, kernel=kernel)
        x = drawn(M, K, dtype=dtype)
        y = linear(x, args)
        wanted = x.double() @ dense.T + (args["bias"].double() if bias else 0)
        assert y.dtype == dtype
        assert rel_l2(y, wanted) <= OWED[dtype], (N, K, G, order, bias, M)


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_may_have_a_dtype_of_their_own(kernel: str, dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    args, dense = problem(dtype=dtype, scale_dtype=scale_dtype, kernel=kernel)
    x = drawn(5, 64, dtype=dtype)
    assert rel_l2(linear(x, args), x.double() @ dense.T) <= OWED[dtype]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_themselves(kernel: str) -> None:
    """The same inputs give the same bits."""
    args, _ = problem(dtype=torch.bfloat16, zeros="int", order=True, bias=True, kernel=kernel)
    x = drawn(7, 64, dtype=torch.bfloat16)
    first = linear(x, args)
    assert all(torch.equal(linear(x, args), first) for _ in range(3))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_number_of_leading_dimensions(kernel: str, shape: tuple[int, ...]) -> None:
    """A vector, and no rows at all, among them."""
    args, dense = problem(bias=True, kernel=kernel)
    x = drawn(*shape, 64)
    y = linear(x, args)
    assert y.shape == (*shape, 32)
    assert y.numel() == 0 or rel_l2(y, x.double() @ dense.T + args["bias"].double()) <= 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_x_need_not_be_contiguous(kernel: str) -> None:
    args, dense = problem(order=True, kernel=kernel)
    base = drawn(2, 64, 6)
    for x in (base.transpose(1, 2), base.transpose(1, 2)[:, ::2], base[0, :, 0], drawn(1, 64).expand(4, 64)):
        before = x.clone()
        assert rel_l2(linear(x, args), x.double() @ dense.T) <= 2e-6
        assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bad_scale_spoils_its_own_row_only(kernel: str, bad: float) -> None:
    args, dense = problem(kernel=kernel)
    args["scales"][5, 1] = bad
    y = linear(drawn(3, 64), args)
    spoilt = ~torch.isfinite(y).all(0)
    assert spoilt.nonzero().flatten().tolist() == [5]
    good = [n for n in range(32) if n != 5]
    assert rel_l2(y[:, good], drawn(3, 64).double() @ dense[good].T) <= 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bad_activation_spoils_its_own_row_only(kernel: str) -> None:
    args, _ = problem(kernel=kernel)
    x = drawn(3, 64)
    x[1, 7] = float("nan")
    assert torch.isfinite(linear(x, args)).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_written_to(kernel: str) -> None:
    args, _ = problem(zeros="int", order=True, bias=True, kernel=kernel)
    before = {name: value.clone() for name, value in args.items() if isinstance(value, Tensor)}
    linear(drawn(5, 64), args)
    assert all(torch.equal(args[name], value) for name, value in before.items())


# -- PyTorch's own checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel: str, dtype: torch.dtype, zeros: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch, with dynamic shapes, for every kind of argument."""
    for (order, bias), shape in zip(((False, False), (True, True)), ((3, 64), (2, 2, 64)), strict=True):
        args, _ = problem(dtype=dtype, zeros=zeros, order=order, bias=bias, kernel=kernel)
        x = drawn(*shape, dtype=dtype)
        torch.library.opcheck(torch.ops.w4a16.linear.default, (x, *args.values()))
        if args["bias"] is not None:
            args["bias"].requires_grad_()
        torch.library.opcheck(torch.ops.w4a16.linear.default, (x.requires_grad_(), *args.values()))


@pytest.mark.parametrize("shape", [(3, 32), (2, 2, 32)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck_of_the_gradient(kernel: str, shape: tuple[int, ...]) -> None:
    for dtype, zeros, order in zip(DTYPES, ZEROS, (False, True, True), strict=True):
        args, dense = problem(dtype=dtype, zeros=zeros, order=order, kernel=kernel)
        grad = drawn(*shape, dtype=dtype)
        packed = [args[name] for name in ("qweight", "scales", "zeros", "order")]
        op = torch.ops.w4a16.linear_grad_x.default
        torch.library.opcheck(op, (grad, *packed, 64, 32, kernel))
        assert rel_l2(op(grad, *packed, 64, 32, kernel), grad.double() @ dense) <= OWED[dtype]


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel: str) -> None:
    """The gradient of x by differences; the op is linear in x, so float32 and a wide step are enough."""
    args, _ = problem(N=8, K=16, G=8, zeros="float", order=True, bias=True, kernel=kernel)
    args["bias"].requires_grad_()
    x = drawn(3, 16).requires_grad_()
    torch.autograd.gradcheck(
        lambda x, bias: linear(x, {**args, "bias": bias}), (x, args["bias"]), eps=0.25, atol=1e-4, fast_mode=False
    )


def test_one_graph_for_all_row_counts() -> None:
    args, dense = problem()
    compiled = torch.compile(lambda x: linear(x.view(-1, 64), args) + 1, fullgraph=True, dynamic=True)
    for M in (5, 3, 17, 2, 64, 129):  # 5 is no size of the weight: PyTorch takes equal sizes for one
        assert rel_l2(compiled(drawn(M, 64)), drawn(M, 64).double() @ dense.T + 1) <= 2e-6
    assert recompiles() == 1


def test_sizes_that_are_unknown_when_compiled() -> None:
    """M from the data (nonzero): no guard on it, none or one row among them."""
    args, dense = problem()

    @torch.compile(fullgraph=True)
    def chosen(x: Tensor, keep: Tensor) -> Tensor:
        return linear(x[keep], args)

    x = drawn(9, 64)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in (4, 0, 1, 9):
            keep = torch.arange(9) < count
            y = chosen(x, keep)
            assert y.shape == (count, 32)
            assert count == 0 or rel_l2(y, x[:count].double() @ dense.T) <= 2e-6
    assert recompiles() == 1


# -- bad input ---------------------------------------------------------------------------------------------------------

ARGS, _ = problem(zeros="int", order=True, bias=True)
X = drawn(3, 64)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "x of float64": ({"x": X.double()}, "x must be float16, bfloat16 or float32, it is torch.float64"),
    "x of integers": ({"x": X.int()}, "x must be float16, bfloat16 or float32, it is torch.int32"),
    "x a scalar": ({"x": X[0, 0]}, "x must have at least one dimension"),
    "x of another K": (
        {"x": X[:, :56], "group_size": 28},
        r"qweight must be \[32, 7\] for x float32 \[.*56\], it is int32 \[32, 8\]",
    ),
    "x of a K without groups": ({"x": X[:, :56]}, r"group_size 32 does not divide K=56; x is float32 \[.*56\]"),
    "x on another device": ({"x": X.to("meta")}, "qweight is on cpu, the activations are on meta"),
    "floating-point codes": ({"qweight": ARGS["qweight"].float()}, "qweight must be int32, it is torch.float32"),
    "codes of another width": (
        {"qweight": ARGS["qweight"].view(torch.uint8)},
        r"qweight must be|x must be \[",
    ),
    "codes of one dimension": (
        {"qweight": ARGS["qweight"][0]},
        r"qweight must be \[32, 8\] for x .*, it is int32 \[8\]",
    ),
    "codes with strides": ({"qweight": ARGS["qweight"].t().contiguous().t()}, "qweight must be contiguous"),
    "fewer rows of codes": (
        {"qweight": ARGS["qweight"][:31]},
        r"qweight must be \[32, 8\] for .*, it is int32 \[31, 8\]",
    ),
    "another out_features": ({"out_features": 33}, r"qweight must be \[33, 8\] for .*, it is int32 \[32, 8\]"),
    "integer scales": ({"scales": ARGS["scales"].int()}, "scales must be float16 or bfloat16 or float32"),
    "float64 scales": ({"scales": ARGS["scales"].double()}, "scales must be float16 or bfloat16 or float32"),
    "scales transposed": ({"scales": ARGS["scales"].t().contiguous()}, r"scales must be \[32, 2\]"),
    "scales with strides": ({"scales": ARGS["scales"].t().contiguous().t()}, "scales must be contiguous"),
    "scales of another group size": ({"scales": ARGS["scales"][:, :1].contiguous()}, r"scales must be \[32, 2\]"),
    "K no multiple of the group": ({"group_size": 24}, "group_size 24 does not divide K=64"),
    "group size 0": ({"group_size": 0}, "group_size 0 does not divide K=64"),
    "a negative group size": ({"group_size": -32}, "group_size -32 does not divide K=64"),
    "zeros of int32": (
        {"zeros": ARGS["zeros"].int()},
        "zeros must be uint8 or float16 or bfloat16 or float32, it is torch.int32",
    ),
    "zeros of another shape": ({"zeros": ARGS["zeros"][:31]}, r"zeros must be \[32, 2\]"),
    "order of int64": ({"order": ARGS["order"].long()}, "order must be int32, it is torch.int64"),
    "order of another length": ({"order": ARGS["order"][:63]}, r"order must be \[64\]"),
    "bias of another dtype": ({"bias": ARGS["bias"].half()}, "bias must be float32, it is torch.float16"),
    "bias of another length": ({"bias": ARGS["bias"][:31]}, r"bias must be \[32\], it is float32 \[31\]"),
    "bias of two dimensions": ({"bias": ARGS["bias"][None]}, r"bias must be \[32\]"),
    "scales on another device": (
        {"scales": ARGS["scales"].to("meta")},
        "scales is on meta, the activations are on cpu",
    ),
    "a kernel that is none": ({"kernel": "magic"}, "There is no kernel 'magic'; the kernels are .*cpu.*reference"),
}


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str, kernel: str) -> None:
    change, message = MISTAKES[mistake]
    arguments = {"x": X, **ARGS, "kernel": kernel, **change}
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.w4a16.linear(*arguments.values())


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if "device" not in name and "kernel" not in name])
def test_a_mistake_is_named_when_compiling(mistake: str) -> None:
    """The fake implementation has the same door."""
    change, message = MISTAKES[mistake]
    arguments = {"x": X, **ARGS, **change}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        torch.ops.w4a16.linear(*arguments.values())


def test_name_and_signature() -> None:
    """Others call the op by hand."""
    assert inductor_ext.ops.linear is torch.ops.w4a16.linear.default
    assert str(torch.ops.w4a16.linear.default._schema) == (
        "w4a16::linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, "
        'int out_features, int group_size, str kernel="reference") -> Tensor'
    )


@pytest.mark.parametrize("name", ["scales", "zeros"])
def test_what_gets_no_gradient_may_not_ask_for_one(name: str) -> None:
    given = {"scales": torch.ones(8, 2), "zeros": torch.ones(8, 2)}
    given[name].requires_grad_()
    codes, x = torch.zeros(8, 8, dtype=torch.int32), torch.ones(3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"linear gives no gradient to {name}, which requires one.*Freeze it"):
        torch.ops.w4a16.linear(x, codes, given["scales"], given["zeros"], None, None, 8, 32)


@pytest.mark.parametrize(("N", "K"), [(0, 64), (8, 0)])
def test_a_weight_has_rows_and_columns(N: int, K: int) -> None:
    codes, scales = torch.zeros(N, K // 8, dtype=torch.int32), torch.ones(N, K // 32)
    for device in ("cpu", "meta"):
        given = [t.to(device) for t in (torch.zeros(3, K), codes, scales)]
        with pytest.raises(RuntimeError, match=f"N and K must be at least 1, they are {N} and {K}"):
            torch.ops.w4a16.linear(*given, None, None, None, N, 32)
