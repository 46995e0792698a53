"""PyTorch's own operator database (float32, forward) through backend="w4a16": it must do what backend="inductor" does.

    python tests/opinfo.py [--seconds N] [--ops add mul ...] [--json FILE]

Each operator's first sample is compiled with both backends; each comes out as "ok" (the eager result), "wrong", "no
graph" (Dynamo gives it to no backend) or the type of its error. An operator that eager PyTorch refuses, or that has no
float32 sample, is "skipped". The script ends with a table of outcomes and every operator for which the two differ, and
exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import config
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_map_only

BACKENDS = ("inductor", "w4a16")
UNDEFINED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "resize_as_",
}
"""Their results hold whatever was in memory: only shapes and dtypes are compared."""


def named(op: OpInfo) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def outcome(op: OpInfo, backend: str) -> str:
    """What compiling the operator's first float32 sample comes to."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    sample = next(iter(op.sample_inputs("cpu", torch.float32, requires_grad=False)), None)
    if sample is None:
        return "skipped: no sample"

    def call(*args: Any, **kwargs: Any) -> Any:
        return op.op(*args, **kwargs)

    def result(function: Any) -> Any:
        fresh = tree_map_only(torch.Tensor, torch.clone, (sample.input, sample.args, sample.kwargs))
        torch.manual_seed(1)
        return function(fresh[0], *fresh[1], **fresh[2])

    try:
        wanted = result(call)
    except Exception as error:
        return f"skipped: eager raises {type(error).__name__}"
    try:
        found = result(torch.compile(call, backend=backend))
    except Exception as error:
        return type(error).__name__
    if op.name in UNDEFINED:
        found, wanted = tree_map_only(torch.Tensor, torch.zeros_like, (found, wanted))
    try:
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-4, atol=1e-4)
    except (AssertionError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return "wrong"
    return "ok" if torch._dynamo.utils.counters["stats"]["unique_graphs"] else "no graph"


def compare(ops: Iterable[OpInfo], seconds: float) -> dict[str, tuple[str, ...]]:
    """Operator -> its outcome for each backend, for as many as the time allows."""
    end = time.monotonic() + seconds
    outcomes = {}
    with patch.object(common_methods_invocations, "wrapper_set_seed", unseeded), config.patch(fallback_random=True):
        for op in ops:
            if time.monotonic() > end:
                break
            outcomes[named(op)] = tuple(outcome(op, backend) for backend in BACKENDS)
    return outcomes


def unseeded(function: Any, *args: Any, **kwargs: Any) -> Any:
    """For the database's wrapper of random operators, which Dynamo cannot trace: the seed is set outside, once a
    call."""
    return function(*args, **kwargs)


def float32_ops(names: Sequence[str] = ()) -> list[OpInfo]:
    """The operators of the database that take float32 on the CPU, or those of them with these names."""
    return [op for op in op_db if op.supports_dtype(torch.float32, "cpu") and (not names or named(op) in names)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no operator after this time")
    parser.add_argument("--ops", nargs="+", default=[], help="only these, as named in the output: add, norm.nuc, ...")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    ops = float32_ops(given.ops)
    outcomes = compare(ops, given.seconds)
    print(f"{len(outcomes)} of {len(ops)} operators tried\n")
    print(f"{'outcome':<40} {BACKENDS[0]:>10} {BACKENDS[1]:>10}")
    counts = [collections.Counter(pair[i] for pair in outcomes.values()) for i in range(len(BACKENDS))]
    for kind in sorted(set().union(*counts)):
        print(f"{kind:<40} {counts[0][kind]:>10} {counts[1][kind]:>10}")
    different = {name: pair for name, pair in outcomes.items() if pair[0] != pair[1]}
    print(f"\n{len(different)} differ" + "".join(f"\n  {name}: {' / '.join(pair)}" for name, pair in different.items()))
    if given.json:
        given.json.write_text(json.dumps(outcomes, indent=1) + "\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
