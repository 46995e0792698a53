"""On a CUDA or ROCm device: recognised and proved there, and computed by the Triton kernel or, where that cannot, by
the reference kernel; under CUDA graphs too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from models import Calls, pack, rel_l2
from torch import Tensor, nn
from zoo import POSITIVES, Idiom
from zoo.base import call, given

import inductor_ext

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and this machine has none"
)


class Bytes(nn.Module):
    """Codes along K in bytes: the canonical form but for its dtype."""

    def __init__(self, N: int, K: int, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.N, self.K = N, K
        self.register_buffer("packed", torch.randint(256, (N, K // 2), generator=random, dtype=torch.uint8))
        self.register_buffer("scales", torch.randn(N, K // 32, generator=random) / 32)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.stack((self.packed & 15, self.packed >> 4), -1).view(self.N, -1, 32).to(x.dtype) - 8
        return F.linear(x, (q * self.scales.to(x.dtype).unsqueeze(-1)).view(self.N, self.K))


class AlongN(nn.Module):
    """Words [K/8, N] as GPTQ stores them, which are converted."""

    def __init__(self, N: int, K: int, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.N, self.K = N, K
        self.register_buffer("qweight", pack(torch.randint(16, (K, N), generator=random), 0))
        self.register_buffer("scales", torch.randn(K // 32, N, generator=random) / 32)
        self.register_buffer("shifts", torch.arange(0, 32, 4, dtype=torch.int32).view(1, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        q = ((self.qweight.unsqueeze(1) >> self.shifts) & 15).view(self.K // 32, 32, self.N).to(x.dtype) - 8
        return x @ (q * self.scales.to(x.dtype).unsqueeze(1)).view(self.K, self.N)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).cuda()


@pytest.mark.parametrize("idiom", [idiom for idiom in POSITIVES if idiom.core], ids=lambda idiom: idiom.name)
def test_spellings_are_rewritten_on_the_device(idiom: Idiom) -> None:
    module, _, x = given(idiom, torch.float16)
    try:
        wanted = call(module.cuda(), x.cuda())
    except RuntimeError as error:
        pytest.skip(f"the module itself does not run on the device: {error}")
    report = inductor_ext.explain(module, x.cuda(), *(a.cuda() for a in getattr(module, "arguments", ())))
    assert len(report.rewritten) == idiom.rewritten
    for r in report.rewritten:
        why_not = r.passed_over.get("triton")
        assert r.kernel == ("triton" if why_not is None else "reference")
        assert why_not is None or "group size" in why_not
    y = call(torch.compile(module, backend="w4a16"), x.cuda())
    assert rel_l2(y, wanted) < 2e-3


KERNELS = {torch.float32: ("reference", 1e-5), torch.float16: ("triton", 2e-3)}
"""Dtype of the activations -> the kernel that computes with them, and how near to one that rounds elsewhere."""


@pytest.mark.parametrize("dtype", KERNELS, ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_the_device_agrees_with_the_cpu(mode: str, dtype: torch.dtype, calls: Calls) -> None:
    kernel, near = KERNELS[dtype]
    layers = Bytes(64, 64, seed=1), AlongN(64, 64, seed=2)
    x = torch.randn(5, 64).to(dtype)
    wanted = nn.Sequential(*layers)(x)
    model = torch.compile(chain(*layers), backend="w4a16", mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert rel_l2(model(x.cuda()).clone().cpu(), wanted) < near
    assert set(calls.ran) == {kernel}


@pytest.mark.parametrize("dtype", KERNELS, ids=str)
def test_cuda_graphs_see_a_weight_change_in_place(dtype: torch.dtype) -> None:
    near = KERNELS[dtype][1]
    layer, other = AlongN(64, 64, seed=1).cuda(), AlongN(64, 64, seed=2).cuda()
    x = torch.randn(3, 64, device="cuda", dtype=dtype)
    run = torch.compile(layer, backend="w4a16", mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert rel_l2(run(x).clone(), layer(x)) < near
    layer.load_state_dict(other.state_dict())
    torch.compiler.cudagraph_mark_step_begin()
    assert rel_l2(run(x).clone(), other(x)) < near


def test_the_cpu_kernel_is_refused_on_the_device() -> None:
    layer = Bytes(64, 64, seed=1).cuda()
    with pytest.raises(Exception, match="cpu"):
        torch.compile(layer, backend="w4a16", options={"w4a16.kernel": "cpu"})(torch.randn(3, 64, device="cuda"))
