"""``prepack_(module)``: keep only the kernel's copy of each weight, for memory and for export. The checkpoint's layout
comes back on saving."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import reset_code

from inductor_ext import kernels
from inductor_ext.capture import DynamoSite
from inductor_ext.kernels import Packed
from inductor_ext.ops import linear
from inductor_ext.options import Options
from inductor_ext.proved import ProvedLinear
from inductor_ext.report import Report
from inductor_ext.rewrite import rewrite

log = logging.getLogger("inductor_ext.prepack")


class NotPrepacked(Exception):
    """Why a layer stays as it is. The message is a sentence."""


def prepack_(module: nn.Module) -> int:
    """Converts the int4 linear layers in a module, in place and one at a time; returns how many.

    A layer qualifies if it has ``in_features``, stores its own int4 tensors, and computes one linear map of its input.
    Its stored codes are freed and the kernel's layout takes their place; scales, zeros and the rest stay. From then on
    weights change by ``load_state_dict()`` alone: where the layout has copies of scales and zeros, writing to the
    module's own does not reach those.
    ``state_dict()`` still gives the stored layout, and ``load_state_dict()`` takes it. Layers whose layout the device's
    kernel reads as it is have nothing to convert and stay, as do those that do not qualify; the log of
    ``inductor_ext.prepack`` says which and why.
    """
    converted = 0
    for name, layer in module.named_modules():
        if (
            isinstance(layer, Prepacked)
            or not _stores_integers(layer)
            or not isinstance(getattr(layer, "in_features", None), int)
        ):
            continue
        try:
            _convert(layer)
            converted += 1
        except NotPrepacked as reason:
            log.info("%s stays as it is: %s", name or type(layer).__name__, reason)
    return converted


def _stores_integers(layer: nn.Module) -> bool:
    own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return any(not t.dtype.is_floating_point and t.numel() > 64 for t in own)


class Prepacked(nn.Module):
    """A linear layer after ``prepack_``: y = x @ W^T + bias, with x [..., K] and W in a kernel's layout.

    Buffers ``packed_*`` hold that layout and are not saved; the stored codes are made from it when ``state_dict()``
    asks for them.
    """

    in_features: int
    out_features: int
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        p, bias = self._packed(), self._bias
        bias = None if bias is None else getattr(self, bias).to(x.dtype)
        out: Tensor = linear(x, *p, bias, self._n, self._group_size, self._kernel)
        return out

    def _become(self, p: ProvedLinear, names: Sequence[str], bias: str | None) -> None:
        """Takes over a layer's state. ``names`` are its attributes that are the cone's leaves."""
        reading = p.recipe.reading
        codes = reading.codes.matrix.leaf
        self._recipe, self._names, self._bias, self._kernel = p.recipe, tuple(names), bias, p.kernel
        self._n, self._group_size = reading.N, reading.K // reading.groups
        self._stored_like = torch.empty_like(p.weight.sources[codes], device="meta")
        for field, tensor in zip(Packed._fields, p.weight.pack(p.kernel), strict=True):
            # What needed no packing is another leaf's memory (scales): it is that leaf's to free.
            self.register_buffer(f"packed_{field}", tensor, persistent=False)
        (self._parameters if names[codes] in self._parameters else self._buffers).pop(names[codes])

    def _packed(self) -> Packed:
        return Packed(*(getattr(self, f"packed_{field}") for field in Packed._fields))

    @property
    def _codes_name(self) -> str:
        return self._names[self._recipe.reading.codes.matrix.leaf]

    def stored_codes(self) -> Tensor:
        """The codes as they were stored before ``prepack_``."""
        canonical = kernels.load(self._kernel).unpack(self._packed(), self._n, self.in_features, self._group_size)
        return self._recipe.reading.codes.write(canonical.logical(canonical.stored_codes()), self._stored_like)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self._codes_name] = self.stored_codes()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        rest = dict(state_dict)
        key = prefix + self._codes_name
        codes = rest.pop(key, None)
        if codes is None:
            missing.append(key)
            if any(prefix + name in rest for name in self._names):  # scales alone, say: for the codes that are here
                codes = self.stored_codes()
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if codes is None:
            return
        if (codes.shape, codes.dtype) != (self._stored_like.shape, self._stored_like.dtype):
            errors.append(
                f"{key} is {codes.dtype} {list(codes.shape)};"
                f" {self._stored_like.dtype} {list(self._stored_like.shape)} is needed."
            )
        else:
            device = self.packed_qweight.device
            leaves = [codes.to(device) if name == self._codes_name else getattr(self, name) for name in self._names]
            packed = self._recipe.pack(self._kernel, self._recipe.canonical(leaves))
            for field, tensor in zip(Packed._fields, packed, strict=True):
                setattr(self, f"packed_{field}", tensor)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self._n}, group_size={self._group_size}"
        return f"{sizes}, kernel={self._kernel}"


def _convert(layer: nn.Module) -> None:
    site, p = _captured(layer)
    own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    name_of = {id(t): name for name, t in own.items()}
    names = [name_of.get(id(t)) for t in p.weight.sources]
    if p.weight.parts or any(name is None for name in names):
        raise NotPrepacked("its int4 tensors are not all parameters or buffers of its own")
    bias = None
    if p.anchor.bias is not None:
        bias = name_of.get(id(site.stored(p.anchor.bias)))
        if bias is None:
            raise NotPrepacked("its bias is no parameter or buffer of its own")
    _require_linear(site.graph)
    packed = p.weight.pack(p.kernel)
    if any(packed.qweight.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in p.weight.sources):
        raise NotPrepacked(f"the {p.kernel} kernel reads its layout as it is")
    layer.__class__ = Prepacked
    layer.__dict__.pop("forward", None)
    converted: Any = layer
    converted._become(p, [name for name in names if name is not None], bias)


def _captured(layer: Any) -> tuple[DynamoSite, ProvedLinear]:
    """The layer's graph, rewritten. Raises NotPrepacked unless the layer is captured whole and has one int4 matmul."""
    found: list[tuple[DynamoSite, list[ProvedLinear]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        site = DynamoSite(gm, inputs)
        found.append((site, [p for p in rewrite(site, Options(), report) if isinstance(p, ProvedLinear)]))
        return gm.forward

    report = Report()
    floats = [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if t.dtype.is_floating_point]
    if not floats:
        raise NotPrepacked("it has no floating-point tensor of its own, so no dtype to run it in")
    x = torch.zeros(2, layer.in_features, dtype=floats[0].dtype, device=floats[0].device)
    try:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
            compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
            compiled(x)
    except Exception as error:
        raise NotPrepacked(f"it cannot be captured ({type(error).__name__})") from error
    finally:
        reset_code(type(layer).forward.__code__)
    reasons = [alone.reason for alone in report.left_alone]
    if len(found) != 1 or len(found[0][1]) != 1 or reasons:
        raise NotPrepacked(
            " ".join(reasons) or f"{sum(len(proved) for _, proved in found)} of its matmuls are int4, one is needed"
        )
    if found[0][1][0].weight.entry.kind.codes == "mxfp4":
        raise NotPrepacked("its weight is MXFP4, of which no kernel has a layout of its own")
    site, proved = found.pop()  # torch.compile keeps the backend, and with it this list
    return site, proved[0]


def _require_linear(graph: fx.Graph) -> None:
    """Only the op may be left in the rewritten graph, with its result returned."""
    rest = [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "get_attr", "output") and node.target is not linear
    ]
    results = graph.find_nodes(op="output")[0].all_input_nodes
    if rest or len(results) != 1 or results[0].target is not linear:
        raise NotPrepacked(
            f"it computes more than one linear map ({', '.join(node.name for node in rest[:4]) or 'several results'})"
        )
