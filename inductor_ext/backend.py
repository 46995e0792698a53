"""``torch.compile(model, backend="w4a16")``: rewrite Dynamo's graph, hand it to Inductor, and feed it packed weights at
every call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch.utils._python_dispatch import _disable_current_modes

from inductor_ext import devices, passes, prove, subclasses
from inductor_ext.capture import DynamoSite, clone
from inductor_ext.examine import Strict, examine
from inductor_ext.feed import Feeds, feed
from inductor_ext.options import Options, inductor_config, split
from inductor_ext.report import Report
from inductor_ext.rewrite import rewrite

log = logging.getLogger("inductor_ext.backend")
Compiled = Callable[..., Any]


def w4a16(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend, as ``torch.compile`` calls it. ``mode`` and ``options`` are Inductor's, and ``w4a16.kernel``,
    ``w4a16.strict``, ``w4a16.activation`` ours.

    Raises what ``options.split`` raises, oracle.NoKernel for a forced kernel that cannot, and Strict.
    """
    own, rest = split(options)
    config = passes.with_pass(inductor_config(mode, rest), own)
    site = DynamoSite(gm, example_inputs)
    with _disable_current_modes(), torch.no_grad():
        proved = rewrite(site, own, Report(), subclasses.inside)
    site.gm.recompile()
    if not proved:
        return _inductor(gm, example_inputs, config)
    feeds = Feeds([feed(site, weight, p.kernel) for p in proved for weight in p.weights])
    compiled = _inductor(site.gm, site.inputs, config)
    return _fed(compiled, feeds, own.strict, _original(gm, config))


def _inductor(gm: fx.GraphModule, inputs: Sequence[Any], config: Mapping[str, Any]) -> Compiled:
    compiled: Any = compile_fx(gm, list(inputs), config_patches=dict(config))
    return cast(Compiled, compiled)


def _original(gm: fx.GraphModule, config: Mapping[str, Any]) -> Compiled:
    """The graph as it was, compiled by Inductor if it is ever called. It holds no tensor of the call that it was
    captured in."""
    plain = clone(gm)
    for node in plain.graph.nodes:
        node.meta = {}
    plain.meta = {}
    compiled: Compiled = torch.compile(plain, options=dict(config))
    return compiled


def _fed(compiled: Compiled, feeds: Feeds, strict: bool, original: Compiled) -> Compiled:
    """The compiled graph, called with the packed weights of whatever stored tensors it is called with.

    One graph serves many layers, and weights may change: should those of a call not be what was proved, the call runs
    the graph as it was.
    """
    told: set[str] = set()

    def run(*args: Any) -> Any:
        try:
            extra = feeds.tensors(args)
        except prove.NotProved as reason:
            if strict:
                raise Strict(f"w4a16.strict: a weight that the graph was not compiled with: {reason}") from None
            if str(reason) not in told:
                told.add(str(reason))
                log.warning(
                    "a graph runs as it was before rewriting, for a weight that it was not compiled with: %s", reason
                )
            return original(*args)
        return compiled(*args, *extra)

    return run


_reports: list[tuple[Report, Options]] = []
"""Of the ``explaining`` under way, the innermost last."""


def explaining(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: devices.Device | None = None
) -> Report:
    """The report of every graph that ``model(*args, **kwargs)`` is captured in, with the kernels that would be chosen
    for another device if one is given; the graphs themselves run eagerly."""
    model = getattr(model, "_orig_mod", model)
    in_place = getattr(model, "_compiled_call_impl", None)  # of model.compile(): it would be called in our place
    _reports.append((Report(), Options(device=device)))
    try:
        if in_place is not None:
            model._compiled_call_impl = None
        compiled: Any = torch.compile(model, backend=_examining)
        compiled(*args, **kwargs)
    finally:
        if in_place is not None:
            model._compiled_call_impl = in_place
        report, _ = _reports.pop()
    return report


def _examining(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    """A backend that reports at every call, not when it compiles: Dynamo reuses graphs, from one ``explain`` to the
    next as well."""
    training = torch.is_grad_enabled()

    def run(*args: Any) -> Any:
        if _reports:
            site = DynamoSite(gm, args)
            site.training = training
            with torch.no_grad():
                report, options = _reports[-1]
                examine(site, options, report, subclasses.inside)
        forward: Compiled = gm.forward
        return forward(*args)

    return run
