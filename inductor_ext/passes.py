"""The same rewriting as one Inductor pass, for graphs that do not come through our backend: export and AOTInductor.

aoti_compile_and_package(exported, inductor_configs={"joint_custom_pre_pass": W4A16Pass()})
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._python_dispatch import _disable_current_modes

from inductor_ext import oracle
from inductor_ext.capture import ConstantSite
from inductor_ext.direct import call_directly
from inductor_ext.kernels import external
from inductor_ext.options import Options
from inductor_ext.report import Report
from inductor_ext.rewrite import rewrite

_SLOT = "joint_custom_pre_pass"
DIRECT = True
"""Of the pass that the backend adds. Without it every kernel is called through our ops, where it can be watched."""


class W4A16Pass(CustomGraphPass):
    """Rewrites int4 matmuls whose weights are attributes of the graph; ``then`` is another pass for the same place, run
    afterwards; ``loudness`` the logging level at which what is left alone is spoken of; ``direct`` whether kernels in
    C++ are called without our ops, as only a graph for this process can.

    Weights that are inputs of the graph are left alone: a compiled graph can be found in a cache and used with other
    inputs, for which nothing would have been proved.
    """

    def __init__(
        self,
        options: Options | None = None,
        then: Any = None,
        loudness: int = logging.WARNING,
        direct: bool = False,
    ) -> None:
        self.options, self.then, self.loudness, self.direct = options or Options(), then, loudness, direct

    def __call__(self, graph: fx.Graph) -> None:
        with _disable_current_modes(), torch.no_grad():
            rewrite(ConstantSite(graph, self.loudness), self.options, Report())
        if self.then is not None:
            self.then(graph)
        if self.direct:
            with _disable_current_modes(), torch.no_grad():
                call_directly(graph)

    def uuid(self) -> Any | None:
        """Changes with every file of this package, every option and switch, other packages with kernels, and the pass
        behind; None (no caching) if that one has no uuid."""
        own = (_sources(), repr(self.options), self.direct, oracle.moe_hip(), external.installed())
        if self.then is None:
            return own
        behind = self.then.uuid() if isinstance(self.then, CustomGraphPass) else None
        return None if behind is None else (*own, behind)


@functools.cache
def _sources() -> str:
    """A hash of everything that can change a rewrite: the package's files (patterns and the compiled kernels among
    them) and its version."""
    import inductor_ext.patterns

    roots = {Path(p) for package in (inductor_ext, inductor_ext.patterns) for p in package.__path__}
    code = (".py", ".so", ".co")
    files = sorted((path.name, path) for root in roots for path in root.rglob("*") if path.suffix in code)
    digest = hashlib.sha256(inductor_ext.__version__.encode())
    for name, path in files:
        digest.update(name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def with_pass(config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The config with our pass in its place, and before it whatever pass the user has configured there."""
    theirs = config.get(_SLOT, getattr(torch._inductor.config, _SLOT))
    if isinstance(theirs, W4A16Pass):
        return dict(config)
    # What the backend has left alone is left alone again, and has been spoken of.
    return {**config, _SLOT: W4A16Pass(dataclasses.replace(options, strict=False), theirs, logging.DEBUG, DIRECT)}
