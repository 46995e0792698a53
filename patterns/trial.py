"""Trials: a region run on made-up inputs and made-up expert weights, in a precision in which equal means equal.

Every float in the region becomes float64 (float32 where that would be too large), casts included, so that what is left
is what the region means, without its rounding. The made-up experts share one buffer: expert e is the same numbers as
expert 0, shifted, which costs no memory and still is another matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from inductor_ext.patterns.anchors import meta, name
from inductor_ext.patterns.experts import Cut
from inductor_ext.patterns.flow import Flow
from inductor_ext.patterns.region import Region
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

_BYTES, _PRODUCTS = 1 << 29, 1 << 29
"""How large a trial may be: gathered weights in float64, and multiplications, from which on fewer rows are tried."""
_ROWS = (131, 33, 9, 3)
SCALES = (1.0, 0.03, 30.0, 1000.0, 4.0)
"""Of the rows of x, in turn: what happens to small and to large values only must show."""
Sizes = Mapping[sympy.Symbol, int]
MadeUp = dict[tuple[int, int, int, int, torch.dtype], Tensor]
"""Matrices [E, rows, cols], by a cut's place, those sizes and their dtype."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One trial's inputs, with rows and choices flattened."""

    x: Tensor
    """[T, H]"""
    ids: Tensor
    """int64 [T, k]"""
    weights: Tensor
    """[T, k]"""
    base: Tensor
    """[T, H], zeros if the region has none."""
    biases: tuple[Tensor, ...]
    """[E, n], as Region.biases has them."""
    matrices: tuple[Tensor, ...]
    """[E, rows, cols], as each of Region.cuts has them."""

    def rows(self, some: slice) -> Inputs:
        """Some tokens alone."""
        return dataclasses.replace(
            self, x=self.x[some], ids=self.ids[some], weights=self.weights[some], base=self.base[some]
        )


class Trial:
    """A region with sizes and a precision chosen for running it."""

    def __init__(self, region: Region, values: Callable[[fx.Node], Tensor | None], made: MadeUp) -> None:
        self.region, self._values, self._made = region, values, made
        self.random = torch.Generator().manual_seed(0x6D6F65)
        for rows in _ROWS:
            self.sizes = _sizes(region, rows)
            pairs = self._numel(region.ids) * sum(math.prod(cut.matrix) for cut in region.cuts)
            if pairs <= _PRODUCTS and (8 * pairs <= _BYTES or not region.gathers):
                break
        self.dtype = torch.float32 if region.gathers and 8 * pairs > _BYTES else torch.float64

    @functools.cached_property
    def matrices(self) -> tuple[Tensor, ...]:
        """Made when they are first needed (most candidates fail before), and once for all trials of such sizes."""
        return tuple(self._made_up(place, cut) for place, cut in enumerate(self.region.cuts))

    @property
    def tokens(self) -> int:
        """T."""
        return self._numel(self.region.x) // self.region.hidden

    @property
    def tolerance(self) -> float:
        """Of the relative error, from sums in another order."""
        return 1e-10 if self.dtype == torch.float64 else 3e-5

    def inputs(self, ids: Tensor, turn: int = 0) -> Inputs:
        region, shape = self.region, self.shape(self.region.x)
        T = math.prod(shape[:-1])
        base = self._normal(T, shape[-1]) if region.base is not None else torch.zeros(T, shape[-1], dtype=self.dtype)
        biases = tuple(self._normal(region.experts, self.shape(bias[0])[-1]) for bias in region.biases)
        scales = torch.tensor([SCALES[(t + turn) % len(SCALES)] for t in range(T)], dtype=self.dtype)
        x, weights = scales.unsqueeze(-1) * self._normal(T, shape[-1]), self._normal(*ids.shape)
        return Inputs(x, ids, weights, base, biases, self.matrices)

    def run(self, given: Inputs) -> Tensor:
        """What the region gives, as [T, H]. Raises whatever the user's operations raise."""
        r = self.region
        weights = given.weights
        if r.dense:
            scores = torch.zeros(given.ids.shape[0], r.experts, dtype=self.dtype)
            weights = scores.scatter(1, given.ids, weights)
        env: dict[fx.Node, Any] = {}
        of = dict(zip(r.cuts, given.matrices, strict=True))
        for cut, matrices in of.items():
            env |= zip(cut.nodes, matrices, strict=True) if cut.apart else {cut.nodes[0]: matrices}
        for node, value in ((r.x, given.x), (r.ids, given.ids), (r.weights, weights), (r.base, given.base)):
            if node is not None:
                env[node] = value.reshape(self.shape(node)).to(self._as(node)).clone()
        for bias, rows in zip(r.biases, given.biases, strict=True):
            env |= zip(bias, rows, strict=True) if len(bias) > 1 else {bias[0]: rows}
        chosen = {cut.nodes[0]: cut for cut in r.cuts if cut.select is not None}
        with _disable_current_modes(), torch.no_grad():
            for node in r.constants:
                env[node] = self._widened(self._values(node))
            for node in r.nodes:
                if node in chosen:
                    cut = chosen[node]
                    assert cut.select is not None
                    env[node] = of[cut][env[cut.select].long()]
                else:
                    env[node] = self.evaluate(node, env)
        result: Tensor = env[r.out]
        return result.reshape(given.x.shape).to(self.dtype)

    def evaluate(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """One node's value, with every float dtype in its arguments widened: rounding does nothing then."""
        if name(node) == "round_to_fp8" and isinstance(node.args[0], fx.Node):
            return env[node.args[0]]

        def value(n: fx.Node) -> Any:
            return env[n] if n in env else self.size(meta(n))

        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        args, kwargs = self._wide((args, kwargs))
        if name(node) in _ELSEWHERE:
            return _ELSEWHERE[name(node)](*args, **kwargs)
        if node.op == "call_method":
            if node.target in _CASTS:
                return args[0].to(self.dtype)
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def size(self, value: Any) -> Any:
        """A size as a number."""
        return int(value.node.expr.subs(self.sizes)) if isinstance(value, torch.SymInt) else value

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.size(s) for s in meta(node).shape)

    def _numel(self, node: fx.Node) -> int:
        return math.prod(self.shape(node))

    def _as(self, node: fx.Node) -> torch.dtype:
        dtype: torch.dtype = meta(node).dtype
        return self.dtype if dtype.is_floating_point else dtype

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def _widened(self, value: Tensor | None) -> Tensor | None:
        return (
            value.cpu().to(self.dtype)
            if value is not None and value.dtype.is_floating_point
            else (None if value is None else value.cpu())
        )

    def _made_up(self, place: int, cut: Cut) -> Tensor:
        rows, cols = cut.matrix
        shift, key = 7, (place, rows, cols, cut.experts, self.dtype)
        if key not in self._made:
            buffer = self._normal(rows * cols + shift * cut.experts) * min(rows, cols) ** -0.5
            self._made[key] = buffer.as_strided((cut.experts, rows, cols), (shift, cols, 1))
        return self._made[key]

    def _wide(self, argument: Any) -> Any:
        if isinstance(argument, torch.dtype) and argument.is_floating_point:
            return self.dtype
        if isinstance(argument, torch.device):
            return torch.device("cpu")
        if isinstance(argument, (tuple, list)):
            return type(argument)(self._wide(a) for a in argument)
        return {k: self._wide(v) for k, v in argument.items()} if isinstance(argument, dict) else argument


_CASTS = {"float", "half", "bfloat16", "double"}


def _grouped(x: Tensor, matrices: Tensor, offs: Tensor, bias: None = None, out_dtype: Any = None) -> Tensor:
    """x [S, K] by matrices [E, K, N]: rows up to offs[0] by the first, up to offs[1] by the second, ... Rows beyond the
    last offset have no value."""
    if bias is not None or x.dim() != 2 or matrices.dim() != 3:
        raise NotImplementedError("grouped_mm with a bias, or other than 2-D by 3-D")
    out = torch.full((x.shape[0], matrices.shape[2]), torch.nan, dtype=x.dtype)
    start = 0
    for matrix, end in zip(matrices, offs.tolist(), strict=True):
        out[start:end] = x[start:end] @ matrix
        start = max(start, end)
    return out


def _histc(input: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    counts = torch.histc(input.double(), bins, min, max)
    return counts if input.is_floating_point() else counts.to(input.dtype)


_ELSEWHERE: dict[str, Callable[..., Tensor]] = {
    "histc": _histc,
    "_grouped_mm": _grouped,
    "grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
}
"""What runs on GPUs on dtypes, or at all, that it does not on the CPU: integers are counted there."""


def _sizes(region: Region, rows: int) -> Sizes:
    """A number for every size that can change: the rows for the first, 2 for the others."""
    symbols: dict[sympy.Symbol, None] = {}
    for node in (*region.inputs, *(cut.select for cut in region.cuts if cut.select is not None)):
        for size in meta(node).shape:
            if isinstance(size, torch.SymInt):
                symbols |= dict.fromkeys(sorted(size.node.expr.free_symbols, key=str))
    return {symbol: rows if i == 0 else 2 for i, symbol in enumerate(symbols)}


def stray_scores(region: Region, flow: Flow, trial: Trial) -> bool:
    """Whether scores [T, E] can be other than zero for an expert that was not chosen.

    They are computed from the ids and from made-up values for everything that does not depend on these.
    """
    ahead = flow.ahead([region.ids])
    if region.weights not in ahead:
        return True
    behind = flow.behind([region.weights], lambda n: n is region.ids or (n not in ahead and name(n) not in _CONSTANT))
    if any(name(n) in _BEFORE_A_ROUTER for n in behind):
        return True  # tokens or positions, of which a whole layer was computed on the way to the scores
    edge = {p for n in behind for p in flow.preds(n) if p not in behind and p is not region.ids}
    for _ in range(3):
        ids = routings(trial, repeats=False)[-1]
        env: dict[fx.Node, Any] = {region.ids: ids.reshape(trial.shape(region.ids)).to(meta(region.ids).dtype)}
        for node in edge:
            value = meta(node)
            if isinstance(value, Tensor):
                if not value.dtype.is_floating_point:
                    return True
                env[node] = 4 * trial._normal(*trial.shape(node))
        try:
            with _disable_current_modes(), torch.no_grad():
                for node in sorted(behind):
                    env[node] = trial.evaluate(node, env)
        except Exception:  # the user's operations, on values they were not written for
            return True
        scores = env[region.weights].reshape(-1, region.experts)
        if bool(scores.scatter(1, ids, 0.0).any()):
            return True
    return False


_BEFORE_A_ROUTER = {"linear", "embedding"}
_CONSTANT = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "ones", "ones_like", "arange"}


def beyond(ids: Tensor, experts: int) -> Tensor:
    """A routing with every second choice of an expert that there is not."""
    found = ids.clone()
    found.view(-1)[::2] = experts
    return found


def routings(trial: Trial, repeats: bool) -> list[Tensor]:
    """int64 [T, k] each. Different experts in every row, until every expert was chosen; the same experts in every row;
    and, if a row may repeat an expert, all rows to one expert."""
    region = trial.region
    T, E, k = trial.tokens, region.experts, region.top_k
    order = torch.randperm(E, generator=trial.random)
    found = [order[torch.arange(start, start + T * k) % E].view(T, k) for start in range(0, E, T * k)]
    alike = torch.randperm(E, generator=trial.random)[:k].expand(T, k).contiguous()
    return [*found, *([torch.full((T, k), E - 1)] if repeats else []), alike]
