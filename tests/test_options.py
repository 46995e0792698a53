"""Options: ours, Inductor's, and what is told about wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Calls, CompressedTensors, rel_l2
from torch import Tensor, fx

from inductor_ext import kernels
from inductor_ext.options import Options, inductor_config, split

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def run(options: dict[str, Any] | None = None, backend: str = "w4a16", **layer: Any) -> Tensor:
    y: Tensor = torch.compile(CompressedTensors(32, 64, **layer), backend=backend, options=options)(X)
    return y


def message_of(options: dict[str, Any], backend: str) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as error:
        run(options, backend)
    return type(error.value), str(error.value).replace(f"backend='{backend}'", "")


def test_ours_and_inductors_are_told_apart() -> None:
    own, rest = split({"w4a16.strict": True, "max_autotune": True, "w4a16.kernel": "reference"})
    assert own == Options(kernel="reference", strict=True)
    assert rest == {"max_autotune": True}
    assert split(None) == split({}) == (Options(), {})
    assert split({"w4a16.kernel": None}) == (Options(), {})


def test_an_unknown_key_of_ours_lists_the_known_ones() -> None:
    with pytest.raises(Exception, match=r"w4a16\.kernal.*w4a16\.kernel, w4a16\.strict"):
        run({"w4a16.kernal": "cpu"})


@pytest.mark.parametrize(
    "options",
    [{"w4a16.strict": 1}, {"w4a16.strict": "yes"}, {"w4a16.strict": None}, {"w4a16.kernel": 3}, {"w4a16.kernel": True}],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_named(options: dict[str, Any]) -> None:
    ((key, value),) = options.items()
    needed = "bool" if key == "w4a16.strict" else "str"
    with pytest.raises(Exception) as error:
        run(options)
    for part in (key, repr(value), needed):
        assert part in str(error.value)


def test_an_unknown_kernel_lists_the_known_ones() -> None:
    with pytest.raises(Exception, match=r"There is no kernel 'cup'; the kernels are .*cpu, .*hip, .*reference"):
        run({"w4a16.kernel": "cup"})


def test_a_forced_kernel_is_used(calls: Calls) -> None:
    assert rel_l2(run({"w4a16.kernel": "reference"}), CompressedTensors(32, 64).expected(X)) <= 2e-6
    assert calls.ran == ["reference"]


def test_a_forced_kernel_that_cannot_is_an_error_with_its_reason() -> None:
    """The C++ kernel takes groups of 8 and more."""
    reason = kernels.load("cpu").usable() or "group size must be a multiple of 8, not 4"
    with pytest.raises(Exception, match="cpu") as error:
        run({"w4a16.kernel": "cpu"}, group=4)
    assert reason in str(error.value)


@pytest.mark.parametrize("options", [{"no_such_option": 1}, {"max_autotune": "yes"}, {"triton": 3}], ids=str)
def test_inductors_own_options_are_checked_as_by_inductor(options: dict[str, Any]) -> None:
    """The same complaint, whoever makes it."""
    ours = message_of(options, "w4a16")[1]
    (key,) = options
    assert key in ours
    theirs = message_of(options, "inductor")[1]
    assert theirs.split("\n")[0] in ours


def test_inductors_own_options_reach_it() -> None:
    seen = []

    def note(graph: fx.Graph) -> None:
        seen.append(torch._inductor.config.max_fusion_size)

    run({"max_fusion_size": 17, "joint_custom_post_pass": note})
    assert seen == [17]


@pytest.mark.parametrize("mode", torch._inductor.list_mode_options())
def test_modes_are_inductors(mode: str) -> None:
    config = inductor_config(mode, {})
    for key, value in torch._inductor.list_mode_options(mode).items():
        assert config[key.replace("-", "_")] == value


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(Exception, match="faster"):
        torch.compile(CompressedTensors(32, 64), backend="w4a16", mode="faster")(X)


def test_mode_and_options_together_are_refused_as_by_torch() -> None:
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(CompressedTensors(32, 64), backend="w4a16", mode="default", options={"w4a16.strict": True})


def test_options_of_different_calls_do_not_mix(calls: Calls) -> None:
    """One layer compiled with two sets of options: each keeps its own."""
    layer = CompressedTensors(32, 64)
    default = torch.compile(layer, backend="w4a16")
    forced = torch.compile(layer, backend="w4a16", options={"w4a16.kernel": "reference"})
    for run in (default, forced, default):
        assert rel_l2(run(X), layer.expected(X)) <= 2e-6
    first = "cpu" if kernels.load("cpu").usable() is None else "reference"
    assert calls.ran == [first, "reference", first]
