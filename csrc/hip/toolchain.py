"""Compiles this folder: one code object an architecture for AMD GPUs, and the same sources for the CPU.

Needs a clang, not ROCm: the sources use no header but their own. Everything goes through assembly text, which every
clang can write, assemble and which the tests read. Imported by setup.py and by the tests; knows nothing of torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build" / "hip"
"""What was compiled stays here, by what it was compiled from."""

ARCHS = ("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1200", "gfx1201")
OLDEST = 18
"""clang's first major version with gfx1151 and gfx1200."""

GPU = ("-x", "hip", "--cuda-device-only", "-nogpulib", "-nogpuinc", "-O3", "-std=c++17")
# Any x86-64 with AVX2; the tests' lanes are written for those.
CPU = ("-x", "c++", "-O2", "-std=c++17", "-mavx2", "-mf16c", "-mfma", "-fPIC")


class NoCompiler(Exception):
    """Nothing here can compile the kernels. The message says what would."""


class CompileError(Exception):
    """The compiler's own words."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    name: str
    version: str
    clang: tuple[str, ...]
    lld: tuple[str, ...]
    cpu: tuple[str, ...]
    """Flags that this clang needs to find its own headers when it compiles for the CPU."""

    def assembly(self, source: Path, arch: str) -> Path:
        """The assembly text of a source."""
        # By default the id of a compilation is made from its path; so the same sources give the same bytes anywhere.
        flags = (*GPU, f"-cuid={source.stem}", f"--offload-arch={arch}", "-S")
        return self._made(source, f"{source.stem}-{arch}.s", (*self.clang, *flags, str(source)))

    def cpu_object(self, source: Path, include: Iterable[Path]) -> Path:
        """A source, compiled for the CPU with headers from these folders too."""
        folders = [*include]
        flags = (*CPU, *self.cpu, f"-I{HERE}", *(f"-I{folder}" for folder in folders), "-c")
        return self._made(source, f"{source.stem}.o", (*self.clang, *flags, str(source)), folders)

    def code_object(self, made: Path, arch: str, assemblies: Iterable[Path]) -> None:
        """Writes one code object of several sources."""
        parts = []
        for text in assemblies:
            part = text.with_suffix(".o")
            make(part, (*self.clang, "--target=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-c", str(text)))
            parts.append(part)
        made.unlink(missing_ok=True)
        make(made, (*self.lld, "-shared", "--no-undefined", *map(str, parts)))
        return made

    def _made(self, source: Path, name: str, command: tuple[str, ...], folders: Iterable[Path] = ()) -> Path:
        """Compiled where that was not done before: by this compiler, in this way, from the same texts."""
        told = hashlib.sha256(repr((self.version, command)).encode())
        for read in (source, *(header for folder in (HERE, *folders) for header in sorted(folder.glob("*.h")))):
            told.update(read.read_bytes())
        made = WORK / told.hexdigest()[:16] / name
        make(made, command)
        return made


def make(made: Path, command: tuple[str, ...]) -> None:
    """Runs a command that writes a file, unless it is there; it appears whole or not at all."""
    if made.exists():
        return
    made.parent.mkdir(parents=True, exist_ok=True)
    unfinished = made.with_name(f"{made.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
    unfinished.replace(made)


def sources() -> list[Path]:
    """Of the kernels."""
    return sorted(HERE.glob("*.hip"))


def build(folder: Path, toolchain: Toolchain) -> None:
    """Writes <arch>.co for every architecture, and manifest.json, which says what they were made from and hold."""
    every = in_parallel(lambda job: toolchain.assembly(*job), [(s, arch) for arch in ARCHS for s in sources()])
    texts = {arch: every[i * len(sources()) : (i + 1) * len(sources())] for i, arch in enumerate(ARCHS)}
    objects = {arch: folder / f"{arch}.co" for arch in ARCHS}
    in_parallel(lambda arch: toolchain.code_object(objects[arch], arch, texts[arch]), ARCHS)
    manifest = {
        "compiler": toolchain.version,
        "sources": {path.name: digest(path) for path in sorted(HERE.iterdir()) if path.is_file()},
        "objects": {
            arch: {"sha256": digest(path), "kernels": [name for text in texts[arch] for name in kernels(text)]}
            for arch, path in objects.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def kernels(assembly: Path) -> list[str]:
    """The kernels in an assembly text."""
    return re.findall(r"^\s*\.amdhsa_kernel\s+(\S+)", assembly.read_text(), re.MULTILINE)


def in_parallel(work: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, jobs))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find(name: str | None = None) -> Toolchain:
    """The toolchain to build with, or the one of this name: "ziglang" or a clang's.

    The ziglang wheel first: who installed it beside the building Python chose its version, and the registers that a
    kernel takes depend on it. Raises NoCompiler.
    """
    reasons = []
    for candidate in (name,) if name else ("ziglang", *_clangs()):
        found = _ziglang() if candidate == "ziglang" else _clang(candidate)
        if isinstance(found, Toolchain):
            return found
        reasons.append(found)
    raise NoCompiler(
        f"{'; '.join(reasons)}. The AMD kernels need clang {OLDEST} or newer with lld (on Debian and Ubuntu, `apt"
        f" install clang-19 lld-19`), ROCm's (hipcc on PATH), or, from pip, `ziglang` beside the building Python."
    )


def _ziglang() -> Toolchain | str:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return "no ziglang wheel"
    home = Path(spec.origin).parent
    zig = str(home / "zig")
    own_headers = ("--target=x86_64-linux-gnu", "-isystem", str(home / "lib" / "include"))
    return _checked("ziglang", (zig, "clang"), (zig, "ld.lld"), own_headers)


def _clangs() -> list[str]:
    """Every clang++ on PATH, the newest first, then the one beside hipcc."""
    folders = [Path(folder) for folder in os.get_exec_path() if folder]
    numbered = {p.name for folder in folders for p in folder.glob("clang++-*") if p.name[8:].isdigit()}
    names = [*sorted(numbered, key=lambda name: -int(name[8:])), "clang++"]
    if hipcc := shutil.which("hipcc"):
        names.append(str(Path(hipcc).resolve().parents[1] / "lib" / "llvm" / "bin" / "clang++"))
    return names


def _clang(name: str) -> Toolchain | str:
    if (path := shutil.which(name)) is None:
        return f"no {name}"
    lld = shutil.which(subprocess.run([path, "-print-prog-name=ld.lld"], capture_output=True, text=True).stdout.strip())
    if lld is None:
        return f"{name} has no ld.lld"
    return _checked(name, (path,), (lld,), ())


def _checked(name: str, clang: tuple[str, ...], lld: tuple[str, ...], cpu: tuple[str, ...]) -> Toolchain | str:
    told = subprocess.run([*clang, "--version"], capture_output=True, text=True).stdout
    version = told.partition("\n")[0]
    major = re.search(r"clang version (\d+)", version)
    if major is None or int(major[1]) < OLDEST:
        return f"{name} is {version or 'not a clang'}"
    return Toolchain(name, version, clang, lld, cpu)
