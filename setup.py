"""Builds what pyproject.toml cannot say: where patterns/ is installed, the C++ CPU kernel, the AMD kernels.

The kernel library `inductor_ext/_cpu.so` uses LibTorch's stable C ABI and nothing of Python's: one build serves every
supported Python and torch, so its name and the wheel's tag carry no Python version. The AMD kernels are code objects,
files that no linker of the host sees: csrc/hip/toolchain.py compiles them.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, PlatformError

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "hip"))
import toolchain

OPT_OUT = "INDUCTOR_EXT_CPU_KERNEL"  # "0" installs without the C++ CPU kernel
HIP_OPT_OUT = "INDUCTOR_EXT_HIP_KERNELS"  # "0" installs without the AMD kernels


def packages() -> list[str]:
    own = find_packages(include=["inductor_ext", "inductor_ext.*"])
    patterns = ["inductor_ext.patterns", *(f"inductor_ext.patterns.{name}" for name in find_packages("patterns"))]
    return own + patterns


def extensions() -> list[Extension]:
    sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    if not sources or os.environ.get(OPT_OUT) == "0":
        return []
    torch = find_spec("torch")  # found, not imported: the headers and the library are all that a build needs
    if torch is None or torch.origin is None:
        raise SystemExit(
            "inductor-ext: torch is not installed here, and the C++ CPU kernel is built against it. Install torch"
            f" first (>=2.11,<2.14), or set {OPT_OUT}=0 to install without that kernel."
        )
    root = Path(torch.origin).parent
    return [
        Extension(
            "inductor_ext._cpu",
            sources,
            depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
            include_dirs=[str(root / "include")],
            library_dirs=[str(root / "lib")],
            libraries=["torch_cpu"],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
            language="c++",
        )
    ]


class BuildKernel(build_ext):
    """Names the library without a Python version, and says what to do where it cannot be built."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, PlatformError) as error:
            raise SystemExit(
                f"inductor-ext: the C++ CPU kernel did not build ({error}). It needs a C++17 compiler: on Debian and"
                f" Ubuntu, `apt install g++`. To install without this kernel, set {OPT_OUT}=0; CPU models then run"
                " through the slow reference."
            ) from error


class BuildHip(Command):
    """Compiles the AMD kernels into the package, where there is a compiler for them; else `doctor` says so."""

    description = "compile the AMD kernels"
    user_options = [("inplace", "i", "write the code objects into the source tree")]  # noqa: RUF012  setuptools' way
    boolean_options = ["inplace"]  # noqa: RUF012
    editable_mode = False
    build_lib = None

    def initialize_options(self) -> None:
        self.inplace = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        folder = self.folder()
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier build left is not what this one makes
        if os.environ.get(HIP_OPT_OUT) == "0":
            return
        try:
            compiler = toolchain.find()
        except toolchain.NoCompiler as error:
            self.warn(f"inductor-ext is built without the AMD kernels: {error}")
            return
        try:
            toolchain.build(folder, compiler)
        except toolchain.CompileError as error:
            raise SystemExit(
                f"inductor-ext: the AMD kernels did not compile. To install without them, set {HIP_OPT_OUT}=0.\n{error}"
            ) from error

    def folder(self) -> Path:
        home = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        return home / "inductor_ext" / "kernels" / "hip" / "objects"

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted(Path("csrc/hip").iterdir()) if path.is_file()]

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self.folder().glob("*"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_hip", None)]  # noqa: RUF012


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: compiled code, but none of it for one Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=packages(),
    package_dir={"inductor_ext.patterns": "patterns"},
    package_data={"inductor_ext.kernels.gpu": ["measured.json"]},
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": BuildKernel, "build_hip": BuildHip, "bdist_wheel": PlatformWheel},
)
