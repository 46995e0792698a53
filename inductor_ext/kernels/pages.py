"""Huge pages for weights that the CPU reads: of 2 MB in place of 4 KB, where Linux grants them.

Codes are read once a token, from memory, and with small pages much of that time goes to looking addresses up. Only the
mapping changes, never a value; where the system has transparent huge pages switched off it stays as it is.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

SIZE = 2 << 20
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGEPAGE, _COLLAPSE = 14, 25  # of madvise(2): may be huge from now on; make those there huge now (Linux 6.1)


def in_huge_pages(t: Tensor) -> None:
    """Asks for huge pages for the whole ones that the tensor's memory covers. What is refused (a file that is mapped,
    no memory free in one piece, another system than Linux) stays as it is."""
    begin = -(-t.data_ptr() // SIZE) * SIZE
    length = (t.data_ptr() + t.nbytes) // SIZE * SIZE - begin
    if length > 0 and (advise := _madvise()) is not None:
        advise(begin, length, _HUGEPAGE)
        advise(begin, length, _COLLAPSE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """None where the system has no huge pages to give."""
    if not _ENABLED.exists() or "[never]" in _ENABLED.read_text():
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    call: Callable[[int, int, int], int] = madvise
    return call
