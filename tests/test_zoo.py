"""The zoo computes what it says: every module against its exact dense weight, in eager PyTorch."""

from collections.abc import Iterator

import pytest
import torch
from zoo import ZOO, Idiom
from zoo.base import call, distance, fresh, given
from zoo.refusals import Noisy

SHAPES = [(64, 128, 32), (32, 192, 64), (64, 64, 64)]
# Of eager modules, which round at every step: looser than what the fused ops owe.
EAGER = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with fresh():
        yield


@pytest.mark.parametrize("idiom", ZOO, ids=lambda idiom: idiom.name)
def test_the_module_computes_its_dense_weight(idiom: Idiom) -> None:
    for shape in SHAPES:
        for leading in idiom.leading:
            for dtype in EAGER:
                module, dense, x = given(idiom, dtype, shape, leading)
                if isinstance(module, Noisy):
                    assert not torch.equal(call(module, x), call(module, x))
                    continue
                y = call(module, x)
                coarsest = max(EAGER[t.dtype] for t in (y, *module.buffers()) if t.dtype in EAGER)
                assert distance(y, module.expected(x, dense)) < coarsest, (shape, leading, dtype)


def test_names_are_unique() -> None:
    names = [idiom.name for idiom in ZOO]
    assert len(set(names)) == len(names)
