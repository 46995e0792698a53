"""What every entry is made of: random experts, a module that stores them in int4, and what it computes, in float64.

Nothing here uses inductor_ext: a mistake in the package must not hide behind the same mistake in its tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BF16 = (torch.bfloat16,)
"""What torch._grouped_mm takes while a graph is captured; transformers has an op of its own for the others."""


@dataclasses.dataclass
class Weight:
    """Random experts of one projection: codes int64 [E, N, K] and zeros int64 [E, N, K/group] in 0..15, scales
    [E, N, K/group] of both signs, and perhaps a bias [E, N]. One expert's have no E."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    bias: Tensor | None
    group: int

    @classmethod
    def draw(cls, E: int, N: int, K: int, group: int, spread: float, dtype: torch.dtype, bias: bool, g: Any) -> Weight:
        """``spread``: about what the projection's results vary by, for inputs that vary by 1."""
        codes = (torch.randperm(E * N * K, generator=g) % 16).view(E, N, K)
        zeros = 1 + (torch.randperm(E * N * K // group, generator=g) % 15).view(E, N, K // group)
        sign = torch.randint(2, zeros.shape, generator=g) * 2 - 1
        size = (torch.rand(zeros.shape, generator=g) + 0.5) * spread / (5 * K**0.5)
        biases = torch.randn(E, N, generator=g).to(dtype) if bias else None
        return cls(codes, zeros, (sign * size).to(dtype), biases, group)

    def __getitem__(self, expert: int) -> Weight:
        bias = None if self.bias is None else self.bias[expert]
        return Weight(self.codes[expert], self.zeros[expert], self.scales[expert], bias, self.group)

    def exact(self, zeros: Tensor | int = 8) -> Tensor:
        """float64 [E, N, K]: (codes - zeros) * scales."""
        codes = self.codes.unflatten(-1, (-1, self.group)).double()
        zeros = zeros if isinstance(zeros, int) else zeros.double().unsqueeze(-1)
        return ((codes - zeros) * self.scales.double().unsqueeze(-1)).flatten(-2)


def rows(*weights: Weight, interleaved: bool = False) -> Weight:
    """The rows of several weights: all of one, then all of the next; or, interleaved, one of each in turn."""

    def join(*tensors: Tensor) -> Tensor:
        return torch.stack(tensors, dim=2).flatten(1, 2) if interleaved else torch.cat(tensors, dim=1)

    fields = (join(*(getattr(w, name) for w in weights)) for name in ("codes", "zeros", "scales"))
    biases = [w.bias for w in weights if w.bias is not None]
    return Weight(*fields, join(*biases) if biases else None, weights[0].group)


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is stored, and the way from there to floats."""

    name: str
    store: Callable[[Weight], dict[str, Tensor]]
    read: Callable[[dict[str, Tensor], int, int], Tensor]
    """(stored, rows N, group) -> [*, N, K], or [*, K, N] with ``kn``. The stored tensors may be those of all experts,
    of a selection [*], or of one."""
    exact: Callable[[Weight], Tensor]
    kn: bool = False


@dataclasses.dataclass(frozen=True)
class Mlp:
    """What an expert computes between its projections."""

    activation: str
    """As the op names it."""
    arrange: Callable[[Weight, Weight], dict[str, Weight]]
    """(gate, up) -> the weights that are stored, by name."""
    forward: Callable[[Callable[[str], Tensor]], Tensor]
    """Spells act(h), given the projection of x by each stored weight."""
    exact: Callable[[Tensor, Tensor], Tensor]
    """act(gate, up)."""
    spread: float = 2.0
    """About what gate and up vary by: enough for the activation to show."""


def swiglu(project: Callable[[str], Tensor]) -> Tensor:
    gate, up = project("w13").chunk(2, dim=-1)
    return F.silu(gate) * up


def halves(gate: Weight, up: Weight) -> dict[str, Weight]:
    return {"w13": rows(gate, up)}


SWIGLU = Mlp("silu", halves, swiglu, lambda gate, up: F.silu(gate) * up)

Form = Callable[[Any, Tensor, Tensor, Tensor], Any]
"""(module, x [T, H], ids [T, k], weights [T, k]) -> [T, H]."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to write routed experts, or one near miss."""

    name: str
    form: Form
    format: Format
    mlp: Mlp = SWIGLU
    route: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None
    """(module, x [T, H]) -> ids and weights; None: they are inputs."""
    around: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    """(module, x, the experts' result) -> what the module returns: shared experts, residuals."""
    exact_around: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    """The same in float64, where the form does it itself."""
    exact_weights: Callable[[Tensor], Tensor] = lambda weights: weights
    """What the form makes of the router's weights."""
    E: int = 8
    k: int = 2
    H: int = 64
    I: int = 32  # noqa: E741  the field's name
    group: int = 32
    bias: bool = False
    on_input: bool = False
    """The router's weight multiplies x."""
    separate: bool = False
    """Every expert is a module with tensors of its own."""
    batched: bool = False
    """x is [B, S, H]."""
    layers: int = 1
    dtypes: tuple[torch.dtype, ...] = FLOATS
    unbacked: bool = False
    """Captured in one graph only with capture_dynamic_output_shape_ops."""
    tokens: int = 7
    """How many tell a near miss from the op."""
    scale: float = 1.0
    """How large x is, in standard deviations."""
    loose: bool = False
    """Nothing says that there are as many ids and weights as tokens."""
    signed: bool = False
    """Weights that are inputs have both signs."""
    repeats: bool = False
    """Ids that are inputs may be the same twice in a row."""
    prepare: Callable[[Any], None] = lambda m: None
    """Something that is done to the finished module."""
    positive: bool | None = True
    """True: must be rewritten. False: must be left alone. None: either, but the result must be right."""
    differs: bool = True
    """Of a near miss: it computes something else than the op does."""
    linears: bool = False
    """Of a near miss: its matmuls are of one expert each, and each may be rewritten by itself."""
    core: bool = False
    """Also compiled by Inductor, and exported."""

    @property
    def roundings(self) -> int:
        """Of results of the op, and of what they are added to."""
        return self.layers + (self.around is not None or self.exact_around is not None)

    def make(self, dtype: torch.dtype) -> Any:
        """The module, the same every time."""
        g = torch.Generator().manual_seed(0)
        layers = [Experts(self, dtype, g) for _ in range(self.layers)]
        module = layers[0] if self.layers == 1 else Layers(layers)
        self.prepare(module)
        return module

    def capture(self) -> contextlib.AbstractContextManager[Any]:
        return torch._dynamo.config.patch(capture_dynamic_output_shape_ops=self.unbacked)


ZOO: list[Case] = []


def case(name: str, form: Form, **fields: Any) -> None:
    """Registers a spelling that must be rewritten."""
    ZOO.append(Case(name, form, **{"format": default(), **fields}))


def miss(name: str, form: Form, **fields: Any) -> None:
    """Registers a near miss that must be left alone."""
    case(name, form, positive=False, **fields)


def either(name: str, form: Form, **fields: Any) -> None:
    """Registers what may be rewritten or left alone."""
    case(name, form, positive=None, **fields)


def default() -> Format:
    from zoo_moe.formats import COMPRESSED_TENSORS

    return COMPRESSED_TENSORS


class Stored(nn.Module):
    """Weights in a format, as buffers, and dequantised in every forward."""

    def __init__(self, format: Format, weights: dict[str, Weight]) -> None:
        super().__init__()
        self.format = format
        self.N = {name: w.codes.shape[-2] for name, w in weights.items()}
        self.group = {name: w.group for name, w in weights.items()}
        self.fields: dict[str, list[str]] = {}
        for name, weight in weights.items():
            stored = format.store(weight)
            self.fields[name] = list(stored)
            for field, tensor in stored.items():
                self.register_buffer(f"{name}_{field}", tensor.contiguous())
            self.register_buffer(f"{name}_bias", weight.bias)

    def raw(self, name: str, ids: Tensor | None = None) -> Tensor:
        """The weight as its format reads it, of all experts or (selected before dequantisation) those of ids [*]."""
        stored = {field: getattr(self, f"{name}_{field}") for field in self.fields[name]}
        if ids is not None:
            stored = {field: tensor[ids] for field, tensor in stored.items()}
        return self.format.read(stored, self.N[name], self.group[name])

    def nk(self, name: str, ids: Tensor | None = None) -> Tensor:
        """[*, N, K]."""
        raw = self.raw(name, ids)
        return raw.transpose(-2, -1) if self.format.kn else raw

    def kn(self, name: str, ids: Tensor | None = None) -> Tensor:
        """[*, K, N]."""
        raw = self.raw(name, ids)
        return raw if self.format.kn else raw.transpose(-2, -1)

    def biased(self, name: str, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """y with the bias of all experts [E, N], or of those of ids [*], or of the one whose weights these are."""
        bias: Tensor | None = getattr(self, f"{name}_bias")
        if bias is None:
            return y
        return y + (bias if ids is None else bias[ids])


class Experts(Stored):
    """A case's module: the routed experts, and what is around them."""

    def __init__(self, case: Case, dtype: torch.dtype, g: torch.Generator) -> None:
        E, H, I = case.E, case.H, case.I  # noqa: E741
        gate, up, down = (
            Weight.draw(E, N, K, case.group, spread, dtype, case.bias, g)
            for N, K, spread in ((I, H, case.mlp.spread), (I, H, case.mlp.spread), (H, I, 1.0))
        )
        weights = {**case.mlp.arrange(gate, up), "w2": down}
        super().__init__(case.format, {} if case.separate else weights)
        if case.separate:
            each = ({name: weight[e] for name, weight in weights.items()} for e in range(E))
            self.experts = nn.ModuleList(Stored(case.format, of_expert) for of_expert in each)
        self.case, self.E, self.k, self.H, self.dtype = case, E, case.k, H, dtype
        self.exact = {name: case.format.exact(w) for name, w in (("gate", gate), ("up", up), ("w2", down))}
        self.exact_bias = {name: w.bias for name, w in (("gate", gate), ("up", up), ("w2", down))}

        def dense(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=g).to(dtype) / shape[-1] ** 0.5, requires_grad=False)

        self.router, self.correction = dense(E, H), dense(E)
        self.shared_up, self.shared_down = dense(2 * I, H), dense(H, I)

    def forward(self, x: Tensor, *routing: Tensor) -> Any:
        flat = x.view(-1, self.H) if self.case.batched else x
        ids, weights = self.case.route(self, flat) if self.case.route else routing
        # Inputs of their own could be longer than x, for all that a graph with symbolic sizes knows.
        assert self.case.loose or ids.shape[0] == weights.shape[0] == flat.shape[0]
        y = self.case.form(self, flat, ids, weights)
        y = self.case.around(self, flat, y) if self.case.around else y
        return y.view(x.shape) if self.case.batched else y

    def shared(self, x: Tensor) -> Tensor:
        """A dense expert that every token goes through, in the module's dtype: its roundings stay what they are."""
        gate, up = F.linear(x.to(self.dtype), self.shared_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.shared_down).to(x.dtype)

    def expected(self, x: Tensor, *routing: Tensor) -> Tensor:
        """What forward computes, in float64, from the router's own ids and weights."""
        flat = x.reshape(-1, self.H)
        ids, weights = self.case.route(self, flat) if self.case.route else routing
        ids = ids.reshape(len(flat), -1).long()
        weights = self.case.exact_weights(weights).reshape(ids.shape).double()
        y = sum(self._through(flat.double(), ids[:, j], weights[:, j, None]) for j in range(ids.shape[1]))
        around = self.case.exact_around or self.case.around
        return (around(self, flat.double(), y) if around else y).view(x.shape)

    def _through(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """float64 [T, H]: every token through one expert, with its weight."""
        x = x * weights if self.case.on_input else x
        h = self.case.mlp.exact(self._project("gate", x, ids), self._project("up", x, ids))
        y = self._project("w2", h, ids)
        return y if self.case.on_input else y * weights

    def mlp(self, project: Callable[[str], Tensor]) -> Tensor:
        """act(h), as the case spells it."""
        return self.case.mlp.forward(project)

    def _project(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        y = torch.einsum("tk,tnk->tn", x, self.exact[name][ids])
        bias = self.exact_bias[name]
        return y if bias is None else y + bias.double()[ids]


class Layers(nn.Module):
    """Residual layers, one after another."""

    def __init__(self, layers: list[Experts]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.case = layers[0].case

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x

    def expected(self, x: Tensor) -> Tensor:
        exact = x.double()
        for layer in self.layers:
            exact = exact + layer.expected(exact.to(x.dtype))
        return exact


def inputs(case: Case, dtype: torch.dtype, T: int) -> tuple[Tensor, ...]:
    """What the module is called with, for T tokens: x; and ids int64 [T, k] and weights [T, k] if they are inputs."""
    # With these numbers the roundings that the op owes stay well within their limits, even of a single token.
    g = torch.Generator().manual_seed(T + 40)
    x = (case.scale * torch.randn(T, case.H, generator=g)).to(dtype)
    x = x.view(1, T, case.H) if case.batched else x
    if case.route:
        return (x,)
    ids = torch.stack([torch.randperm(case.E, generator=g)[: case.k] for _ in range(T)])
    if case.repeats:
        ids[::2] = ids[::2, :1]
    weights = torch.rand(T, case.k, generator=g) + 0.1
    if case.signed:
        weights *= torch.randint(2, weights.shape, generator=g) * 2 - 1
    return x, ids, weights.to(dtype)
