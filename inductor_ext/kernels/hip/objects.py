"""The code objects of the AMD kernels: which there are, whether they are whole, and made from these sources."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "objects"
SOURCES = FOLDER.parents[3] / "csrc" / "hip"
"""Beside the package in an editable install; nowhere in others."""

ARCHS = ("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1200", "gfx1201")
"""What the kernels are compiled for."""

GET = (
    "To have them, install the package again with clang 18 or newer and lld at hand, or after `pip install ziglang`"
    " with --no-build-isolation."
)
AGAIN = "To build them again: `python setup.py build_hip --inplace`."


@dataclasses.dataclass(frozen=True)
class CodeObject:
    image: bytes
    kernels: tuple[str, ...]
    """The names of those in it; some architectures lack some."""


def why_not_for(arch: str) -> str | None:
    """Why the kernels do not run on an architecture, whatever is installed here, as a sentence; None if they do."""
    return None if arch in ARCHS else f"The kernel is compiled for {', '.join(ARCHS)}, not for {arch}."


def why_unusable(arch: str) -> str | None:
    """Why there are no kernels for this architecture here, as a sentence; None if there are."""
    found = _find(arch)
    return found if isinstance(found, str) else None


def load(arch: str) -> CodeObject:
    """The code object of an architecture. Raises RuntimeError, saying why, if there is none that can be trusted."""
    found = _find(arch)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def archs() -> list[str] | str:
    """Every architecture with a code object here, or why there is none."""
    manifest = _manifest()
    return manifest if isinstance(manifest, str) else list(manifest["objects"])


def compiler() -> str:
    """What the code objects were compiled by."""
    manifest = _manifest()
    return "" if isinstance(manifest, str) else str(manifest["compiler"])


@functools.cache
def _manifest() -> dict[str, Any] | str:
    try:
        manifest: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
    except FileNotFoundError:
        return f"The AMD kernels were not compiled when the package was installed. {GET}"
    except ValueError as error:
        return f"The manifest of the AMD kernels cannot be read ({error}). {GET}"
    if SOURCES.is_dir():
        now = {path.name: _digest(path.read_bytes()) for path in SOURCES.iterdir() if path.is_file()}
        changed = sorted(name for name, _ in now.items() ^ manifest["sources"].items())
        if changed:
            return (
                f"The AMD kernels are stale: {', '.join(dict.fromkeys(changed))} changed since they were built. {AGAIN}"
            )
    return manifest


@functools.cache
def _find(arch: str) -> CodeObject | str:
    manifest = _manifest()
    if isinstance(manifest, str):
        return manifest
    told = manifest["objects"].get(arch)
    if told is None:
        return f"There are no AMD kernels for {arch}; there are for {', '.join(manifest['objects'])}."
    try:
        image = (FOLDER / f"{arch}.co").read_bytes()
    except OSError as error:
        return f"The AMD kernels for {arch} are missing: {error}. {GET}"
    if _digest(image) != told["sha256"]:
        return f"The file of the AMD kernels for {arch} is damaged: its SHA-256 is not the manifest's. {GET}"
    return CodeObject(image, tuple(told["kernels"]))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
