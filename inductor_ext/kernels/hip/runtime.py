"""Launches kernels of the code objects through the libamdhip64 that torch has loaded, on torch's current stream.

A kernel takes one argument, a struct by value: a ``ctypes.Structure`` here with the fields of the one in csrc/hip.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch

from inductor_ext.kernels.hip import objects

Grid = tuple[int, int, int]

_BUFFER, _SIZE, _END = 1, 2, 3  # HIP_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE, _END
_Extra = c_void_p * 5
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "hipGetDevice": (POINTER(c_int),),
    "hipSetDevice": (c_int,),
    "hipModuleLoadData": (POINTER(c_void_p), c_char_p),
    "hipModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "hipModuleLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, c_void_p, c_void_p),
}


class Hip:
    """A libamdhip64, and what was loaded through it."""

    def __init__(self, library: ctypes.CDLL, arch: str | None = None) -> None:
        """With an arch, the library is a stand-in: it runs kernels of that architecture on CPU tensors."""
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
        library.hipGetErrorString.argtypes, library.hipGetErrorString.restype = (c_int,), c_char_p
        self.library = library
        self.simulated = arch
        # Inductor's own launches read the stream in this way: without an object for it.
        self.stream: Callable[[int], int] = (lambda index: 0) if arch else torch._C._cuda_getCurrentRawStream
        self.capturing: Callable[[], bool] = (lambda: False) if arch else torch.cuda.is_current_stream_capturing
        self.functions: dict[int, dict[str, int]] = {}
        """By device, then by kernel."""
        self.lock = threading.Lock()

    def check(self, error: int, doing: str) -> None:
        if error:
            said = self.library.hipGetErrorString(error)
            raise RuntimeError(f"{doing} failed: {said.decode() if said else 'unknown error'} (hipError {error})")

    def current(self) -> int:
        """The thread's current device: modules are loaded and kernels launched there."""
        index = c_int()
        self.check(self.library.hipGetDevice(byref(index)), "hipGetDevice")
        return index.value

    @contextlib.contextmanager
    def on(self, index: int) -> Iterator[None]:
        """Makes a device the current one for a while."""
        before = self.current()
        self.check(self.library.hipSetDevice(index), f"hipSetDevice({index})")
        try:
            yield
        finally:
            self.check(self.library.hipSetDevice(before), f"hipSetDevice({before})")

    def load(self, index: int) -> dict[str, int]:
        """Every kernel of a device's architecture."""
        with self.lock:
            if index in self.functions:
                return self.functions[index]
            if self.capturing():
                raise RuntimeError(
                    "The AMD kernels cannot be loaded while a graph is captured. Run the model once before the capture."
                )
            code = objects.load(arch(torch.device("cuda", index)))
            found: dict[str, int] = {}
            with self.on(index):
                module, function = c_void_p(), c_void_p()
                # The runtime may go on reading the image: objects keeps it.
                self.check(self.library.hipModuleLoadData(byref(module), code.image), "hipModuleLoadData")
                for name in code.kernels:
                    error = self.library.hipModuleGetFunction(byref(function), module, name.encode())
                    self.check(error, f"hipModuleGetFunction of {name}")
                    found[name] = function.value or 0
            self.functions[index] = found
            return found


def launch(device: torch.device, name: str, args: ctypes.Structure, grid: Grid, threads: int, shared: int = 0) -> None:
    """Puts a kernel on the device's current stream: blocks of ``threads``, with ``shared`` bytes of LDS beyond what the
    kernel itself declares. Raises RuntimeError, with the runtime's words, if it does not take it."""
    hip = _hip()
    index = device.index or 0
    function = (hip.functions.get(index) or hip.load(index)).get(name)
    if function is None:
        raise RuntimeError(f"There is no kernel {name} for {arch(device)}.")
    size = c_size_t(ctypes.sizeof(args))
    extra = _Extra(_BUFFER, ctypes.addressof(args), _SIZE, ctypes.addressof(size), _END)
    what = (function, *grid, threads, 1, 1, shared, hip.stream(index), None, extra)
    if hip.current() == index:
        error = hip.library.hipModuleLaunchKernel(*what)
    else:
        with hip.on(index):
            error = hip.library.hipModuleLaunchKernel(*what)
    if error:
        hip.check(error, f"Launching {name}, grid {grid}, {threads} threads, {shared} bytes of LDS,")


def prepare(device: torch.device) -> None:
    """Loads the kernels for a device ahead of the first launch, since they cannot be while a graph is captured."""
    _hip().load(device.index or 0)


def why_unusable() -> str | None:
    """Why this process cannot launch the AMD kernels at all, as a sentence; None if it can."""
    found = _opened()
    if isinstance(found, str):
        return found
    here = {found.simulated or _arch(index) for index in range(1 if found.simulated else torch.cuda.device_count())}
    reasons = (objects.why_unusable(arch) for arch in sorted(here) if objects.why_not_for(arch) is None)
    return next((reason for reason in reasons if reason is not None), None)


def arch(device: torch.device) -> str:
    """The architecture that kernels for this device are compiled for: "gfx1100", ..."""
    return _hip().simulated or _arch(device.index or 0)


@functools.cache
def _arch(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]


@contextlib.contextmanager
def use(library: Path, arch: str) -> Iterator[Hip]:
    """For tests: launches through a stand-in that runs the kernels of an architecture on CPU tensors."""
    global _stand_in
    before, _stand_in = _stand_in, Hip(ctypes.CDLL(str(library)), arch)
    try:
        yield _stand_in
    finally:
        _stand_in = before


_stand_in: Hip | None = None


def _hip() -> Hip:
    found = _opened()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _opened() -> Hip | str:
    return _stand_in or _torchs()


@functools.cache
def _torchs() -> Hip | str:
    """The library that torch runs on. Another one, found by its name, would know nothing of torch's streams."""
    if torch.version.hip is None:
        return "This torch is not built for ROCm."
    if not torch.cuda.is_available():
        return f"torch ({torch.version.hip}) sees no AMD GPU."
    mapped = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    path = next((path for path in mapped if Path(path).name.startswith("libamdhip64.so")), None)
    if path is None:
        return "torch has loaded no libamdhip64.so."
    return Hip(ctypes.CDLL(path))
