"""What the assembly text of AMD kernels says: registers, spills, LDS, and the instructions of the hot loop.

    for kernel in isa.kernels(text):
        kernel.vgprs, kernel.waves("gfx1100"), kernel.hot.kinds["wmma"]

Counts, not times: nothing here knows how long an instruction takes.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

SIMDS, MOST_WAVES, LDS = 4, 16, 128 * 1024
"""Of a WGP, and the waves of a SIMD."""
WAVE = 32

SMALL = ("gfx1102", "gfx1103", "gfx1150")
"""The architectures with 1024 registers a SIMD lane, in granules of 16; the others have 1536, in granules of 24."""

_KINDS = {
    "wmma": r"v_wmma",
    "dot2": r"v_(?:dual_)?dot2|.*:: v_dual_dot2",
    "valu": r"v_",
    "ds": r"ds_",
    "vmem": r"(?:global|buffer|flat)_",
    "scratch": r"scratch_",
    "smem": r"s_(?:buffer_)?load_",
    "wait": r"s_wait",
    "barrier": r"s_barrier",
    "branch": r"s_c?branch",
    "hint": r"s_(?:delay_alu|clause|nop)",
    "salu": r"s_",
}
"""The kinds of instructions, the first that fits; a dual pair is one instruction."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions of a loop that are in no loop within it; all of a kernel that has none."""

    opcodes: Counter[str]
    """As the compiler writes them, without the encoding's suffix: "v_wmma_f32_16x16x16_f16", "global_load_b128"."""
    kinds: Counter[str]

    @property
    def size(self) -> int:
        """Without hints, which only tell the hardware how to go on."""
        return self.kinds.total() - self.kinds["hint"]

    @property
    def products(self) -> int:
        return self.kinds["wmma"] + self.kinds["dot2"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    """Bytes a lane."""
    lds: int
    """Bytes a workgroup."""
    threads: int
    """Of a workgroup, at most."""
    loops: tuple[Loop, ...]

    @property
    def hot(self) -> Loop:
        """The loop with most WMMAs and dots, or the longest where no loop has any."""
        return max(self.loops, key=lambda loop: (loop.products, loop.size))

    def waves(self, arch: str) -> float:
        """How many waves a SIMD holds: whole workgroups, as registers and LDS allow."""
        registers, granule = (1024, 16) if arch in SMALL else (1536, 24)
        by_registers = min(MOST_WAVES, registers // (-(-self.vgprs // granule) * granule)) if self.vgprs else MOST_WAVES
        each = -(-self.threads // WAVE)
        workgroups = SIMDS * by_registers // each
        if self.lds:
            workgroups = min(workgroups, LDS // self.lds)
        return workgroups * each / SIMDS


def kernels(text: str) -> list[Kernel]:
    """Every kernel in a compiler's assembly text."""
    return [_kernel(text, told) for told in _metadata(text)]


def _metadata(text: str) -> list[dict[str, str]]:
    """What the compiler tells of each kernel to the runtime, at the end of the text."""
    _, _, end = text.partition(".amdgpu_metadata")
    told: list[dict[str, str]] = []
    for start, key, value in re.findall(r"^(  - |    )\.(\w+): *(\S*)$", end, re.MULTILINE):
        if start == "  - ":
            told.append({})
        told[-1][key] = value
    return told


def _kernel(text: str, told: dict[str, str]) -> Kernel:
    name = told["name"]
    body = re.search(rf"^{re.escape(name)}:.*?^\.Lfunc_end\d+:", text, re.MULTILINE | re.DOTALL)
    if body is None:
        raise ValueError(f"The assembly text has no kernel {name}.")
    return Kernel(
        name,
        vgprs=int(told["vgpr_count"]),
        sgprs=int(told["sgpr_count"]),
        vgpr_spills=int(told["vgpr_spill_count"]),
        sgpr_spills=int(told["sgpr_spill_count"]),
        scratch=int(told["private_segment_fixed_size"]),
        lds=int(told["group_segment_fixed_size"]),
        threads=int(told["max_flat_workgroup_size"]),
        loops=tuple(_loops(body[0].splitlines())),
    )


def _loops(lines: list[str]) -> list[Loop]:
    """A loop is what stands between a label and the last branch back to it."""
    labels: dict[str, int] = {}
    last: dict[str, int] = {}
    for at, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = at
        elif (branch := re.match(r"\ts_c?branch\w* (\.L\w+)", line)) and branch[1] in labels:
            last[branch[1]] = at
    spans = {(labels[label], end) for label, end in last.items()}
    if not spans:
        return [_count(lines)]
    found = []
    for begin, end in spans:
        inner = [(b, e) for b, e in spans if (b, e) != (begin, end) and begin <= b and e <= end]
        own = [lines[at] for at in range(begin, end + 1) if not any(b <= at <= e for b, e in inner)]
        found.append(_count(own))
    return found


def _count(lines: list[str]) -> Loop:
    opcodes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for line in lines:
        if instruction := re.match(r"\t([a-z]\w+)[^;]*", line):
            opcodes[re.sub(r"_e(?:32|64)$", "", instruction[1])] += 1
            kinds[next(kind for kind, what in _KINDS.items() if re.match(what, instruction[0].strip()))] += 1
    return Loop(opcodes, kinds)
