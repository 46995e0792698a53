"""Other people's kernels, called where their package is installed and has the op. A binding is a kernel as any other
(see ``Kernel`` and ``MoeKernel``); the layouts are in ``inductor_ext/layouts``. None of these packages was at hand: the
tests call stand-ins with their signatures."""

from __future__ import annotations

import functools
import importlib.util

PACKAGES = ("vllm", "sgl_kernel", "gptqmodel", "flashinfer", "vllm_xpu_kernels", "aiter")


@functools.cache
def installed() -> tuple[tuple[str, str | None], ...]:
    """The packages that are here, and where: what a graph was rewritten for may be gone the next time."""
    found = ((name, importlib.util.find_spec(name)) for name in PACKAGES)
    return tuple((name, spec.origin) for name, spec in found if spec is not None)
