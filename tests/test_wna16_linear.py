"""The field's oracle for dense layers: what it selects, and a checkpoint's weight in the layouts of its kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, same, values, weight

from inductor_ext import devices, oracle
from inductor_ext.kernels import table
from inductor_ext.layouts import gptq
from inductor_ext.oracle import linear
from inductor_ext.oracle.checkpoint import Checkpoint
from inductor_ext.oracle.linear import LinearConfig, WNA16LinearBackend, select_wna16_linear_backend
from inductor_ext.oracle.wna16 import WeightKey

CONFIG, KEY = LinearConfig((4096, 2048), torch.bfloat16), WeightKey(4, 128)
few = settings(max_examples=3, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("device", "backend"),
    [("gfx1151", "RDNA3"), ("mi300x", "TRITON"), ("h100", "TRITON"), ("cpu", "CPU"), ("xpu", "EMULATION"),
     ("t4", "EMULATION")],
)  # fmt: skip
def test_what_is_selected(device: str, backend: str) -> None:
    found, kernel = select_wna16_linear_backend(CONFIG, KEY, device, elsewhere=True)
    assert found == WNA16LinearBackend(backend)
    assert kernel in linear.backend_to_kernel_cls(found)
    assert found in linear.get_priority_backends(device)


@pytest.mark.parametrize(
    ("device", "backend", "changes", "key", "reason"),
    [
        ("h100", "rdna3", {}, {}, "runs on AMD GPUs"),
        ("mi300x", "marlin", {}, {}, "runs on NVIDIA GPUs"),
        ("h100", "marlin", {"partition_weight_shape": (4096, 2000)}, {}, "N must be a multiple of 64"),
        ("h100", "marlin", {}, {"group_size": 16}, "group size must be 32, 64, 128 or K=4096"),
        ("gfx1100", "rdna3", {"act_type": torch.float32}, {}, "activations must be float16 or bfloat16"),
        ("gfx1030", "triton", {}, {}, "need matrix instructions"),
        ("h100", "marlin", {}, {"bits": 8}, "takes codes of 4 bits, the weights have 8"),
    ],
)
def test_why_a_backend_cannot(
    device: str, backend: str, changes: dict[str, Any], key: dict[str, Any], reason: str
) -> None:
    config = replace(CONFIG, linear_backend=backend, **changes)
    with pytest.raises(oracle.Required) as error:
        select_wna16_linear_backend(config, replace(KEY, **key), device, elsewhere=True)
    assert reason in str(error.value)


def test_names() -> None:
    with pytest.raises(ValueError, match=r"no WNA16 linear backend 'exllama'; linear_backend may be auto, rdna3, "):
        select_wna16_linear_backend(replace(CONFIG, linear_backend="exllama"), KEY, "h100", elsewhere=True)
    assert {row.backend for row in table.rows("linear").values()} == {b.value for b in WNA16LinearBackend}
    problem = linear.linear_problem(CONFIG, WeightKey(8, -1, False, True), devices.named("cpu"))
    assert (problem.N, problem.K, problem.group_size, problem.zeros) == (2048, 4096, 4096, "int")
    assert problem.order and problem.bits == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", WNA16LinearBackend)
def test_a_checkpoint_there_and_back(backend: WNA16LinearBackend, kind: str) -> None:
    @few
    @given(G=st.sampled_from([32, 64, 128]), seed=st.integers(0, 1 << 30))
    def check(G: int, seed: int) -> None:
        w = weight(kind, 1, 128, 256, G, seed)
        how = Checkpoint("gptq", 4, gptq.LESS_ONE, kind == "act-order")
        s = gptq.pack(w)
        one = [None if t is None else t[0] for t in s]
        qweight, scales, qzeros, g_idx, bias = one
        call = lambda: linear.convert_to_wna16_linear_kernel_format(  # noqa: E731
            backend, how, None, qweight, scales, g_idx, qzeros, bias
        )
        if kind == "act-order" and backend.value in ("RDNA3", "TRITON"):
            with pytest.raises(ValueError, match=r"^order must be None"):
                call()
            return
        canonical = how.experts(*(None if t is None else t[None] for t in (qweight, scales, g_idx, qzeros, bias)))
        same(linear.recovered(backend, call(), canonical), canonical)
        assert torch.equal(values(canonical), values(w))

    check()


def test_the_field_s_gemms_take_what_comes_out() -> None:
    """triton_w4a16_gemm's words along N, and gptq_gemm_rdna3's shuffled along K, position by position."""
    w = weight("asymmetric", 1, 64, 128, 32, 3)
    codes = w.expert(0).stored_codes().int()
    t = linear.converted(WNA16LinearBackend.TRITON, w)
    assert t.qweight.shape == (128, 8) and t.scales.shape == (4, 64) and t.qzeros.shape == (4, 8)
    r = linear.converted(WNA16LinearBackend.RDNA3, w)
    assert r.qweight.shape == (16, 64) and r.qzeros.shape == (4, 8)
    for n in range(64):
        assert torch.equal((t.qweight[:, n // 8] >> (4 * (n % 8))) & 15, codes[n])
        assert torch.equal((t.qzeros[:, n // 8] >> (4 * (n % 8))) & 15, w.zeros[0, n].int())
        assert torch.equal(((r.qzeros[:, n // 8] >> (4 * (n % 8))) & 15) + 1, w.zeros[0, n].int())
    for k in range(128):
        assert torch.equal((r.qweight[k // 8] >> (0, 16, 4, 20, 8, 24, 12, 28)[k % 8]) & 15, codes[:, k])
    assert torch.equal(t.scales, w.scales[0].t())
