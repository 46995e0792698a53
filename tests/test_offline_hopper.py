"""The kernels for Hoppers as they are launched, compiled on a machine without one: they keep the matrix unit busy while
they unpack, spill nothing and fit into shared memory. What they compute is tested on a GPU (test_gpu_linear.py,
test_gpu_moe.py)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mxfp4_problems import GPT_OSS
from offline import TARGETS, Facts, Recorder, serialized
from test_offline_dense import K, N, packed

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import Mlp, Packed, Routing
from inductor_ext.kernels.gpu import experts, moe, mxfp4, routing, runtime, tuning
from inductor_ext.kernels.gpu.hopper import dense, launch, loop
from inductor_ext.kernels.gpu.hopper import moe as many
from inductor_ext.kernels.gpu.tuning import Hopper


@pytest.fixture
def on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(runtime, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(runtime, "processors", lambda device: 132)
    monkeypatch.setattr(runtime, "require", lambda x: None)
    return monkeypatch


def check(facts: Facts, groups: int = 2, stack: int = 0) -> None:
    assert facts.matrix and all("wgmma" in instruction for instruction in facts.matrix)
    assert facts.spills <= stack
    assert 0 < facts.shared <= TARGETS["sm_90"].shared
    # Each group waits for the unit once a step, with all of the step under way.
    assert facts.assembly.count("wgmma.wait_group") == groups
    assert not serialized(facts)


@pytest.mark.parametrize(
    ("BN", "BM", "splits", "dtype", "G", "zeros"),
    [
        (128, 64, 2, torch.bfloat16, 64, False),
        (256, 64, 1, torch.float16, 32, True),
        (128, 128, 1, torch.float16, 128, False),
        (256, 128, 2, torch.bfloat16, 128, True),
        (256, 128, 1, torch.float16, 256, False),
        (256, 128, 1, torch.bfloat16, 32, True),  # with fewer stages
        (256, 64, 2, torch.bfloat16, 32, "float"),
        (128, 128, 1, torch.float16, 128, "float"),
        (192, 64, 4, torch.float16, 128, False),
        (192, 128, 1, torch.bfloat16, 128, True),
        (192, 128, 1, torch.float16, 32, "float"),
    ],
)
def test_linears(
    on_a_hopper: pytest.MonkeyPatch,
    BN: int,
    BM: int,
    splits: int,
    dtype: torch.dtype,
    G: int,
    zeros: bool | str,
) -> None:
    kernel = Recorder(dense.linear_kernel)
    on_a_hopper.setattr(dense, "linear_kernel", kernel)
    x, out = (torch.empty(300, columns, dtype=dtype, device="meta") for columns in (K, N))
    launch.dense(Hopper(BN, BM, splits, 4), x, packed(G, zeros, dtype), None, G, out)
    facts = kernel.compile("sm_90")
    if BN == 192:
        # ptxas keeps a few sizes on the stack from where a program begins to where a group does.
        check(facts, groups=3, stack=24 if splits > 1 else 0)
    else:
        check(facts)


def experts_of(E: int, N: int, K: int, dtype: torch.dtype) -> Packed:
    def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(E * N, columns, dtype=dtype, device="meta")

    return experts.pack(PackedInt4(empty(K // 8, torch.int32), empty(K // 128, dtype)), E)


@pytest.mark.parametrize("tokens", [128, 256, 512, 4096])
@pytest.mark.parametrize("mlp", [Mlp(), Mlp("swigluoai", "interleaved", limit=7.0)], ids=["halves", "interleaved"])
def test_experts(on_a_hopper: pytest.MonkeyPatch, mlp: Mlp, tokens: int) -> None:
    E, k, H, I, dtype = 128, 8, 2048, 768, torch.bfloat16  # noqa: E741
    kernels = {name: Recorder(getattr(many, name)) for name in ("up_kernel", "down_kernel", "gather_kernel")}
    for name, kernel in kernels.items():
        on_a_hopper.setattr(many, name, kernel)
    for module, name in ((routing, "route_kernel"), (moe, "add_up_kernel")):
        on_a_hopper.setattr(module, name, Recorder(getattr(module, name)))
    x = torch.empty(tokens, H, dtype=dtype, device="meta")
    chosen = Routing(*(torch.empty(tokens, k, dtype=d, device="meta") for d in (torch.float32, torch.int64)), None, E)
    w13, w2 = experts_of(E, 2 * I, H, dtype), experts_of(E, H, I, dtype)
    experts.run(x, chosen, w13, w2, None, None, mlp, I, (128, 128))
    for name in ("up_kernel", "down_kernel"):
        check(kernels[name].compile("sm_90"))
    facts = kernels["gather_kernel"].compile("sm_90")
    assert facts.spills == 0 and facts.load_bytes("row = tl.load(x") == {16}


@pytest.mark.parametrize("fp8", [False, True], ids=["w4a16", "w4a8"])
def test_mxfp4_experts(on_a_hopper: pytest.MonkeyPatch, fp8: bool) -> None:
    kernels = {name: Recorder(getattr(many, name)) for name in ("up_kernel", "down_kernel", "gather_kernel")}
    for name, kernel in kernels.items():
        on_a_hopper.setattr(many, name, kernel)
    for module, name in ((routing, "route_kernel"), (moe, "add_up_kernel"), (moe, "quantise_kernel")):
        on_a_hopper.setattr(module, name, Recorder(getattr(module, name)))
    E, k, H = 32, 4, 2880

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def packed(N: int) -> Packed:
        codes = empty(E, N // 64, 23, 2048, dtype=torch.int16)
        return Packed(codes, empty(E, 23, N, 4, dtype=torch.uint8), None, None)

    chosen = Routing(empty(4096, k), empty(4096, k, dtype=torch.int64), None, E)
    biases = empty(E, 2 * H), empty(E, H)
    scales = (empty(1), empty(1)) if fp8 else None
    x = empty(4096, H, dtype=torch.bfloat16)
    mxfp4.run(x, chosen, packed(2 * H), packed(H), *biases, GPT_OSS, H, scales)
    for name in ("up_kernel", "down_kernel"):
        check(kernels[name].compile("sm_90"))


@pytest.mark.parametrize(
    ("H", "I", "dtype", "floats", "mlp", "taken"),
    [
        (2880, 2880, torch.bfloat16, False, GPT_OSS, True),
        (136, 72, torch.bfloat16, False, GPT_OSS, True),
        (136, 128, torch.bfloat16, False, Mlp(), True),
        (130, 72, torch.bfloat16, False, GPT_OSS, False),  # rows that are no multiples of 16 bytes
        (136, 66, torch.bfloat16, False, GPT_OSS, False),
        (136, 72, torch.bfloat16, False, Mlp(), False),  # gates and ups apart by no multiple of 64 rows
        (136, 72, torch.float16, False, GPT_OSS, False),
        (136, 72, torch.bfloat16, True, GPT_OSS, False),
    ],
    ids=str,
)
def test_which_mxfp4_experts_they_take(
    on_a_hopper: pytest.MonkeyPatch,
    H: int,
    I: int,  # noqa: E741
    dtype: torch.dtype,
    floats: bool,
    mlp: Mlp,
    taken: bool,
) -> None:
    scales = torch.empty(1, dtype=torch.float32 if floats else torch.uint8, device="meta")
    weight = Packed(torch.empty(1, dtype=torch.int16, device="meta"), scales, None, None)
    assert launch.can_fp4(torch.empty(9, H, dtype=dtype, device="meta"), weight, weight, mlp, I) is taken


@pytest.mark.parametrize("zeros", [None, torch.int16, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_zeros_are_integers_or_for_one_linear_of_the_activations_dtype(
    on_a_hopper: pytest.MonkeyPatch, zeros: torch.dtype | None
) -> None:
    x, codes = torch.empty(9, 64, dtype=torch.float16, device="meta"), torch.empty(1, dtype=torch.int16, device="meta")
    weight = Packed(codes, x, None if zeros is None else torch.empty(1, dtype=zeros, device="meta"), None)
    assert launch.can(weight, x) is (zeros in (None, torch.int16, torch.float16))
    assert launch.can_experts(x, weight, weight, Mlp(), 64) is (zeros in (None, torch.int16))


@pytest.mark.parametrize("G", [32, 64, 128, 256, 384, 640, 896, 1024])
def test_the_pairs_that_come_with_a_tile_are_those_of_its_groups(G: int) -> None:
    for tile in range(50):
        first = loop._pair.fn(tile, "int4", G)
        groups = {(256 * tile + column) // G for column in range(0, 256, 32)}
        assert {group // 2 for group in groups} == set(range(first, first + loop.pairs("int4", G)))


@pytest.mark.parametrize("rows", [1, 16, 33, 65, 129, 1000, 8191, 8192])
@pytest.mark.parametrize(("N", "K"), [(64, 32), (128, 256), (4096, 4096), (28672, 4096), (4096, 14336), (151936, 2048)])
def test_every_program_has_a_part_of_the_work(rows: int, N: int, K: int) -> None:
    for plain in (False, True):
        config = tuning.hopper(rows, N, K, 132, plain)
        if config is not None:
            across = -(-K // 256)
            assert (config.SPLITS - 1) * -(-across // config.SPLITS) < across


@pytest.mark.parametrize(
    ("rows", "N", "K", "tiles"),
    [
        (64, 18944, 3584, (192, 64)),  # 99 tiles for 132 processors; of 256 rows there would be 74, of 128 two rounds
        (512, 6144, 4096, (192, 128)),
        (256, 10240, 8192, (192, 128)),
        (64, 28672, 4096, (256, 64)),
        (256, 8192, 8192, (128, 128)),
    ],
)
def test_tiles_are_of_the_size_that_leaves_few_processors_idle(
    rows: int, N: int, K: int, tiles: tuple[int, int]
) -> None:
    config = tuning.hopper(rows, N, K, 132, True)
    assert config is not None
    assert dataclasses.astuple(config)[:3] == (*tiles, 1)


def test_splits_that_leave_a_program_without_work_are_refused(on_a_hopper: pytest.MonkeyPatch) -> None:
    x, out = (torch.empty(300, columns, dtype=torch.float16, device="meta") for columns in (K, N))
    with pytest.raises(ValueError, match="SPLITS must leave each program a tile of K; 12 do not of 16 tiles"):
        launch.dense(Hopper(128, 128, 12, 4), x, packed(128, False, torch.float16), None, 128, out)


@pytest.mark.parametrize("BN", [64, 160, 320])
def test_tiles_that_the_kernel_does_not_have_are_refused(on_a_hopper: pytest.MonkeyPatch, BN: int) -> None:
    x, out = (torch.empty(300, columns, dtype=torch.float16, device="meta") for columns in (K, N))
    with pytest.raises(ValueError, match=f"BN must be 128, 192 or 256, not {BN}"):
        launch.dense(Hopper(BN, 128, 1, 4), x, packed(128, False, torch.float16), None, 128, out)
