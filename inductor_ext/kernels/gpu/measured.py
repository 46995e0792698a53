"""Launch parameters that were measured to be faster than what the rules of ``tuning.py`` give: ``measured.json``, which
``bench/scan_gpu.py --write`` makes. Elsewhere the rules hold; they are what was measured on other shapes.

The file has, for an architecture and its number of processors, layers N x K of well-known models; and for each the
parameters for up to so many rows of x. What is not there is within 3 % of the best that the scan found, or was not
scanned.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from inductor_ext.kernels.gpu.tuning import Config, Hopper

ROWS = (8, 16, 32, 64, 128, 256)
"""Measured at each of these, and used from beyond the one before."""


def dense(M: int, N: int, K: int, arch: str, processors: int) -> Config | Hopper | None:
    """For M rows of N results, and a plain weight (see ``tuning.dense``), which is what was measured."""
    rows = next((rows for rows in ROWS if rows >= M), None)
    return None if rows is None else _dense(rows, N, K, arch, processors)


@functools.cache
def _dense(rows: int, N: int, K: int, arch: str, processors: int) -> Config | Hopper | None:
    layers = table().get(key(arch, processors), {}).get("dense", {})
    given = layers.get(f"{N}x{K}", {}).get(str(rows))
    if given is None:
        return None
    return Config(**given) if "num_warps" in given else Hopper(**given)


def key(arch: str, processors: int) -> str:
    return f"{arch}, {processors} processors"


@functools.cache
def table() -> dict[str, Any]:
    text = importlib.resources.files("inductor_ext.kernels.gpu").joinpath("measured.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found
