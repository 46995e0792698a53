"""The compiled CPU kernel for routed experts against dense float32, on every instruction set that this machine has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inductor_ext.formats import PackedInt4
from inductor_ext.kernels import ACTIVATIONS, GATE_UP, Mlp, Packed, Routing, cpu, cpu_moe

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUNDS = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.skipif(cpu.usable() is not None, reason=str(cpu.usable()))
ISAS = [] if cpu.usable() else torch.ops.w4a16_cpu.usable_isas().split(",")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.ops.w4a16_cpu.set_isa(request.param)
    yield request.param
    torch.ops.w4a16_cpu.set_isa(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- a problem and what is right ---------------------------------------------------------------------------------------


def weight(E: int, N: int, K: int, G: int, zeros: str, dtype: torch.dtype) -> tuple[Packed, Tensor]:
    """Random experts and their value [E, N, K] in float32, computed without the package."""
    codes = torch.randint(0, 16, (E, N, K))
    words = (codes.view(E, N, K // 8, 8).long() << torch.arange(0, 32, 4)).sum(-1).to(torch.uint32).view(torch.int32)
    scales = ((torch.rand(E, N, K // G) + 0.2) * 0.2 / K**0.5).to(dtype)
    z: Tensor | None = None
    if zeros == "int":
        z = torch.randint(0, 17, (E, N, K // G), dtype=torch.uint8)
    elif zeros != "none":
        z = (torch.rand(E, N, K // G) * 15).to(dtype if zeros == "float" else torch.float32)
    z32 = torch.full((E, N, K // G), 8.0) if z is None else z.float()
    value = (codes.float().view(E, N, K // G, G) - z32.unsqueeze(-1)) * scales.float().unsqueeze(-1)
    return Packed(words, scales, z, None), value.view(E, N, K)


@dataclasses.dataclass
class Layer:
    w13: Packed
    w2: Packed
    value13: Tensor
    value2: Tensor
    groups: tuple[int, int]
    mlp: Mlp
    bias13: Tensor | None = None
    bias2: Tensor | None = None

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        biases = (self.bias13, self.bias2)
        routing = Routing(weights, ids, None, self.value13.shape[0])
        return cpu_moe.run(x, routing, self.w13, self.w2, *biases, self.mlp, self.value2.shape[2], self.groups)

    def reference(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Every expert for every token, in float32."""
        mlp = self.mlp
        total = torch.zeros(x.shape[0], self.value2.shape[1])
        for t in range(x.shape[0]):
            for w, e in zip(weights[t], ids[t].tolist(), strict=True):
                if e < 0:
                    continue
                row = x[t].float() * (w if mlp.apply_router_weight_on_input else 1)
                h = self.value13[e] @ row + (0 if self.bias13 is None else self.bias13[e].float())
                y = self.value2[e] @ activate(h, mlp) + (0 if self.bias2 is None else self.bias2[e].float())
                total[t] += y if mlp.apply_router_weight_on_input else w * y
        return total * mlp.routed_scaling


def activate(h: Tensor, mlp: Mlp) -> Tensor:
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": F.relu,
    }
    if mlp.gate_up == "none":
        return plain[mlp.activation](h)
    gate, up = h.chunk(2) if mlp.gate_up == "halves" else (h[0::2], h[1::2])
    if mlp.activation != "swigluoai":
        return plain[mlp.activation](gate) * up
    if mlp.limit is not None:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
    return (up + 1) * gate * torch.sigmoid(mlp.alpha * gate)


def layer(
    E: int,
    H: int,
    I: int,  # noqa: E741
    groups: tuple[int, int],
    zeros: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    mlp: Mlp | None = None,
    bias: torch.dtype | None = None,
) -> Layer:
    mlp = mlp or Mlp()
    rows = I if mlp.gate_up == "none" else 2 * I
    w13, value13 = weight(E, rows, H, groups[0], zeros, dtype)
    w2, value2 = weight(E, H, I, groups[1], zeros, dtype)
    made = Layer(w13, w2, value13, value2, groups, mlp)
    if bias is not None:
        made.bias13, made.bias2 = torch.randn(E, rows).to(bias), torch.randn(E, H).to(bias)
    return made


def routed(T: int, E: int, k: int) -> tuple[Tensor, Tensor]:
    ids = torch.rand(T, E).topk(k).indices.int()
    return torch.rand(T, k), ids


def error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference.double()).norm() / reference.double().norm())


# -- right -------------------------------------------------------------------------------------------------------------

# Sizes that are multiples of 8 and of nothing larger, groups down to 8 and up to a whole row; tokens for few and for
# many rows an expert.
SHAPES = [
    # E, k, H, I, groups, T
    (5, 2, 128, 64, (32, 32), (1, 3, 40)),
    (4, 2, 72, 40, (8, 8), (2, 33)),
    (3, 1, 136, 56, (136, 56), (1, 60)),
    (6, 3, 256, 192, (128, 64), (1, 7, 64)),
    (4, 4, 264, 120, (24, 40), (5, 30)),
    (3, 2, 1152, 640, (128, 128), (1, 4, 29)),
]


@pytest.mark.parametrize("zeros", ["none", "int", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float32(isa: str, dtype: torch.dtype, zeros: str) -> None:
    torch.manual_seed(0)
    for i, (E, k, H, I, groups, Ts) in enumerate(SHAPES):  # noqa: E741
        bias = (None, torch.float32, dtype)[i % 3]
        experts = layer(E, H, I, groups, zeros, DTYPES[i % 3], bias=bias)
        for T in Ts:
            x = torch.randn(T, H).to(dtype)
            weights, ids = routed(T, E, k)
            y = experts.run(x, weights, ids)
            assert y.dtype == dtype
            assert y.shape == (T, H)
            assert error(y, experts.reference(x, weights, ids)) <= BOUNDS[dtype], (E, H, I, groups, T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_another_dtype_than_scales(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = layer(6, 256, 192, (128, 64), "float32", dtype)
    for T in (1, 7, 64):
        x, (weights, ids) = torch.randn(T, 256).to(dtype), routed(T, 6, 3)
        assert error(experts.run(x, weights, ids), experts.reference(x, weights, ids)) <= BOUNDS[dtype]


@pytest.mark.parametrize("gate_up", GATE_UP)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_layout(isa: str, activation: str, gate_up: str) -> None:
    if activation == "swigluoai" and gate_up == "none":
        pytest.skip("swigluoai is defined with a gate only")
    torch.manual_seed(1)
    for on_input, limit, size in ((False, None, 40), (True, 0.7, 56)):
        mlp = Mlp(activation, gate_up, 1.7, limit if activation == "swigluoai" else None, on_input, 2.5)
        experts = layer(3, 72, size, (24, 8), "int", mlp=mlp, bias=torch.float32)
        for dtype in DTYPES:
            for T in (2, 50):
                x = 2 * torch.randn(T, 72).to(dtype)
                weights, ids = routed(T, 3, 2)
                assert error(experts.run(x, weights, ids), experts.reference(x, weights, ids)) <= BOUNDS[dtype]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai"])
def test_activations_hold_over_the_whole_range(isa: str, activation: str) -> None:
    """One expert that passes x through: gate = up = x, and W2 picks the columns out."""
    values = torch.cat(
        (torch.linspace(-30, 30, 2000), torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4, 1e-30]))
    )
    mlp = Mlp(activation, "none" if activation != "swigluoai" else "halves")
    eye = torch.eye(8, dtype=torch.int64) + 8
    one = Packed(
        ((eye << torch.arange(0, 32, 4)).sum(1).to(torch.uint32).view(torch.int32)).view(1, 8, 1),
        torch.ones(1, 8, 1),
        None,
        None,
    )
    two = Packed(torch.cat((one.qweight, one.qweight), 1), torch.ones(1, 16, 1), None, None)
    x = values.view(-1, 8)
    ids, weights = torch.zeros(x.shape[0], 1, dtype=torch.int32), torch.ones(x.shape[0], 1)
    w13, doubled = (two, torch.cat((x, x), 1)) if mlp.gate_up == "halves" else (one, x)
    expected = torch.stack([activate(row, mlp) for row in doubled.double()])
    for rows in (slice(None), slice(0, 3), slice(-3, None)):
        y = cpu_moe.run(x[rows], Routing(weights[rows], ids[rows], None, 1), w13, one, None, None, mlp, 8, (8, 8))
        assert ((y - expected[rows]).abs() <= 1e-6 * x[rows].abs().clamp(min=1) ** 2).all()


def test_long_rows_and_many_tokens_of_one_expert(isa: str) -> None:
    torch.manual_seed(2)
    experts = layer(2, 1024, 72, (128, 72), "int")
    ids = torch.zeros(530, 1, dtype=torch.int32)
    x, weights = torch.randn(530, 1024), torch.rand(530, 1)
    h = x @ experts.value13[0].T
    expected = weights * ((F.silu(h[:, :72]) * h[:, 72:]) @ experts.value2[0].T)
    assert error(experts.run(x, weights, ids), expected) <= BOUNDS[torch.float32]


def test_more_pairs_than_are_done_at_a_time(isa: str) -> None:
    """2^14 of them: the tokens behind are right too."""
    torch.manual_seed(3)
    experts = layer(4, 16, 8, (8, 8))
    x = torch.randn(9000, 16)
    weights, ids = routed(9000, 4, 2)
    y = experts.run(x, weights, ids)
    some = torch.tensor([0, 1, 4499, 4500, 4501, 8191, 8192, 8999])
    assert error(y[some], experts.reference(x[some], weights[some], ids[some])) <= BOUNDS[torch.float32]
    assert torch.isfinite(y).all()


# -- routing -----------------------------------------------------------------------------------------------------------


def zipf(T: int, E: int, k: int) -> Tensor:
    return torch.multinomial((1 / torch.arange(1, E + 1) ** 1.5).expand(T, E), k).int()


ROUTES: dict[str, Callable[[], Tensor]] = {
    "all to one": lambda: torch.full((50, 1), 3, dtype=torch.int32),
    "one token an expert": lambda: torch.randperm(16).int().view(16, 1),
    "mostly empty experts": lambda: torch.randint(14, 16, (20, 2), dtype=torch.int32),
    "an id twice in a row": lambda: torch.randint(16, (20, 2), dtype=torch.int32).repeat(1, 2),
    "zipf": lambda: zipf(80, 16, 4),
    "some of nobody": lambda: torch.where(torch.rand(30, 3) < 0.5, -1, torch.randint(16, (30, 3))).int(),
    "a token without an expert": lambda: torch.cat((torch.full((1, 2), -1), torch.randint(16, (9, 2)))).int(),
    "all of nobody": lambda: torch.full((5, 2), -1, dtype=torch.int32),
}


@pytest.mark.parametrize("route", ROUTES)
def test_routes(isa: str, route: str) -> None:
    torch.manual_seed(4)
    experts = layer(16, 64, 40, (32, 8), "int", bias=torch.float32)
    ids = ROUTES[route]()
    x, weights = torch.randn(ids.shape[0], 64), torch.rand(ids.shape)
    # What nobody computes counts for nothing, whatever its weight.
    weights = torch.where(ids < 0, torch.tensor([float("nan"), float("inf")])[torch.randint(2, ids.shape)], weights)
    y = experts.run(x, weights, ids)
    assert torch.equal(y, experts.run(x, weights, ids.long()))
    expected = experts.reference(x, weights, ids)
    assert torch.equal(y[(ids < 0).all(1)], torch.zeros(int((ids < 0).all(1).sum()), 64))
    assert (y - expected).norm() <= BOUNDS[torch.float32] * expected.norm()


def test_experts_that_nobody_chose_are_not_read(isa: str) -> None:
    torch.manual_seed(5)
    experts = layer(4, 64, 32, (32, 32))
    x, weights = torch.randn(40, 64), torch.rand(40, 2)
    ids = torch.randint(2, (40, 2), dtype=torch.int32)
    before = [experts.run(x[:T], weights[:T], ids[:T]) for T in (1, 40)]
    for packed in (experts.w13, experts.w2):
        packed.scales[2:] = float("nan")
    after = [experts.run(x[:T], weights[:T], ids[:T]) for T in (1, 40)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_tokens(isa: str) -> None:
    experts = layer(2, 64, 32, (32, 32))
    empty = torch.empty(0, 2)
    assert experts.run(torch.empty(0, 64, dtype=torch.bfloat16), empty, empty.int()).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_again_and_with_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    experts = layer(8, 640, 264, (128, 24), "int", bias=torch.float32)
    problems = []
    for T in (1, 6, 50, 300):
        weights, _ = routed(T, 8, 3)
        problems.append((torch.randn(T, 640).to(dtype), weights, zipf(T, 8, 3)))
    results = []
    for count in (1, 2, 2, 5):
        torch.set_num_threads(count)
        results.append([experts.run(*problem) for problem in problems])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_a_token_does_not_depend_on_the_others(isa: str) -> None:
    """As long as the number of tokens does not change how an expert is computed."""
    torch.manual_seed(7)
    experts = layer(8, 64, 32, (32, 32))
    x = torch.randn(6, 64)
    weights, ids = routed(6, 8, 2)
    y = experts.run(x, weights, ids)
    for t in range(6):
        assert torch.equal(experts.run(x[t : t + 1], weights[t : t + 1], ids[t : t + 1])[0], y[t])


def test_pack_copies_nothing_and_unpack_gives_it_back() -> None:
    packed, _ = weight(3, 16, 64, 32, "int", torch.float16)
    canonical = PackedInt4(packed.qweight.flatten(0, 1), packed.scales.flatten(0, 1), packed.zeros.flatten(0, 1))
    there = cpu_moe.pack(canonical, 3)
    back = cpu_moe.unpack(there, 16, 64, 32)
    for name, mine in (("codes", "qweight"), ("scales", "scales"), ("zeros", "zeros")):
        before, packed_one, after = getattr(canonical, name), getattr(there, mine), getattr(back, name)
        assert packed_one.shape == (3, 16, before.shape[1])
        assert before.data_ptr() == packed_one.data_ptr() == after.data_ptr()
        assert torch.equal(before, after)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_far_below_zero_are_nothing(isa: str, activation: str) -> None:
    """Of minus infinity NaN, as 0 times infinity is."""
    codes = torch.full((1, 8, 1), 0x99999999 - (1 << 32), dtype=torch.int32)  # each weight is the scale
    w13 = Packed(codes, torch.tensor([1.0, 1e3, 1e30, 1e35, 3e38, 1, 1, 1]).view(1, 8, 1), None, None)
    w2 = Packed(codes, torch.full((1, 8, 1), 1.0), None, None)
    x = torch.tensor([[-1.0] + [0.0] * 7])
    mlp, ids = Mlp(activation, "none"), torch.zeros(1, 1, dtype=torch.int32)
    y = cpu_moe.run(x, Routing(torch.ones(1, 1), ids, None, 1), w13, w2, None, None, mlp, 8, (8, 8))
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda h: F.gelu(h, approximate="tanh")}[activation]
    wanted = act(-torch.tensor([1.0, 1e3, 1e30, 1e35, 3e38, 1, 1, 1])).sum()
    assert torch.allclose(y, wanted.expand(1, 8), rtol=1e-5), (y, wanted)
