"""Kernels with a mistake made in their sources, for tests that show that another test can fail."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hip_lanes
import torch
from hip_lanes import toolchain

_LAUNCH = """
extern "C" const char* launch(const char* name, const u32* grid, u32 threads, const void* args, u64 seed) {
    static std::string error;
    error = "no such kernel";
    for (const lanes::Kernel& kernel : lanes::kernels())
        if (kernel.name == name) error = lanes::run(kernel, grid, threads, args, seed);
    return error.c_str();
}
"""


class Mutant(NamedTuple):
    mistake: str
    seen_by: Callable[[], None]
    """Raises AssertionError if something is wrong."""
    file: str
    before: str
    after: str


def built(source: str, keep: str, change: tuple[str, str, str] | None, folder: Path) -> ctypes.CDLL:
    """One kernel of a source, the one with ``keep`` at its beginning, after a change: file, what was there, what is."""
    shutil.copytree(toolchain.HERE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if change is not None:
        name, before, after = change
        text = (folder / name).read_text()
        assert before in text, f"{name} has no {before!r} to change"
        (folder / name).write_text(text.replace(before, after))
    kernels = (folder / source).read_text()
    whole = re.sub(rf"^[A-Z]+\((?!{re.escape(keep)}).*\)$", "", kernels, flags=re.MULTILINE)
    (folder / source).write_text(whole + _LAUNCH)
    compiler, compiled, library = toolchain.find(), folder / "mutant.o", folder / "mutant.so"
    flags = (*toolchain.CPU, *compiler.cpu, "-O1", f"-I{folder}", f"-I{hip_lanes.HERE}", "-c")
    toolchain.make(compiled, (*compiler.clang, *flags, str(folder / source)))
    toolchain.make(library, (os.environ.get("CXX", "g++"), "-shared", str(compiled)))
    found = ctypes.CDLL(str(library))
    found.launch.restype = ctypes.c_char_p
    return found


def launcher(library: ctypes.CDLL, seeds: Iterator[int]) -> Callable[..., None]:
    """In place of runtime.launch."""

    def launch(
        device: torch.device, name: str, args: ctypes.Structure, grid: tuple[int, int, int], threads: int
    ) -> None:
        three = (ctypes.c_uint32 * 3)(*grid)
        error = library.launch(name.encode(), three, threads, ctypes.byref(args), ctypes.c_uint64(next(seeds)))
        assert error == b"", error

    return launch
