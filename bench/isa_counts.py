"""What the compiler made of the AMD kernels: `python bench/isa_counts.py [part of a kernel's name]`.

A row for every kernel and architecture: registers, spills (of vector + of scalar ones), LDS, waves a SIMD, and the
instructions of the hot loop by kind, with how many come to one WMMA or dot. Needs the compiler alone; says nothing of
time.
"""

import argparse
import sys
from pathlib import Path

import isa

sys.path.append(str(Path(__file__).resolve().parent.parent / "csrc" / "hip"))

import toolchain

KINDS = ("wmma", "dot2", "valu", "ds", "vmem", "smem", "salu", "wait", "barrier", "branch", "hint")
HEAD = ("kernel", "arch", "VGPR", "SGPR", "spills", "scratch", "LDS", "waves", "loop", *KINDS, "per product")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="", help="of the kernels' names")
    parser.add_argument("--arch", choices=toolchain.ARCHS, action="append", help="all, if not given")
    parser.add_argument("--compiler", help="ziglang, clang++-19, ...; else what the package is built with")
    asked = parser.parse_args()
    compiler = toolchain.find(asked.compiler)
    jobs = [(source, arch) for source in toolchain.sources() for arch in asked.arch or toolchain.ARCHS]
    texts = toolchain.in_parallel(lambda job: compiler.assembly(*job).read_text(), jobs)
    print(f"{compiler.version}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for (_, arch), text in zip(jobs, texts, strict=True):
        for kernel in isa.kernels(text):
            if asked.part in kernel.name:
                print(f"| {' | '.join(row(kernel, arch))} |")


def row(kernel: isa.Kernel, arch: str) -> list[str]:
    hot = kernel.hot
    spills = f"{kernel.vgpr_spills}+{kernel.sgpr_spills}"
    facts = (kernel.vgprs, kernel.sgprs, spills, kernel.scratch, kernel.lds, f"{kernel.waves(arch):g}", hot.size)
    each = f"{hot.size / hot.products:.1f}" if hot.products else "-"
    return [kernel.name, arch, *map(str, facts), *(str(hot.kinds[kind] or "-") for kind in KINDS), each]


if __name__ == "__main__":
    main()
