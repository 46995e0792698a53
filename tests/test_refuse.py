"""Every near miss of the zoo is left alone, with its reason, and computes to the bit what plain Inductor computes."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from zoo import NEGATIVES, Idiom
from zoo.base import call, fresh, given

import inductor_ext

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh():
        yield


def named(value: Any) -> str:
    return value.name if isinstance(value, Idiom) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("idiom", NEGATIVES, ids=named)
def test_near_misses_are_refused_with_their_reason(idiom: Idiom, dtype: torch.dtype) -> None:
    module, _, x = given(idiom, dtype)
    report = inductor_ext.explain(module, x, *module.arguments)
    assert [(found.where, found.proof) for found in report.rewritten] == []
    (alone,) = report.left_alone
    assert re.search(idiom.reason, alone.reason), alone.reason


@pytest.mark.parametrize("idiom", [idiom for idiom in NEGATIVES if idiom.core], ids=named)
def test_left_alone_is_plain_inductor_to_the_bit(idiom: Idiom) -> None:
    results = []
    for backend in ("inductor", "w4a16"):
        torch.compiler.reset()
        torch.manual_seed(0)
        module, _, x = given(idiom, torch.bfloat16)
        results.append(call(torch.compile(module, backend=backend, fullgraph=True), x))
    assert torch.equal(*results)


STOPS_STRICT = {
    "masked with 7": "masked",
    "int8, one scale a row": "beyond 4 bits",
    "uint8, one value is 16": "beyond 4 bits",
    "scale after the matmul, unpacked int8": "No scale",
    # int64 is what positions and masks are stored in too.
    "int64, one value beyond 4 bits": "beyond 4 bits",
    "scale after the matmul, int64 words": "No scale",
    "packed weight is an argument, int64 words": "argument",
}


@pytest.mark.parametrize("name", STOPS_STRICT)
def test_strict_names_the_reason(name: str) -> None:
    (idiom,) = (idiom for idiom in NEGATIVES if idiom.name == name)
    module, _, x = given(idiom, torch.float32)
    strict = torch.compile(module, backend="w4a16", options={"w4a16.strict": True})
    with pytest.raises(Exception, match=rf"w4a16\.strict.*{STOPS_STRICT[name]}"):
        call(strict, x)


def test_trained_scales_get_their_gradient() -> None:
    (idiom,) = (idiom for idiom in NEGATIVES if idiom.name == "scales that are trained")
    gradients = []
    for backend in ("inductor", "w4a16"):
        torch.compiler.reset()
        module, _, x = given(idiom, torch.float32)
        torch.compile(module, backend=backend)(x).square().sum().backward()
        gradients.append(module.scales.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
