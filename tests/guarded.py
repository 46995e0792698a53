"""Tensors beside memory that is not there: a kernel that reads or writes one element too far is stopped."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_ALIGNED = 16


def guarded(t: Tensor, end: bool = True) -> Tensor:
    """A copy of a tensor on the CPU that ends, or with ``end=False`` begins, where no page is mapped.

    Addresses are multiples of 16, so up to 15 bytes may lie between its end and the gap. Never freed: for small ones.
    """
    size = t.numel() * t.element_size()
    room = -(-size // _PAGE) * _PAGE
    start = _LIBC.mmap(
        None, room + 2 * _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert start != ctypes.c_void_p(-1).value
    for gap in (start, start + _PAGE + room):
        assert _LIBC.mprotect(gap, _PAGE, 0) == 0
    first = start + _PAGE + ((room - size) // _ALIGNED * _ALIGNED if end else 0)
    memory = (ctypes.c_uint8 * max(size, 1)).from_address(first)
    copy = torch.frombuffer(memory, dtype=torch.uint8)[:size].view(t.dtype).view(t.shape)
    return copy.copy_(t)
