"""Triton kernels compiled for a GPU that is not here, and what their machine code shows.

facts = offline.compile(kernel, {"x": "*fp16", "M": "i32"}, {"BM": 64}, "gfx942", num_warps=4, num_stages=2)
facts.spills, facts.shared, facts.load_bytes("tl.load(x")
"""

from __future__ import annotations

import dataclasses
import linecache
import re
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

KB = 1024


@dataclasses.dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared: int
    """Bytes of shared memory (LDS) that one program may have."""


TARGETS = {
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KB),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), 160 * KB),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 64 * KB),
    "gfx1151": Target(GPUTarget("hip", "gfx1151", 32), 64 * KB),
    "gfx1200": Target(GPUTarget("hip", "gfx1200", 32), 64 * KB),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KB),
}
"""By the names that `inductor_ext.devices` gives."""
TWINS = {"gfx1151": "gfx1100"}
"""The same instructions and registers, so the same code from the compiler."""
DIFFERENT = [target for target in TARGETS if target not in TWINS]


@dataclasses.dataclass(frozen=True)
class Facts:
    matrix: frozenset[str]
    """The matrix instructions, with their shapes and dtypes: MFMA, WMMA, mma.sync, wgmma, tcgen05."""
    spills: int
    """AMD: registers spilled. NVIDIA: bytes of stack, which is where registers spill to."""
    shared: int
    """Bytes of shared memory (LDS)."""
    loads: tuple[tuple[str, int], ...]
    """Of every vector load from global memory: the line of source that it came from, and its bytes a thread."""
    assembly: str
    """AMD: the machine code; NVIDIA: PTX."""

    def load_bytes(self, source: str) -> set[int]:
        """The widths of the loads from lines that contain ``source``, in bytes a thread."""
        return {width for line, width in self.loads if source in line}


def compile(
    fn: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    target: str,
    num_warps: int,
    num_stages: int | None = None,
    uneven: Collection[str] = (),
    maxnreg: int | None = None,
) -> Facts:
    """Compiles a ``triton.jit`` function for TARGETS[target].

    ``signature`` gives each runtime argument's type as Triton spells it ("*fp16", "i32"), ``constexprs`` the other
    arguments' values. As at a launch with ordinary sizes, an argument counts as divisible by 16 unless the kernel has
    it in do_not_specialize, or it is one of ``uneven``; without that there would be no wide loads.
    """
    types = signature | dict.fromkeys(constexprs, "constexpr")
    place = {name: (index,) for index, name in enumerate(fn.arg_names)}
    plain = {name for name, spelt in signature.items() if not spelt.startswith("tensordesc")}
    even = {p.name for p in fn.params if p.name in plain and not p.do_not_specialize}.difference(uneven)
    attributes = {place[name]: [["tt.divisibility", 16]] for name in even}
    source = (GluonASTSource if fn.is_gluon() else ASTSource)(
        fn, types, {place[name]: value for name, value in constexprs.items()}, attributes
    )
    gpu = TARGETS[target].gpu
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    options = {name: value for name, value in options.items() if value is not None}
    with triton.knobs.compilation.scope():
        # What is cached may have come from another checkout, whose lines of source are not these.
        triton.knobs.compilation.always_compile = True
        built = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "hip":
        text = built.asm["amdgcn"]
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
    else:
        text = built.asm["ptx"]
        spills = _stack(built.asm["cubin"])
    return Facts(frozenset(_MATRIX.findall(text)), spills, built.metadata.shared, tuple(_loads(text)), text)


def serialized(facts: Facts) -> bool:
    """Whether ptxas lets a wgmma start only when the one before it has ended, which it says (C7510 to C7519)."""
    ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"]
    said = subprocess.run(ptxas, input=facts.assembly, capture_output=True, text=True, check=True).stderr
    assert "registers" in said, said
    return "serialized" in said


_DOTS = {
    "gfx942": r"v_mfma_f32_\w+_{}",
    "gfx950": r"v_mfma_f32_\w+_{}",
    "gfx1100": r"v_wmma_f32_16x16x16_{}",
    "gfx1151": r"v_wmma_f32_16x16x16_{}",
    "gfx1200": r"v_wmma_f32_16x16x16_{}",
    "sm_80": r"mma\.sync.*\.f32\.{0}\.{0}\.f32",
    "sm_90": r"mma\.sync.*\.f32\.{0}\.{0}\.f32|wgmma\.mma_async.*\.f32\.{0}\.{0}",
    "sm_100": r"mma\.sync.*\.f32\.{0}\.{0}\.f32|tcgen05\.mma.*kind::f16",  # which is bfloat16's kind too
}
"""The instruction that a dot of two 16-bit operands becomes; {} stands for f16 or bf16."""


def uses_matrix_units(facts: Facts, target: str, dtype: str) -> bool:
    """Whether there is the target's instruction for a dot of two operands of this dtype."""
    wanted = _DOTS[target].format(dtype.replace("fp16", "f16"))
    return any(re.fullmatch(wanted, instruction) for instruction in facts.matrix)


class Recorder:
    """Stands in for a ``triton.jit`` function where it is launched, and keeps what it would have been launched with.

    With tensors on the device "meta" nothing is computed and no memory is used.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.given: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **named: self.given.update(dict(zip(self.fn.arg_names, args, strict=False)), **named)

    def compile(self, target: str) -> Facts:
        """What was launched last, for TARGETS[target]."""
        given = dict(self.given)
        num_warps = given.pop("num_warps")
        given.pop("launch_pdl", None)
        maxnreg = given.pop("maxnreg", None)
        runtime = {p.name for p in self.fn.params if not p.is_constexpr and given[p.name] is not None}
        signature = {name: _type(given[name]) for name in self.fn.arg_names if name in runtime}
        constexprs = {name: value for name, value in given.items() if name not in runtime}
        numbers = {name: value for name, value in given.items() if isinstance(value, int | float)}
        uneven = {name for name, value in numbers.items() if isinstance(value, float) or value % 16}
        return compile(self.fn, signature, constexprs, target, num_warps, uneven=uneven, maxnreg=maxnreg)


_TYPES = {
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _type(value: Any) -> str:
    """As Triton spells it."""
    if isinstance(value, TensorDescriptor):
        height, width = value.block_shape
        return f"tensordesc<{_TYPES[value.base.dtype]}[{height},{width}],{value.layout!r}>"
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


_MATRIX = re.compile(r"\b(?:v_s?mfma|v_s?wmma|mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
_LOCATION = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.MULTILINE)
_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?(\w+)")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared(?:::\w+)?\.global[\w.:]*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)")
_PTX_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\s")


def _loads(text: str) -> list[tuple[str, int]]:
    """The compilers say before each instruction which line it came from."""
    files = {number: str(Path(folder, name)) for number, folder, name in _FILE.findall(text)}
    found, line = [], ""
    for row in text.splitlines():
        if location := _LOCATION.match(row):
            line = linecache.getline(files[location[1]], int(location[2])).strip()
        elif width := _load_bytes(row):
            found.append((line, width))
    return found


def _load_bytes(row: str) -> int:
    """The bytes a thread loads by this instruction; 0 if it is no load from global memory."""
    if amd := _AMD_LOAD.search(row):
        return _amd_bytes(amd[1])
    if copy := _COPY.search(row):
        return int(copy[1], 0)
    if ptx := _PTX_LOAD.search(row):
        return int(ptx[1] or 1) * int(ptx[2]) // 8
    return 0


def _amd_bytes(kind: str) -> int:
    """b128, dwordx4 -> 16; b32, dword -> 4; u16, ushort, short_d16, d16_b16 -> 2; ..."""
    if bits := re.search(r"[bui](\d+)$", kind):
        return int(bits[1]) // 8
    if kind.startswith("dword"):
        return 4 * int(kind[len("dwordx") :] or 1)
    return 2 if "short" in kind else 1


def _stack(cubin: bytes) -> int:
    """Bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    (stack,) = re.findall(r"STACK:(\d+)", said.stdout)
    return int(stack)
