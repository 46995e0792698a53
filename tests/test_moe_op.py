"""`torch.ops.w4a16.moe` by itself: right, deterministic and well-behaved under PyTorch's own checks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import recompiles, rel_l2
from moe_problems import DTYPES, KERNELS, MAP, MLPS, OWED, ZEROS, Experts, exact, on_a_gpu
from torch import Tensor

import inductor_ext.ops
from inductor_ext import kernels


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


# -- right -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_op_is_as_exact_as_its_dtype_allows(kernel: str, dtype: torch.dtype, mlp: str) -> None:
    for (zeros, bias), (G, T) in itertools.product(
        (("none", False), ("int", True), ("float", False)), (((32, 16), 1), ((8, 32), 9), ((64, 8), 70))
    ):
        experts = Experts(dtype=dtype, zeros=zeros, bias=bias, G=G, mlp=MLPS[mlp], kernel=kernel)
        exact(experts, *experts.routed(T))


@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_that_are_no_power_of_two(kernel: str) -> None:
    for E, H, I, G in ((1, 8, 8, (8, 8)), (3, 40, 24, (8, 24)), (5, 192, 72, (96, 24)), (2, 64, 200, (16, 40))):  # noqa: E741
        experts = Experts(E, H, I, G, torch.bfloat16, zeros="int", bias=True, kernel=kernel)
        exact(experts, *experts.routed(6, min(E, 2)))


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_weights_and_biases_may_have_a_dtype_of_their_own(
    kernel: str, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    experts = Experts(dtype=dtype, scale_dtype=scale_dtype, zeros="float", bias=True, kernel=kernel)
    experts.tensors["w13_bias"] = experts.tensors["w13_bias"].float()
    x, weights, ids = experts.routed(5)
    exact(experts, x, weights.to(scale_dtype), ids.int())


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tokens_and_any_number_of_choices(kernel: str) -> None:
    experts = Experts(kernel=kernel)
    assert experts(*experts.routed(0)).shape == (0, 64)
    for k in (1, 3, 4):
        exact(experts, *experts.routed(5, k))
    x, weights, _ = experts.routed(5)
    exact(experts, x, weights.repeat(1, 5), torch.randint(4, (5, 10)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_need_not_be_contiguous(kernel: str) -> None:
    experts = Experts(kernel=kernel)
    x, weights, ids = experts.routed(6)
    spread = x.t().contiguous().t(), weights.t().contiguous().t(), ids.t().contiguous().t()
    assert torch.equal(experts(*spread), experts(x, weights, ids))
    assert torch.equal(experts(x[::2], weights[::2], ids[::2]), experts(*(t[::2].clone() for t in (x, weights, ids))))


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_written_to(kernel: str) -> None:
    experts = Experts(zeros="int", bias=True, expert_map=torch.tensor([2, -1, 0, 1, 3]).int(), kernel=kernel)
    tensors = [t for t in (*experts.routed(7), *experts.in_order()) if t is not None]
    before = [t.clone() for t in tensors]
    experts(*tensors[:3])
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@pytest.mark.parametrize("mlp", ["silu", "weight on the input"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_bad_spoils_its_own_tokens_only(kernel: str, bad: float, mlp: str) -> None:
    experts = Experts(mlp=MLPS[mlp], kernel=kernel)
    x, weights, ids = experts.routed(40)
    good = experts(x, weights, ids)
    x[3, 7] = bad
    weights[5, 1] = bad
    experts.tensors["w2_scales"][2, 9, 1] = bad
    y = experts(x, weights, ids)
    hit = (ids == 2).any(1)
    hit[[3, 5]] = True
    finite = torch.isfinite(y)
    assert finite[~hit].all() and not finite[hit].all(1).any()
    assert rel_l2(y[~hit], good[~hit]) <= 1e-6


# -- routing -----------------------------------------------------------------------------------------------------------


def zipf(T: int, k: int, E: int) -> Tensor:
    chances = 1 / torch.arange(1, E + 1).double()
    return torch.multinomial(chances.expand(T, E), k, generator=torch.Generator().manual_seed(1))


ROUTINGS = {
    "all tokens to one expert": torch.full((33, 1), 5),
    "one token an expert": torch.arange(8)[:, None],
    "most experts empty": torch.tensor([[1, 6]]).expand(20, 2),
    "an expert repeated in a row": torch.tensor([[3, 3, 3], [0, 7, 0], [1, 1, 2]]),
    "a few experts have nearly all": zipf(65, 4, 8),
    "one token": torch.tensor([[7, 0, 4]]),
    "some chosen by nobody": torch.tensor([[-1, 2], [4, -1], [-1, -1], [0, 1]]),
    "nothing chosen": torch.full((3, 2), -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_routing_extremes(kernel: str, routing: str, dtype: torch.dtype) -> None:
    ids = ROUTINGS[routing]
    experts = Experts(E=8, dtype=dtype, bias=True, kernel=kernel)
    x, weights, _ = experts.routed(*ids.shape)
    exact(experts, x, weights, ids)


@pytest.mark.parametrize("mlp", ["silu", "weight on the input", "swigluoai interleaved"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_chosen_contributes_nothing_whatever_its_weight(kernel: str, bad: float, mlp: str) -> None:
    """-1, and experts that are elsewhere; a token of nothing else is exactly zero."""
    experts = Experts(mlp=MLPS[mlp], bias=True, expert_map=torch.tensor([3, -1, 0, 1, -1, 2]).int(), kernel=kernel)
    ids = torch.tensor([[-1, 2, 1], [4, 1, -1], [0, 3, 5], [1, -1, 0]])
    x, weights, _ = experts.routed(4, 3)
    weights[(ids == -1) | (ids == 1) | (ids == 4)] = bad
    exact(experts, x, weights, ids)
    assert experts(x, weights, ids)[1].count_nonzero() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_of_all_ranks_add_up_to_the_whole(kernel: str) -> None:
    """Expert parallelism: every rank has some of the experts and sees all ids."""
    whole = Experts(E=6, kernel=kernel)
    x, weights, ids = whole.routed(30, 3)
    total = torch.zeros(30, 64)
    for mine in ([0, 5], [4, 1, 2], [3]):
        rank = Experts(E=len(mine), expert_map=torch.full((6,), -1).int(), kernel=kernel)
        rank.expert_map[mine] = torch.arange(len(mine)).int()
        packed = {name: None if t is None else t[mine] for name, t in whole.tensors.items()}
        rank.tensors = {**packed, "expert_map": rank.expert_map}
        total += rank(x, weights, ids)
    assert rel_l2(total, whole(x, weights, ids)) <= 1e-6


# -- on a GPU, where the reference is all there is ---------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_as_on_the_cpu(dtype: torch.dtype, mlp: str) -> None:
    """But for ids that there are not: those contribute nothing."""
    experts = Experts(dtype=dtype, zeros="int", bias=True, mlp=MLPS[mlp], expert_map=MAP)
    for T in (0, 1, 9, 70):
        x, weights, ids = experts.routed(T)
        wanted = experts.expected(x, weights, ids.where(ids != 4, -1))
        weights[ids == 4], ids[ids == 4] = float("nan"), 2**40
        there = experts.on_the_gpu()
        y = there(x.cuda(), weights.cuda(), ids.cuda())
        assert torch.equal(y, there(x.cuda(), weights.cuda(), ids.cuda()))
        assert T == 0 or rel_l2(y.cpu(), wanted) <= OWED[dtype]


@on_a_gpu
@pytest.mark.parametrize("T", [1, 33])
def test_in_a_cuda_graph(T: int) -> None:
    """Nothing waits for the host: the same graph is right for other ids."""
    experts = Experts(bias=True)
    routed = [experts.routed(T) for _ in range(3)]
    wanted = [experts.expected(*r) for r in routed]
    there, held = experts.on_the_gpu(), [t.cuda() for t in routed[0]]
    there(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = there(*held)
    for given, other in zip(routed, wanted, strict=True):
        for mine, new in zip(held, given, strict=True):
            mine.copy_(new)
        graph.replay()
        assert rel_l2(y.cpu(), other) <= 1e-5


# -- PyTorch's own checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel: str, mlp: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch, with dynamic shapes, for every kind of argument."""
    for dtype, zeros, bias, mapped in zip(DTYPES, ZEROS, (True, False, True), (None, MAP, MAP), strict=True):
        experts = Experts(dtype=dtype, zeros=zeros, bias=bias, mlp=MLPS[mlp], expert_map=mapped, kernel=kernel)
        x, weights, ids = experts.routed(5)
        rest, settings = (ids, *experts.in_order()), experts.settings()
        torch.library.opcheck(torch.ops.w4a16.moe.default, (x, weights, *rest), settings)
        torch.library.opcheck(torch.ops.w4a16.moe_grad.default, (x.neg(), x, weights, *rest), settings)
        leaves = x.requires_grad_(), weights.requires_grad_()
        torch.library.opcheck(torch.ops.w4a16.moe.default, (*leaves, *rest), settings)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packing_loses_nothing(kernel: str) -> None:
    experts = Experts(zeros="int", kernel=kernel)
    module = kernels.load_moe(kernel)
    weight = experts._weight(4 * 48, 64, 16)[0]
    back = module.unpack(module.pack(weight, 4), 48, 64, 16)
    assert all(torch.equal(getattr(back, name), getattr(weight, name)) for name in ("codes", "scales", "zeros"))
    assert back.order is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_graph_for_all_token_counts(kernel: str) -> None:
    """One token may be a graph of its own: PyTorch makes it one."""
    experts = Experts(dtype=torch.bfloat16, bias=True, kernel=kernel)
    compiled = torch.compile(lambda x, w, ids: experts(x * 2, w, ids) + 1, fullgraph=True, dynamic=True)
    for T in (7, 2, 64, 513, 1):
        x, weights, ids = experts.routed(T)
        assert rel_l2(compiled(x, weights, ids), experts.expected(x * 2, weights, ids) + 1) <= 4e-3
        assert recompiles() <= (2 if T == 1 else 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_token_counts_that_are_unknown_when_compiled(kernel: str) -> None:
    """T from the data (nonzero): no guard on it, none or one among them."""
    experts = Experts(expert_map=MAP, kernel=kernel)

    @torch.compile(fullgraph=True)
    def chosen(x: Tensor, weights: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        return experts(x[keep], weights[keep], ids[keep])

    x, weights, ids = experts.routed(9)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for count in (4, 0, 1, 9):
            y = chosen(x, weights, ids, torch.arange(9) < count)
            assert y.shape == (count, 64)
            assert rel_l2(y, experts.expected(x, weights, ids)[:count]) <= OWED[x.dtype] or count == 0
    assert recompiles() == 1


class Layer(torch.nn.Module):
    """A layer that calls the op by hand."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts
        for name, tensor in experts.tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        fields = [f"{w}_{field}" for w in ("w13", "w2") for field in ("qweight", "scales", "zeros", "bias")]
        tensors = [getattr(self, name) for name in (*fields, "expert_map")]
        return torch.ops.w4a16.moe(x, weights, ids, *tensors, **self.experts.settings())


def test_export_with_any_number_of_tokens(tmp_path: Path) -> None:
    experts = Experts(zeros="int", bias=True, mlp=MLPS["swigluoai interleaved"], expert_map=MAP)
    T = torch.export.Dim("T")
    program = torch.export.export(Layer(experts), experts.routed(5), dynamic_shapes=[{0: T}] * 3)
    torch.export.save(program, tmp_path / "moe.pt2")
    run = torch.export.load(tmp_path / "moe.pt2").module()
    for count in (1, 2, 64):
        routed = experts.routed(count)
        assert torch.equal(run(*routed), experts(*routed))


def test_name_and_signature() -> None:
    """Others call the op by hand."""
    assert inductor_ext.ops.moe is torch.ops.w4a16.moe.default
    rest = (
        "Tensor topk_weights, Tensor topk_ids, Tensor w13_qweight, Tensor w13_scales, Tensor? w13_zeros, "
        "Tensor? w13_bias, Tensor w2_qweight, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_bias, "
        "Tensor? expert_map, int intermediate_size, int w13_group_size, int w2_group_size, "
        'str activation="silu", str gate_up="halves", float alpha=1.702, float? limit=None, '
        "bool apply_router_weight_on_input=False, float routed_scaling=1., int global_num_experts=-1, "
        'str kernel="reference"'
    )
    assert str(torch.ops.w4a16.moe.default._schema) == f"w4a16::moe(Tensor x, {rest}) -> Tensor"
    assert str(torch.ops.w4a16.moe_grad.default._schema) == (
        f"w4a16::moe_grad(Tensor grad, Tensor x, {rest}) -> (Tensor grad_x, Tensor grad_topk_weights)"
    )
