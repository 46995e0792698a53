"""The tests of the WMMA kernels can fail: each mistake below, made in the sources, is seen by one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hip_lanes import guarded
from mutants import Mutant, built, launcher
from rdna3 import Weight, align, cancelling, drawn, right

from inductor_ext.kernels.hip import dot, runtime, wmma

# -- what is computed: each raises if something is wrong ---------------------------------------------------------------


def linear(w: Weight, x: torch.Tensor) -> torch.Tensor:
    x, words, scales, zeros = (guarded(t) for t in (x, w.words, w.scales, w.zeros))
    out = torch.empty(len(x), w.N, dtype=x.dtype)
    wmma.gemm(x, words, scales, zeros, dot.Zeros.NIBBLES_LESS_ONE, None, out)
    return out


def a_linear() -> None:
    """Groups of three stages; splits begin within one; neither the last rows nor the last columns fill a tile."""
    w, x = Weight(960, 136, 192, torch.float16), drawn(20, 960, dtype=torch.float16)
    for _ in range(3):
        right(linear(w, x), x.double() @ w.dense(), torch.float16)


def a_linear_in_any_order() -> None:
    w = Weight(1152, 136, 192, torch.float16)
    x = cancelling(w, 20)
    first = linear(w, x)
    assert all(torch.equal(first, linear(w, x)) for _ in range(5))


def experts(gate_up: str = "halves") -> None:
    """Gates and ups, biases, weights of the choices; one of four experts is elsewhere."""
    w = Weight(128, 144, 64, torch.float16, E=3)
    x, bias = drawn(9, 128, dtype=torch.float16), drawn(3, 144, dtype=torch.float16, seed=1)
    ids = torch.rand(9, 4, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :2].int()
    there, weights = torch.tensor([2, -1, 0, 1]).int(), drawn(18, dtype=torch.float32, seed=3)
    in_order, of, _ = align(ids, 32, 4, there)
    words, scales, zeros = (guarded(t) for t in (w.words, w.scales, w.zeros))
    weight = wmma.Weight(words, scales, zeros, dot.Zeros.NIBBLES_LESS_ONE, guarded(bias))
    slots = wmma.Slots(in_order, of, 32, 2, wmma.Weigh.RESULT, guarded(weights))
    out = guarded(torch.zeros(18, 72, dtype=torch.float16))
    wmma.routed(guarded(x), weight, slots, out, wmma.Act("silu", gate_up))

    rows = there[ids.long()].flatten().tolist()
    h = torch.stack([x[s // 2].double() @ w.dense(max(e, 0)) + bias[e].double() for s, e in enumerate(rows)])
    gate, up = (h[:, :72], h[:, 72:]) if gate_up == "halves" else (h[:, ::2], h[:, 1::2])
    y = torch.nn.functional.silu(gate) * up * weights.double()[:, None]
    right(out, y * (torch.tensor(rows) >= 0)[:, None], torch.float16)


def experts_interleaved() -> None:
    experts("interleaved")


PROBLEMS = (a_linear, a_linear_in_any_order, experts, experts_interleaved)

MUTANTS = (
    Mutant("no barrier before the first stage is read", a_linear, "wmma.h", "put(ring);\n    barrier();", "put(ring);"),
    Mutant("no barrier between stages", a_linear, "wmma.h", "Stages::BYTES);\n        barrier();", "Stages::BYTES);"),
    Mutant("one stage too few in the ring", a_linear, "wmma.h", "half ^= 1", "half ^= 0"),
    Mutant(
        "rows not the same in both halves of a wave",
        a_linear,
        "wmma.h",
        "(r * 16 + thread() % 16) * PITCH",
        "(r * 16 + thread() % WAVE) * PITCH",
    ),
    Mutant(
        "columns not the same in both halves of a wave",
        a_linear,
        "epilogue.h",
        "(COLS * 16) + thread() % 16 * COLS",
        "(COLS * 16) + thread() % WAVE * COLS",
    ),
    Mutant("a code in a neighbour's place", a_linear, "wmma.h", "pair<2>(words.y)", "pair<3>(words.y)"),
    Mutant("the words of k changed places", a_linear, "wmma.h", "u32x2{low[c], high[c]}", "u32x2{high[c], low[c]}"),
    Mutant("zeros off by one", a_linear, "wmma.h", "255) - 8;", "255) - 7;"),
    Mutant("nibbles of zeros read as stored", a_linear, "wmma.h", "? bytes + 0x01010101", "? bytes"),
    Mutant("zeros of the next column", a_linear, "wmma.h", "zeros >> 8 * c & 255", "zeros >> 8 * (c ^ 1) & 255"),
    Mutant("the wrong 8 off", a_linear, "wmma.h", "-(Half<T>::BASE + 8)", "-(Half<T>::BASE + 7)"),
    Mutant("sums of x of two of four threads", a_linear, "wmma.h", "sum += shuffle_xor<2>(sum);", ""),
    Mutant("a group one stage late", a_linear, "wmma.h", "if (--left == 0)", "if (--left < 0)"),
    Mutant("a split that begins a group", a_linear, "wmma.h", "uniform(whole - k % args.G / STAGE)", "whole"),
    Mutant("fetched beyond the last stage", a_linear, "wmma.h", "least(s + 1, stages - 1)", "s + 1"),
    Mutant("a fragment of the stage before", a_linear, "wmma.h", "f + 2 == FRAGMENTS", "f + 1 == FRAGMENTS"),
    Mutant("columns beyond the last", a_linear, "epilogue.h", "return n < end ?", "return n < 2 * end ?"),
    Mutant(
        "rows beyond the last are stored",
        experts,
        "epilogue.h",
        " && static_cast<u32>(row) < static_cast<u32>(args.rows)",
        "",
    ),
    Mutant(
        "rows read while others write",
        a_linear,
        "epilogue.h",
        "            barrier();\n            each",
        "            each",
    ),
    Mutant("rows written while others read", a_linear, "epilogue.h", "if (r > 0) barrier();", ""),
    Mutant("rows that do not move up", a_linear, "epilogue.h", "sums[next - 1][c] = sums[next][c];", ";"),
    Mutant(
        "splits added up as they arrive",
        a_linear_in_any_order,
        "arrive.h",
        "from + i * pitch",
        "from + (i + block_z() + 1) % parts * pitch",
    ),
    Mutant("a counter that is not zero again", a_linear, "arrive.h", "if (thread() % WAVE == 0) *counter = 0;", ""),
    Mutant("a wave's parts before they are there", a_linear, "epilogue.h", "* WAVES + thread() / WAVE", "* WAVES"),
    Mutant("the row of x of another choice", experts, "wmma.h", "/ args.per_row", "% args.per_row"),
    Mutant(
        "experts elsewhere", experts, "wmma.h", "if (static_cast<u32>(expert) >= static_cast<u32>(args.E)) return;", ""
    ),
    Mutant(
        "the first expert's scales", experts, "wmma.h", "(expert * groups + group) * args.N * 2", "group * args.N * 2"
    ),
    Mutant("the first expert's bias", experts, "epilogue.h", "expert * biases", "0 * biases"),
    Mutant("the gate's bias for the up", experts, "epilogue.h", "n + args.columns)", "n)"),
    Mutant(
        "gate and up changed places",
        experts,
        "activation.h",
        "activated(activation, gate, alpha) * up",
        "activated(activation, up, alpha) * gate",
    ),
    Mutant("odd columns twice", experts_interleaved, "epilogue.h", "y = evens(low, high);", "y = odds(low, high);"),
    Mutant("unweighted", experts, "epilogue.h", "args.weigh == RESULT", "args.weigh == INPUT"),
)


@pytest.fixture
def with_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[], None], tuple[str, str, str] | None], None]:
    held = torch.zeros(1 << 12, dtype=torch.int32)
    monkeypatch.setattr(wmma, "counters", lambda count, device: held[:count])
    monkeypatch.setattr(wmma, "_split", lambda tiles, stages: (3, -(-stages // 3)))
    seeds = iter(range(1000))

    def use(computed: Callable[[], None], change: tuple[str, str, str] | None) -> None:
        library = built("wmma.hip", "f16, 32, 64", change, tmp_path / "hip")
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
