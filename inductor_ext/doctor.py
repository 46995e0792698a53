"""`python -m inductor_ext doctor`: what is installed here, what the machine is, and which kernels can run on it."""

import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch
from torch._dynamo import list_backends

from inductor_ext.kernels import table, why_unusable
from inductor_ext.kernels.hip import objects, probe, runtime

BACKEND = "w4a16"
PACKAGES = ("inductor-ext", "torch", "triton", "transformers", "safetensors", "compressed-tensors")
# The instruction sets that int4 kernels care about, as Linux names them.
X86 = ("avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
ARM = ("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve")


@dataclass(frozen=True)
class Fact:
    """One line of the table; `wrong` says that the package cannot do its work while this line stands."""

    name: str
    value: str
    wrong: bool = False


def facts() -> dict[str, list[Fact]]:
    """Everything that `doctor` prints, by section, in the order in which it is printed."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "kernels": _kernels(),
        "code objects": _code_objects(),
        "backend": _backend(),
    }


def main() -> int:
    """Prints the facts as an aligned table; returns 1 if one of them is wrong, else 0."""
    sections = facts()
    width = max(len(fact.name) for rows in sections.values() for fact in rows)
    for title, rows in sections.items():
        print(title)
        for fact in rows:
            print(f"  {fact.name:<{width}}  {'WRONG: ' if fact.wrong else ''}{fact.value}")
    return int(any(fact.wrong for rows in sections.values() for fact in rows))


def _versions() -> list[Fact]:
    return [Fact("python", platform.python_version()), *(Fact(name, _version(name)) for name in PACKAGES)]


def _version(distribution: str) -> str:
    # torch for ROCm and XPU install triton under other names.
    names = ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu") if distribution == "triton" else (distribution,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def _machine() -> list[Fact]:
    return [
        Fact("platform", platform.platform()),
        Fact("cpu", f"{_cpu_line('model name') or platform.machine()}, {torch.get_num_threads()} threads"),
        Fact("cpu arch", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}: {_isa()}"),
        _compiler(),
        _headers(),
        *_accelerators(),
    ]


def _compiler() -> Fact:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return Fact(
        "c++ compiler", found or "none: Inductor compiles its CPU code with one; apt install g++", wrong=not found
    )


def _headers() -> Fact:
    header = Path(sysconfig.get_path("include"), "Python.h")
    there = header.exists()
    return Fact(
        "python headers", str(header.parent) if there else f"no {header}: apt install python3-dev", wrong=not there
    )


def _cpu_line(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _isa() -> str:
    flags = (_cpu_line("flags") or _cpu_line("Features")).split()
    return " ".join(name for name in X86 + ARM if name in flags) or "no known flag"


def _accelerators() -> list[Fact]:
    if not torch.cuda.is_available():
        build = torch.version.hip or torch.version.cuda
        why = "this torch is built for the CPU alone" if build is None else f"torch ({build}) sees no device"
        return [Fact("gpu", f"none: {why}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        arch = seen.gcnArchName if torch.version.hip else f"sm_{seen.major}{seen.minor}"
        rows.append(Fact(f"gpu {index}", f"{seen.name}, {arch}, {seen.total_memory / 2**30:.0f} GiB"))
    return rows


def _kernels() -> list[Fact]:
    return [_kernel(row.op, row.name) for row in table.TABLE]


def _kernel(op: str, name: str) -> Fact:
    why = why_unusable(op, name)
    # Every problem falls back to the reference kernel, so it alone must work everywhere.
    return Fact(f"{op}: {name}", "usable" if why is None else why, wrong=name == "reference" and why is not None)


def _code_objects() -> list[Fact]:
    there = objects.archs()
    value = there if isinstance(there, str) else f"{', '.join(there)}; compiled by {objects.compiler()}"
    return [Fact("amd gpus", value), *_launches()]


def _launches() -> list[Fact]:
    """Of one small kernel on each AMD GPU that the code objects are for."""
    if runtime.why_unusable() is not None:
        return []
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if objects.why_not_for(runtime.arch(device)) is None:
            why = probe.why_not(device)
            rows.append(Fact(f"launch on gpu {index}", why or "right", wrong=why is not None))
    return rows


def _backend() -> list[Fact]:
    if BACKEND not in list_backends(exclude_tags=()):
        return [Fact(BACKEND, "torch.compile does not list it: install inductor-ext again", wrong=True)]
    return [Fact(BACKEND, f"listed: torch.compile(model, backend={BACKEND!r})"), _entry_point()]


def _entry_point() -> Fact:
    """Which file the name leads to: an older install elsewhere on the path would show here."""
    found = {point.value: point for point in entry_points(group="torch_dynamo_backends", name=BACKEND)}
    if len(found) != 1:
        return Fact("entry point", f"{len(found)} of that name, one expected: {', '.join(found)}", wrong=True)
    (point,) = found.values()
    try:
        point.load()
    except Exception as error:
        return Fact("entry point", f"{point.value} does not load: {type(error).__name__}: {error}", wrong=True)
    return Fact("entry point", f"{point.value} from {sys.modules[point.module].__file__}")
