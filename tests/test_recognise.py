"""Every spelling of the zoo is rewritten, and computes what its codes, zeros and scales stand for."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from zoo import EITHER, POSITIVES, ZOO, Idiom
from zoo.base import distance, fresh, given

import inductor_ext
from inductor_ext import backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative L2 against float64: what the op owes (an activation or result rounded to its dtype, float32 within).
OWED = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# (N, K, group), and a dtype: square weights too, in which rows and columns are easily mistaken for each other.
OTHERS = [
    ((64, 64, 64), torch.float32),
    ((32, 192, 64), torch.bfloat16),
    ((96, 64, 16), torch.float16),
    ((16, 512, 128), torch.float32),
]

CORE = [idiom for idiom in POSITIVES if idiom.core]
ROTATED = [(idiom, DTYPES[i % 3]) for i, idiom in enumerate(POSITIVES)]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh():
        yield


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph runs as it is: its ops do their work, and no code is generated around them."""

    def as_it_is(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Any:
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", as_it_is)


def named(value: Any) -> str:
    return value.name if isinstance(value, Idiom) else str(value).removeprefix("torch.")


def compiled(module: Any, strict: bool = True) -> Any:
    return torch.compile(module, backend="w4a16", fullgraph=True, options={"w4a16.strict": strict})


def check(idiom: Idiom, module: Any, dense: Any, x: Tensor, y: Tensor) -> None:
    """One op owes OWED; the roundings of several in turn add up."""
    assert distance(y, module.expected(x, dense)) <= OWED[y.dtype] * idiom.rewritten**0.5


@pytest.mark.parametrize(("idiom", "dtype"), ROTATED, ids=named)
def test_every_spelling_is_rewritten(idiom: Idiom, dtype: torch.dtype, without_inductor: None) -> None:
    module, dense, x = given(idiom, dtype)
    report = inductor_ext.explain(module, x)
    assert [alone.reason for alone in report.left_alone] == []
    assert len(report.rewritten) == idiom.rewritten
    assert report.graphs == 1
    for leading in idiom.leading:
        _, _, x = given(idiom, dtype, leading=leading)
        check(idiom, module, dense, x, compiled(module)(x))


@pytest.mark.parametrize(("shape", "dtype"), OTHERS, ids=named)
@pytest.mark.parametrize("idiom", CORE, ids=named)
def test_every_shape_and_dtype_is_rewritten(
    idiom: Idiom, shape: tuple[int, int, int], dtype: torch.dtype, without_inductor: None
) -> None:
    module, dense, x = given(idiom, dtype, shape, idiom.leading[-1])
    check(idiom, module, dense, x, compiled(module)(x))


@pytest.mark.parametrize("idiom", EITHER, ids=named)
def test_what_may_be_rewritten_is_right(idiom: Idiom, without_inductor: None) -> None:
    module, dense, x = given(idiom, torch.float32)
    report = inductor_ext.explain(module, x)
    assert report.rewritten or report.left_alone
    check(idiom, module, dense, x, compiled(module, strict=False)(x))


@pytest.mark.parametrize(("idiom", "dtype"), [(idiom, DTYPES[i % 3]) for i, idiom in enumerate(CORE)], ids=named)
def test_compiled_by_inductor(idiom: Idiom, dtype: torch.dtype) -> None:
    module, dense, x = given(idiom, dtype)
    check(idiom, module, dense, x, compiled(module)(x))


def test_a_replaced_tensor_in_a_dict_is_noticed(without_inductor: None) -> None:
    idiom = by_name("tensors in a plain dict")
    module, dense, x = given(idiom, torch.float32)
    run = compiled(module)
    check(idiom, module, dense, x, run(x))
    module.held["scales"] = module.held["scales"] * 2
    check(idiom, module, dense * 2, x, run(x))


def test_a_weight_that_outgrows_4_bits_is_still_right(without_inductor: None) -> None:
    idiom = by_name("unpacked int8 -8..7, no zeros")
    module, dense, x = given(idiom, torch.float32)
    run = compiled(module, strict=False)
    check(idiom, module, dense, x, run(x))
    module.q[2, 3] = 100
    dense[2, 3] = 100 * module.scales[2, 0].double()
    check(idiom, module, dense, x, run(x))


def test_a_refused_sibling_refuses_no_other() -> None:
    """The same operations on the same shapes; only the values of the first are beyond 4 bits."""
    for name, n in (("int8, one scale a row", 0), ("unpacked int8 -8..7, one scale a row, mul after to", 1)):
        module, _, x = given(by_name(name), torch.float32)
        assert len(inductor_ext.explain(module, x).rewritten) == n


def by_name(name: str) -> Idiom:
    (idiom,) = (idiom for idiom in ZOO if idiom.name == name)
    return idiom
