"""Blocks of real models with their experts in int4: transformers' own classes, and gpt-fast's and torchtitan's way."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_moe.base import Format, Weight
from zoo_moe.formats import COMPRESSED_TENSORS

# -- experts in int4 ---------------------------------------------------------------------------------------------------


def quantised(dense: Tensor, group: int, dtype: torch.dtype, symmetric: bool) -> Weight:
    """[E, N, K], rounded to int4 in groups along K."""
    grouped = dense.detach().float().unflatten(-1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = (torch.maximum(high, -low) / 7 if symmetric else (high - low) / 15).clamp(min=1e-4).to(dtype)
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales.float()).round().clamp(1, 15)
    codes = (grouped / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15)
    return Weight(codes.flatten(-2).long(), zeros.long(), scales, None, group)


def quantize_experts_(
    block: nn.Module,
    group_size: int = 32,
    fmt: Format = COMPRESSED_TENSORS,
    names: Sequence[str] = ("gate_up_proj", "down_proj"),
) -> dict[str, Tensor]:
    """Replaces the 3-D parameters of these names, wherever they are in ``block``, by packed buffers and a property that
    dequantises them. Gives the exact float64 weights, by parameter name."""
    exact = {}
    for path, module in list(block.named_modules()):
        if all(isinstance(getattr(module, name, None), nn.Parameter) for name in names):
            # llama4's are [E, K, N]; so are those of the classes that say so.
            kn = getattr(module, "is_transposed", hasattr(module, "expert_dim"))
            properties = {}
            for name in names:
                parameter = module._parameters.pop(name)
                dense = parameter.transpose(-2, -1) if kn else parameter
                weight = quantised(dense, group_size, parameter.dtype, fmt.exact is Weight.exact)
                value = fmt.exact(weight)
                exact[f"{path}.{name}".strip(".")] = value.transpose(-2, -1) if kn else value
                stored = fmt.store(weight)
                for field, tensor in stored.items():
                    module.register_buffer(f"{name}_{field}", tensor.contiguous())
                properties[name] = _dequantised(name, tuple(stored), dense.shape[-2], group_size, fmt, kn)
            module.__class__ = type(f"Packed{type(module).__name__}", (type(module),), properties)
    return exact


def _dequantised(name: str, fields: Sequence[str], N: int, group: int, fmt: Format, kn: bool) -> property:
    def get(module: Any) -> Tensor:
        value = fmt.read({field: getattr(module, f"{name}_{field}") for field in fields}, N, group)
        return value if kn == fmt.kn else value.transpose(-2, -1)

    return property(get)


# -- gpt-fast's and torchtitan's ---------------------------------------------------------------------------------------


class Router(nn.Module):
    """weights and ids [T, k] of tokens [T, H]; the weights sum to 1."""

    def __init__(self, E: int, k: int, H: int, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.k, self.score = k, score
        self.weight = nn.Parameter(torch.empty(E, H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(self.score(F.linear(x, self.weight)), self.k, dim=-1)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20), ids


class GptFast(nn.Module):
    """Mixtral in gpt-fast: the chosen experts' weights, and einsum."""

    def __init__(self, E: int = 8, k: int = 2, H: int = 64, I: int = 32) -> None:  # noqa: E741
        super().__init__()
        self.gate = Router(E, k, H, lambda logits: F.softmax(logits, dim=-1))
        self.w1, self.w3 = (nn.Parameter(torch.empty(E, I, H)) for _ in range(2))
        self.w2 = nn.Parameter(torch.empty(E, H, I))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, ids = self.gate(flat)
        w1, w3, w2 = self.w1[ids], self.w3[ids], self.w2[ids]
        h = F.silu(torch.einsum("ti,taoi -> tao", flat, w1)) * torch.einsum("ti,taoi -> tao", flat, w3)
        y = torch.einsum("tao,taio -> tai", h, w2)
        return torch.einsum("tai,ta -> ti", y, weights).view(x.shape)


class Torchtitan(nn.Module):
    """torchtitan: scores on the sorted inputs, grouped matmuls, results added to the shared expert's."""

    def __init__(self, E: int = 8, k: int = 2, H: int = 64, I: int = 32) -> None:  # noqa: E741
        super().__init__()
        self.E, self.k = E, k
        self.gate = Router(E, k, H, lambda logits: torch.sigmoid(logits.float()))
        self.shared_up, self.shared_down = nn.Linear(H, I, bias=False), nn.Linear(I, H, bias=False)
        self.w1, self.w3 = (nn.Parameter(torch.empty(E, I, H)) for _ in range(2))
        self.w2 = nn.Parameter(torch.empty(E, H, I))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        scores, ids = self.gate(flat)
        counts = torch.histc(ids.view(-1).float(), bins=self.E, min=0, max=self.E)
        order = torch.argsort(ids.view(-1), stable=True)
        tokens = order // self.k
        rows = (flat[tokens].float() * scores.view(-1)[order].reshape(-1, 1)).to(x.dtype)
        out = self.shared_down(F.silu(self.shared_up(flat)))
        rows = self.experts(rows, counts)
        return out.scatter_add(0, tokens.reshape(-1, 1).expand(-1, rows.shape[-1]), rows).reshape(x.shape)

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        if rows.dtype != torch.bfloat16:  # the reference
            runs = enumerate(rows.split(counts.int().tolist()))
            return torch.cat([(F.silu(r @ self.w1[e].T) * (r @ self.w3[e].T)) @ self.w2[e].T for e, r in runs])
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        h = F.silu(torch._grouped_mm(rows, self.w1.transpose(-2, -1), offs=ends))
        h = h * torch._grouped_mm(rows, self.w3.transpose(-2, -1), offs=ends)
        return torch._grouped_mm(h, self.w2.transpose(-2, -1), offs=ends)


# -- transformers' -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """A block by the names of its module and classes, with a tiny config; or a class of ours."""

    name: str
    block: Callable[[], nn.Module]
    names: tuple[str, ...] = ("gate_up_proj", "down_proj")
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    implementations: tuple[str, ...] = ("grouped_mm", "batched_mm")


SIZES = {"hidden_size": 64, "num_experts_per_tok": 2}
GROUPS = {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5}


def of_transformers(name: str, config: str, block: str, **fields: Any) -> Family:
    def make() -> nn.Module:
        import importlib

        package = f"transformers.models.{name}"
        made = getattr(importlib.import_module(f"{package}.configuration_{name}"), config)(**{**SIZES, **fields})
        return getattr(importlib.import_module(f"{package}.modeling_{name}"), block)(made)

    return Family(name, make, implementations=("batched_mm",) if name == "llama4" else ("grouped_mm", "batched_mm"))


FAMILIES = {
    family.name: family
    for family in (
        of_transformers("mixtral", "MixtralConfig", "MixtralSparseMoeBlock", intermediate_size=32, num_local_experts=8),
        of_transformers(
            "qwen2_moe",
            "Qwen2MoeConfig",
            "Qwen2MoeSparseMoeBlock",
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            num_experts=8,
        ),
        of_transformers(
            "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", moe_intermediate_size=32, num_experts=8
        ),
        of_transformers(
            "qwen3_5_moe",
            "Qwen3_5MoeTextConfig",
            "Qwen3_5MoeSparseMoeBlock",
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            num_experts=8,
        ),
        of_transformers("olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock", intermediate_size=32, num_experts=8),
        of_transformers(
            "deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE", moe_intermediate_size=32, n_routed_experts=8, **GROUPS
        ),
        of_transformers(
            "glm4_moe", "Glm4MoeConfig", "Glm4MoeMoE", moe_intermediate_size=32, n_routed_experts=8, **GROUPS
        ),
        of_transformers(
            "llama4",
            "Llama4TextConfig",
            "Llama4TextMoe",
            intermediate_size=32,
            num_local_experts=8,
            num_experts_per_tok=1,
        ),
        of_transformers(
            "minimax_m2", "MiniMaxM2Config", "MiniMaxM2SparseMoeBlock", intermediate_size=32, num_local_experts=8
        ),
        Family("gpt_fast", GptFast, ("w1", "w2", "w3"), implementations=("",)),
        Family("torchtitan", Torchtitan, ("w1", "w2", "w3"), (torch.bfloat16,), implementations=("",)),
    )
}


def made(
    family: Family, implementation: str, dtype: torch.dtype, fmt: Format = COMPRESSED_TENSORS
) -> tuple[nn.Module, nn.Module]:
    """The block in ``dtype`` with packed experts, and the same in float32 with their exact values."""
    torch.manual_seed(0)
    block = family.block().eval().requires_grad_(False)
    for name, parameter in block.named_parameters():
        # What is around the experts is rounded too, at every step: small logits and shared experts keep that small.
        factor = 0.7 if name in ("gate.weight", "router.weight") else 0.3 if "shared" in name else 1.5
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * factor)
    block.to(dtype)
    reference = copy.deepcopy(block).float()
    exact = quantize_experts_(block, 32, fmt, family.names)
    for name, value in exact.items():
        reference.get_parameter(name).copy_(value)
    for module, choice in ((block, implementation), (reference, "eager")):
        for each in module.modules():
            if hasattr(each, "config"):
                each.config = copy.copy(each.config)
                each.config._experts_implementation = choice
    return block, reference


def output(block: nn.Module, x: Tensor) -> Tensor:
    """Of a block that may also give its router's logits."""
    y = block(x)
    return y[0].view(x.shape) if isinstance(y, tuple) else y


class InDtype(nn.Module):
    """A router that computes in its own dtype, in a block of float32."""

    def __init__(self, router: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.router, self.dtype = router, dtype

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.float() if t.is_floating_point() else t for t in self.router(x.to(self.dtype), *more))


def settled(block: nn.Module, reference: nn.Module, dtype: torch.dtype, n: int) -> Tensor:
    """[n, H] tokens, exact in ``dtype``, for which the block's router says what the reference's does.

    It computes in ``dtype``, and what it rounds is no business of the experts. Tokens are left out whose choice of
    experts turns when the router is a little off, and those whose weights are rounded to something too different.
    """
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(8 * n, 64, generator=g).to(dtype).float()
    name = "gate" if hasattr(reference, "gate") else "router"
    router: Any = getattr(reference, name)
    exact = output(reference, tokens.unsqueeze(0))[0]

    def moves(less_than: float) -> Tensor:
        return (output(reference, tokens.unsqueeze(0))[0] - exact).norm(dim=-1) < less_than * exact.norm(dim=-1)

    setattr(reference, name, InDtype(getattr(block, name), dtype))
    fit = moves(torch.finfo(dtype).eps / 5)
    setattr(reference, name, router)
    weight = router.weight.clone()
    for _ in range(4):
        router.weight.copy_(weight * (1 + 0.02 * torch.randn(weight.shape, generator=g)))
        fit &= moves(0.1)
    router.weight.copy_(weight)
    assert int(fit.sum()) >= n
    return tokens[fit][:n].to(dtype)
