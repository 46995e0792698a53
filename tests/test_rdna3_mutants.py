"""The tests of the dot2 kernels can fail: each mistake below, made in the sources, is seen by one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hip_lanes import guarded
from mutants import Mutant, built, launcher
from rdna3 import Routed, Weight, cancelling, drawn, moe_gemm, right

from inductor_ext.kernels.hip import dense, dot, moe, runtime

CPU = torch.device("cpu")

# -- what is computed: each raises if something is wrong ---------------------------------------------------------------


def linear(w: Weight, x: torch.Tensor) -> torch.Tensor:
    words, zeros, scales = (guarded(t) for t in (w.words, w.zeros, w.scales))
    out = torch.empty(len(x), w.N, dtype=x.dtype)
    dense.gemm(x, words, scales, zeros, dot.Zeros.NIBBLES_LESS_ONE, None, out)
    return out


def a_linear() -> None:
    """Two rows; waves have two steps of k and begin within a group; the last tile of columns is not full."""
    w, x = Weight(1536, 136, 96, torch.float16), drawn(2, 1536, dtype=torch.float16)
    for _ in range(4):
        right(linear(w, x), x.double() @ w.dense(), torch.float16)


def a_linear_in_any_order() -> None:
    w = Weight(1536, 136, 64, torch.float16)
    x = cancelling(w, 2)
    first = linear(w, x)
    assert all(torch.equal(first, linear(w, x)) for _ in range(8))


def experts() -> None:
    """Twice, with the same counters; one of five experts is elsewhere."""
    problem = Routed(3, 2, Weight(512, 136, 64, torch.float16, E=4), 2, weighted=True, foreign=1)
    for _ in range(2):
        right(problem.run(CPU), problem.expected(), torch.float16)


def experts_whose_k_is_whole() -> None:
    problem = Routed(3, 2, Weight(32, 128, 32, torch.float16, E=4), 2, weighted=True, foreign=1)
    args = problem.arguments(problem.empty())
    args = {name: guarded(t) if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    moe_gemm(**args)
    right(args["c"], problem.expected(), torch.float16)


def experts_added_up() -> None:
    problem = Routed(3, 2, Weight(512, 136, 64, torch.float16, E=4), 2, together=True, weighted=True, foreign=1)
    c = drawn(3, 136, dtype=torch.float16)
    for _ in range(2):
        right(problem.run(CPU, c.clone()), c.double() + problem.expected(), torch.float16)


def experts_added_up_in_any_order() -> None:
    problem = Routed(2, 3, Weight(512, 136, 64, torch.float16, E=3), 2, together=True, weighted=True)
    for part in (problem.weight.words, problem.weight.zeros, problem.weight.scales):
        part[1:] = part[0]
    problem.weights[:] = torch.tensor([1e4, 1.0, -1e4])
    first = problem.run(CPU)
    assert all(torch.equal(first, problem.run(CPU)) for _ in range(8))


PROBLEMS = (
    a_linear,
    a_linear_in_any_order,
    experts,
    experts_whose_k_is_whole,
    experts_added_up,
    experts_added_up_in_any_order,
)


MUTANTS = (
    Mutant(
        "no barrier before sums are read", a_linear, "dot.h", "[lane()] = y[m];\n    barrier();", "[lane()] = y[m];"
    ),
    Mutant(
        "no barrier before the last sums are read",
        a_linear,
        "dot.h",
        "[lane()] += y[m];\n    barrier();",
        "[lane()] += y[m];",
    ),
    Mutant(
        "a code in a neighbour's place",
        a_linear,
        "dot.h",
        "add(2, H::template pair<2>(words))",
        "add(2, H::template pair<3>(words))",
    ),
    Mutant("halves of a pair changed places", a_linear, "codes.h", "4 * p - 4 & 31", "4 * p + 12 & 31"),
    Mutant("zeros off by one", a_linear, "dot.h", "BASE + (w.kind == NIBBLES_LESS_ONE)", "BASE"),
    Mutant("zeros of the next columns", a_linear, "dot.h", "bytes >> 8 * c & 255", "bytes >> 8 * (c ^ 1) & 255"),
    Mutant("the wrong group within a wave", a_linear, "dot.h", "left = steps - step % steps;", "left = steps;"),
    Mutant("a group one step late", a_linear, "dot.h", "const i32 next = left == 0;", "const i32 next = left < 0;"),
    Mutant(
        "a sum of x of the step before",
        a_linear,
        "dot.h",
        "x = next;\n        summands = sums.fetch(x);",
        "summands = sums.fetch(x);\n        x = next;",
    ),
    Mutant(
        "rows changed places in the sums of x",
        a_linear,
        "dot.h",
        "read_lane(sum, m * LANES)",
        "read_lane(sum, (m ^ 1) * LANES)",
    ),
    Mutant(
        "codes fetched beyond the last step", a_linear, "dot.h", "const i32 more = left > 1;", "const i32 more = 1;"
    ),
    Mutant("columns beyond the last one", a_linear, "dot.h", "n = least(n, w.N - COLUMNS);", ""),
    Mutant(
        "splits added up as they arrive",
        a_linear_in_any_order,
        "arrive.h",
        "from + i * pitch",
        "from + (i + block_y() + 1) % parts * pitch",
    ),
    Mutant(
        "choices added up as they arrive",
        experts_added_up_in_any_order,
        "moe.hip",
        "for (i32 i = 0; i < parts; ++i) {",
        "for (i32 o = 0; o < parts; ++o) {\n        const i32 i = (o + block_x() + block_y()) % parts;",
    ),
    Mutant("a counter that is not zero again", experts, "arrive.h", "if (thread() % WAVE == 0) *counter = 0;", ""),
    Mutant(
        "a tile's counter that is not zero again",
        experts_added_up,
        "moe.hip",
        "if (thread() == 0) args.counters[tile] = 0;",
        "",
    ),
    Mutant("marks that stay", experts_added_up, "moe.hip", "marks[i] = 0;", ""),
    Mutant(
        "parts that nobody wrote", experts_added_up, "moe.hip", "sum = mark ? sum + part : sum;", "sum = sum + part;"
    ),
    Mutant(
        "blocks of nobody that do not arrive",
        experts_added_up,
        "moe.hip",
        "if (late.marks) gather",
        "if (here && late.marks) gather",
    ),
    Mutant(
        "no barrier before the last block is known",
        experts_added_up,
        "moe.hip",
        "args.counters + tile, 1);\n    barrier();",
        "args.counters + tile, 1);",
    ),
    Mutant(
        "the weight of another choice",
        experts,
        "moe.hip",
        "args.weights[slot]",
        "args.weights[(slot + 1) % args.slots]",
    ),
    Mutant("padding that is stored", experts_whose_k_is_whole, "moe.hip", "if (is_slot(late, slot)) leave", "leave"),
    Mutant("what was in c is lost", experts_added_up, "moe.hip", "wide4<T>(*place) + values", "values - values"),
)


@pytest.fixture
def with_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[], None], tuple[str, str, str] | None], None]:
    # What nobody wrote is NaN.
    monkeypatch.setattr(torch, "empty", lambda *shape, **kinds: torch.full(shape, float("nan"), **kinds))
    held = torch.zeros(1 << 14, dtype=torch.int32)
    for module in (dense, moe):
        monkeypatch.setattr(module, "counters", lambda count, device: held[:count])
    monkeypatch.setattr(dot, "splits", lambda tiles, K, device: (1, 1) if K == 32 else (3, -(-K // 96)))
    seeds = iter(range(1000))

    def use(computed: Callable[[], None], change: tuple[str, str, str] | None) -> None:
        source = "dense.hip" if computed in (a_linear, a_linear_in_any_order) else "moe.hip"
        library = built(source, "f16, 2", change, tmp_path / "hip")

        monkeypatch.setattr(runtime, "launch", launcher(library, seeds))
        computed()
        assert held.count_nonzero() == 0, "counters are not zero again"

    return use


@pytest.mark.parametrize("computed", PROBLEMS, ids=lambda f: f.__name__)
def test_without_a_mistake_all_is_right(computed, with_kernel) -> None:
    with_kernel(computed, None)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.mistake)
def test_a_mistake_is_seen(mutant: Mutant, with_kernel) -> None:
    with pytest.raises(AssertionError) as seen:
        with_kernel(mutant.seen_by, (mutant.file, mutant.before, mutant.after))
    assert "to change" not in str(seen.value)
