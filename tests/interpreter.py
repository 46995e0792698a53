"""What a Triton kernel computes is tested on a GPU, or with TRITON_INTERPRET=1 on the CPU.

The interpreter has to be chosen before triton is imported, so such a file of tests gets a process of its own, from
``passes``. It asks for ``DEVICE`` and ``DTYPES``, and skips itself by ``needs_a_device``.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # bfloat16 is wrong in the interpreter

needs_a_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA or ROCm device, and this machine has none; another test runs these in Triton's interpreter",
)


def thinned(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """All combinations of three or more values; in the slow interpreter a third of them, with every pair of values of
    two axes among them."""
    numbered = itertools.product(*(enumerate(axis) for axis in axes))
    return [
        tuple(value for _, value in case)
        for case in numbered
        if not INTERPRETED or sum(number for number, _ in case) % 3 == 0
    ]


def passes(name: str) -> None:
    """Runs this file of tests in the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " skipped" not in done.stdout


def _quicken() -> None:
    """Half of the interpreter's time goes into patching Triton's language, at every call of one function by another:
    what is patched already may stay as it is."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def once(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        return patch(fn) if any(tl.core.is_builtin(lang.load) for lang in seen) else interpreter._LangPatchScope()

    interpreter._patch_lang = once


if INTERPRETED:
    _quicken()
