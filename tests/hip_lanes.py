"""The AMD kernels on the CPU: builds tests/hip/runtime.cpp, a stand-in for libamdhip64 that runs them lane by lane.

with hip_lanes.on("gfx1151") as lanes:
    ...  # whatever calls inductor_ext.kernels.hip, with CPU tensors
lanes.launches()[0].grid
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from inductor_ext.kernels.hip import objects, runtime

HERE = Path(__file__).parent / "hip"
ROOT = HERE.parents[1]
sys.path += [str(ROOT / "bench"), str(ROOT / "csrc" / "hip")]

import isa  # noqa: E402, F401
import toolchain  # noqa: E402


class Call(NamedTuple):
    """A call of the runtime, as the stand-in saw it."""

    what: str
    name: str
    """Of the kernel."""
    data: bytes
    """The image that was loaded, or the kernel's argument."""
    stream: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    device: int


class _Call(ctypes.Structure):
    _fields_ = (
        ("what", ctypes.c_char_p),
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("device", ctypes.c_int32),
    )


class Lanes:
    """The stand-in: what was asked of it, and how it is to answer."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.lanes_calls.restype = ctypes.c_size_t
        self._library.lanes_call.argtypes = (ctypes.c_size_t,)
        self._library.lanes_call.restype = ctypes.POINTER(_Call)
        self._library.lanes_seed.argtypes = (ctypes.c_uint64,)
        self._first = self._library.lanes_calls()

    def calls(self) -> list[Call]:
        """Every call since the test began."""
        return [self._call(i) for i in range(self._first, self._library.lanes_calls())]

    def launches(self) -> list[Call]:
        return [call for call in self.calls() if call.what == "hipModuleLaunchKernel"]

    def fail_next(self, error: int) -> None:
        """The next call, of those that can fail, returns this hipError."""
        self._library.lanes_fail_next(error)

    def seed(self, number: int) -> None:
        """Lanes and blocks run in another order for every seed; each launch takes the next one."""
        self._library.lanes_seed(number)

    def _call(self, i: int) -> Call:
        seen = self._library.lanes_call(i).contents
        data = ctypes.string_at(seen.data, seen.bytes) if seen.data else b""
        what, name = seen.what.decode(), seen.name.decode()
        return Call(what, name, data, seen.stream or 0, tuple(seen.grid), seen.threads, seen.shared, seen.device)


def library() -> Path:
    """The stand-in with every kernel; built where it is not yet, by one process at a time."""
    compiler = toolchain.find()
    toolchain.WORK.mkdir(parents=True, exist_ok=True)
    with FileLock(toolchain.WORK / "lock"):
        sources = [*toolchain.sources(), HERE / "runtime.cpp"]
        objects = toolchain.in_parallel(lambda source: compiler.cpu_object(source, [HERE]), sources)
        parts = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        made = toolchain.WORK / parts / "libamdhip64.so"
        toolchain.make(made, (os.environ.get("CXX", "g++"), "-shared", *map(str, objects)))
    return made


@contextlib.contextmanager
def on(arch: str) -> Iterator[Lanes]:
    """Launches kernels of an architecture on CPU tensors."""
    path = library()
    with runtime.use(path, arch):
        yield Lanes(path)


GUARD = 1 << 20


def guarded(tensor: Tensor, end: bool = True) -> Tensor:
    """A contiguous copy with no memory behind it, or with ``end=False`` before it: a read past its end ends the launch;
    up to 15 bytes past, if its size is no multiple of 16, do not."""
    size = tensor.numel() * tensor.element_size()
    held = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, GUARD + held + GUARD)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for at in (start, start + GUARD + held):
        if libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(GUARD), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = GUARD + ((held - size) // 16 * 16 if end else 0)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def places() -> list[str]:
    """Where the kernels can run here: on lanes, and on the GPU if it is an AMD one that they are for."""
    usable = runtime.why_unusable() is None and objects.why_unusable(runtime.arch(torch.device("cuda", 0))) is None
    return ["lanes", "gpu"] if usable else ["lanes"]
