"""`torch.ops.w4a16.triton_w4a16_gemm` as an op: what it refuses, what tracing sees, what it needs to be imported. What
it computes is in test_triton_gemm_numbers.py."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import interpreter
import pytest
import torch
from field import check, gemm, problem
from interpreter import DTYPES
from models import OWED, recompiles, rel_l2
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import inductor_ext.ops


def arguments(M: int = 3, N: int = 16, K: int = 128, G: int = 64, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    return {
        "a": torch.zeros(M, K, dtype=dtype),
        "b_q": torch.zeros(K, N // 8, dtype=torch.int32),
        "scales": torch.zeros(K // G, N, dtype=dtype),
        "qzeros": torch.zeros(K // G, N // 8, dtype=torch.int32),
        "group_size": G,
    }


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_the_signature_is_the_field_s() -> None:
    assert inductor_ext.ops.triton_w4a16_gemm is gemm.default
    assert str(gemm.default._schema) == (
        "w4a16::triton_w4a16_gemm(Tensor a, Tensor b_q, Tensor scales, Tensor? qzeros, int group_size, int zp_bias=8) "
        "-> Tensor"
    )


# -- refused -----------------------------------------------------------------------------------------------------------

WORDS = torch.zeros(128, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.zeros(3, 128)}, "a must be float16 or bfloat16, it is float32"),
        ({"a": torch.zeros(128).half()}, r"a must be \[M, K\], it is \[128\]"),
        ({"a": torch.zeros(128, 3).half().t()}, r"a must be contiguous, it has strides \[1, 3\]"),
        ({"a": torch.zeros(3, 64).half()}, r"b_q must be \[64, 2\], it is \[128, 2\]"),
        ({"b_q": torch.zeros(256).int()}, r"b_q must be \[K, N/8\], it is \[256\]"),
        ({"b_q": WORDS.long()}, "b_q must be int32, it is int64"),
        ({"b_q": torch.zeros(2, 128).int().t()}, r"b_q must be contiguous, it has strides \[1, 128\]"),
        ({"b_q": torch.zeros(128, 3).int()}, r"scales must be \[2, 24\], it is \[2, 16\]"),
        ({"scales": torch.zeros(2, 16)}, "scales must be float16, it is float32"),
        ({"scales": torch.zeros(2, 16).bfloat16()}, "scales must be float16, it is bfloat16"),
        ({"scales": torch.zeros(16, 2).half()}, r"scales must be \[2, 16\], it is \[16, 2\]"),
        ({"scales": torch.zeros(16, 2).half().t()}, r"scales must be contiguous, it has strides \[1, 2\]"),
        ({"qzeros": torch.zeros(2, 16).int()}, r"qzeros must be \[2, 2\], it is \[2, 16\]"),
        ({"qzeros": torch.zeros(2, 2).half()}, "qzeros must be int32, it is float16"),
        ({"qzeros": torch.zeros(2, 2).int().t()}, r"qzeros must be contiguous, it has strides \[1, 2\]"),
        ({"qzeros": torch.zeros(2, 2, device="meta").int()}, "qzeros is on meta, a is on cpu"),
        ({"group_size": -1}, "group_size must be 32, 64, 128, 256 or K=128, it is -1; for -1 the caller gives K"),
        ({"group_size": 16}, "group_size must be 32, 64, 128, 256 or K=128, it is 16"),
        ({"group_size": 256}, "group_size 256 does not divide K=128"),
        ({"group_size": 32}, r"scales must be \[4, 16\], it is \[2, 16\]"),
        ({"a": torch.zeros(3, 0).half(), "group_size": 0}, "group_size must be 32, 64, 128, 256 or K=0, it is 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named(changed: dict[str, Any], message: str) -> None:
    wrong = arguments() | changed
    with pytest.raises(RuntimeError, match=f"w4a16::triton_w4a16_gemm: {message}"):
        gemm(**wrong)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        gemm(**wrong)


def test_the_cpu_is_refused_with_the_way_around() -> None:
    with pytest.raises(RuntimeError, match=r"a must be on a CUDA or ROCm device, it is on cpu.*TRITON_INTERPRET=1"):
        gemm(**arguments())


def test_the_interpreter_is_not_given_bfloat16() -> None:
    code = """
import torch, inductor_ext.ops
a, s = torch.ones(1, 32).bfloat16(), torch.ones(1, 8).bfloat16()
torch.ops.w4a16.triton_w4a16_gemm(a, torch.ones(32, 1).int(), s, None, 32)
"""
    done = run(code, TRITON_INTERPRET="1")
    assert "a must be float16 under TRITON_INTERPRET=1, it is bfloat16" in done.stderr


def test_triton_is_neither_imported_nor_needed_before_the_first_call() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, inductor_ext, inductor_ext.backend, inductor_ext.ops
a, s = torch.ones(1, 32).half(), torch.ones(1, 8).half()
torch.ops.w4a16.triton_w4a16_gemm(a, torch.ones(32, 1).int(), s, None, 32)
"""
    done = run(code)
    assert "RuntimeError: w4a16::triton_w4a16_gemm: the kernel needs triton, which cannot be imported" in done.stderr


def test_there_is_no_gradient_and_it_says_so() -> None:
    given = arguments() | {"a": torch.zeros(3, 128, dtype=torch.float16, device="meta", requires_grad=True)}
    meta = {name: t.to("meta") if name != "a" and isinstance(t, Tensor) else t for name, t in given.items()}
    with pytest.raises(NotImplementedError, match="has no gradient, as in the field"):
        gemm(**meta).sum().backward()


# -- traced ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [0, 1, 3])
def test_the_fake_has_the_result_s_shape(M: int, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        y = gemm(**arguments(M, dtype=dtype))
        assert (y.shape, y.dtype, y.is_contiguous()) == ((M, 16), dtype, True)
        assert gemm(**(arguments(M, dtype=dtype) | {"qzeros": None, "zp_bias": 7})).shape == (M, 16)


def test_the_rows_stay_symbolic() -> None:
    given = arguments()
    graph = make_fx(lambda a, *others: gemm(a, *others, 64), tracing_mode="symbolic")(*list(given.values())[:4])
    (call,) = [node for node in graph.graph.nodes if node.target == gemm.default]
    rows, columns = call.meta["val"].shape
    assert isinstance(rows, torch.SymInt)
    assert columns == 16


def test_one_graph_for_all_numbers_of_rows() -> None:
    """The weights are static, the rows marked dynamic."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    given = arguments()
    weights = [given[name].to("meta") for name in ("b_q", "scales", "qzeros")]
    compiled = torch.compile(lambda a: gemm(a + 0, *weights, 64), fullgraph=True, backend="aot_eager")
    for M in (17, 2, 3, 64, 513):
        a = torch.zeros(M, 128, dtype=torch.float16, device="meta")
        torch._dynamo.mark_dynamic(a, 0)
        assert compiled(a).shape == (M, 16)
    assert recompiles() == 1
    torch.compiler.reset()


def test_rows_known_only_when_they_are_counted() -> None:
    """An unbacked M: nothing in the fake may ask how many they are."""
    torch.compiler.reset()
    weights = [t for t in arguments().values() if isinstance(t, Tensor)][1:]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = torch.export.export(Chosen(weights), (torch.zeros(5, 128).half(), torch.ones(5).bool()), strict=False)
    (call,) = [node for node in graph.graph.nodes if node.target == gemm.default]
    assert str(call.meta["val"].shape[0]).startswith("u")


class Chosen(torch.nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for name, t in zip(("b_q", "scales", "qzeros"), weights, strict=True):
            self.register_buffer(name, t)

    def forward(self, a: Tensor, which: Tensor) -> Tensor:
        return gemm(a[which], self.b_q, self.scales, self.qzeros, 64)


@pytest.mark.parametrize("G", [32, 64, 128, 256])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx1100", "gfx1200", "one not known"])
def test_a_block_never_spans_two_groups(arch: str, G: int) -> None:
    from inductor_ext.kernels.gpu.field_gemm import tile

    assert all(G % tile(arch, M, 512, G).BK == 0 for M in (1, 33, 65))


# -- computed ----------------------------------------------------------------------------------------------------------


def test_the_numbers_hold_in_triton_s_interpreter() -> None:
    interpreter.passes("test_triton_gemm_numbers.py")


on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and this machine has none"
)


@on_a_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 16, 64, 1000])
def test_a_layer_of_real_size(M: int, dtype: torch.dtype) -> None:
    check(M, 4096, 4096, 128, True, dtype)


@on_a_gpu
def test_an_activation_of_more_than_2_to_the_31_elements() -> None:
    """Offsets beyond 32 bits: the last rows are right."""
    rows = 2**31 // 4096 + 40
    args, wanted = problem(40, 16, 4096, 128, True, torch.float16)
    a = torch.zeros(rows, 4096, dtype=torch.float16, device="cuda")
    a[-40:] = args["a"]
    assert rel_l2(gemm(**args | {"a": a})[-40:].cpu(), wanted) <= OWED[torch.float16]


@on_a_gpu
def test_another_number_of_rows_compiles_nothing() -> None:
    import triton

    args, _ = problem(128, 128, 128, 64, True, torch.float16)
    for M in (1, 33, 65):  # one of each tile
        gemm(**args | {"a": args["a"][:M]})
    compiled: list[Any] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **what: compiled.append(what)
    try:
        for M in (2, 16, 17, 32, 48, 64, 80, 128):
            gemm(**args | {"a": args["a"][:M]})
        assert compiled == []
        gemm(**args | {"qzeros": None})  # another kernel, so that the hook is known to work
        assert len(compiled) == 1
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook


@on_a_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_in_a_compiled_function(mode: str) -> None:
    torch.compiler.reset()
    args, wanted = problem(48, 136, 256, 64, True, torch.float16)
    weights = [args[name] for name in ("b_q", "scales", "qzeros")]
    compiled = torch.compile(lambda a: gemm(a.t().contiguous() * 1, *weights, 64) + 0, mode=mode, fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(args["a"].t().contiguous()).clone()
        assert rel_l2(y.cpu(), wanted) <= OWED[torch.float16]
    torch.compiler.reset()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one() -> None:
    args, wanted = problem(3, 40, 64, 32, True, torch.float16)
    there = {name: t.to("cuda:1") if isinstance(t, Tensor) else t for name, t in args.items()}
    assert rel_l2(gemm(**there).cpu(), wanted) <= OWED[torch.float16]
