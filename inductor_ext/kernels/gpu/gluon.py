"""What kernels are written in where Triton's own language does not do: Gluon, an experimental part of Triton, which may
change from one release to the next."""

from __future__ import annotations

import functools
from importlib import import_module


@functools.cache
def importable(*modules: str) -> bool:
    """Whether this Triton has all that these modules of kernels import."""
    try:
        for module in modules:
            import_module(module)
    except (ImportError, AttributeError):
        return False
    return True
