"""The proof: the cone's value on the real stored tensors against the canonical form's, element by element.

Equal means equal bits under one of the rounding orders below, which are how people write ``(q - z) * s``. Under an
order we have not met it means: within each element's own rounding bound for the cone's dtype, and only where that bound
is a small fraction of one code step, so that codes and zeros are exact all the same. NaN equals NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inductor_ext.formats import Canonical, PackedInt4, PackedMxfp4
from inductor_ext.patterns.cone import Computes
from inductor_ext.patterns.mxfp4 import Mxfp4Reading
from inductor_ext.patterns.reading import NotCanonical, Reading


class NotProved(Exception):
    """Why the canonical form is not this weight. The message is a sentence."""


Order = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
"""(codes uint8, zeros, scales, dtype of the weight) -> weight. Codes and integer zeros are exact in every dtype met
here."""

ORDERS: dict[str, Order] = {
    "(q - z) * s": lambda q, z, s, dt: q.to(dt).sub_(z.to(dt)).mul_(s.to(dt)),
    "(q - z) * s, then cast": lambda q, z, s, dt: q.float().sub_(z.float()).mul_(s.float()).to(dt),
    "(q - z) * s in the scale's dtype, then cast": lambda q, z, s, dt: q.to(s.dtype).sub_(z.to(s.dtype)).mul_(s).to(dt),
    "q * s - z * s": lambda q, z, s, dt: q.to(dt).mul_(s.to(dt)).sub_(z.to(dt) * s.to(dt)),
    "q * s - z * s, then cast": lambda q, z, s, dt: q.float().mul_(s.float()).sub_(z.float() * s.float()).to(dt),
    "q * s - z * s, fused": lambda q, z, s, dt: (
        q.double().mul_(s.to(dt).double()).sub_((z.to(dt) * s.to(dt)).double()).to(dt)
    ),
}


def prove(program: Computes, values: Sequence[Tensor], reading: Reading | Mxfp4Reading) -> tuple[Canonical, str]:
    """The canonical form of the real stored tensors, and in words how it was proved equal to the cone. Raises
    NotProved."""
    with torch.no_grad():
        try:
            canonical = reading.canonical(values)
        except NotCanonical as error:
            raise NotProved(str(error)) from None
        weight = program.run(values).contiguous()
        if tuple(weight.shape) != (reading.N, reading.K):
            raise NotProved(f"it is {list(weight.shape)}, not [{reading.N}, {reading.K}]")
        return canonical, _compare(weight, canonical)


def _compare(weight: Tensor, canonical: Canonical) -> str:
    how = _compare_int4(weight, canonical) if isinstance(canonical, PackedInt4) else _compare_mxfp4(weight, canonical)
    return f"{how} in {str(weight.dtype).removeprefix('torch.')}, {weight.numel()} elements"


def _compare_mxfp4(weight: Tensor, canonical: PackedMxfp4) -> str:
    """The product is exact before it is rounded to the weight's dtype, so there is one order."""
    for rows, block in canonical.blocks():
        exact = block.dequantize(weight.dtype)
        if not _same(exact, weight[rows]):
            some = weight[rows]
            n, k = divmod(
                int(((exact != some) & ~(exact.isnan() & some.isnan())).flatten().int().argmax()), canonical.K
            )
            raise NotProved(
                f"on the real weights element ({rows.start + n}, {k}) is {float(some[n, k]):g} where MXFP4's codes and"
                f" scales give {float(exact[n, k]):g}"
            )
    return "bit-equal, e2m1 * 2^scale"


def _compare_int4(weight: Tensor, canonical: PackedInt4) -> str:
    for name, order in ORDERS.items():  # a wrong order fails in the first block
        if all(_same(_value(block, order, weight.dtype), weight[rows]) for rows, block in canonical.blocks()):
            how = f"bit-equal, {name}"
            break
    else:
        if not all(_within_bound(weight[rows], block) for rows, block in canonical.blocks()):
            raise NotProved(_first_difference(weight, canonical))
        how = "each element within its own rounding bound"
    return how


def _parts(block: PackedInt4) -> tuple[Tensor, Tensor, Tensor]:
    codes = block.stored_codes().view(block.N, -1, block.group_size)
    zeros = torch.tensor(8, device=codes.device) if block.zeros is None else block.zeros.unsqueeze(-1)
    return codes, zeros, block.scales.unsqueeze(-1)


def _value(block: PackedInt4, order: Order, dtype: torch.dtype) -> Tensor:
    codes, zeros, scales = _parts(block)
    return block.logical(order(codes, zeros, scales, dtype).view(block.N, block.K))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and (torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()))


def _within_bound(rows: Tensor, block: PackedInt4) -> bool:
    """|W - (q - z) s| <= u (|q s| + 2 |z s| + 2 |(q - z) s|), u being half a unit in the last place; and that is under
    a quarter step."""
    codes, zeros, scales = (t.double() for t in _parts(block))
    exact = (codes - zeros) * scales
    unit = torch.finfo(rows.dtype).eps / 2
    bound = (
        1.01 * unit * ((codes * scales).abs() + 2 * (zeros * scales).abs() + 2 * exact.abs())
        + torch.finfo(rows.dtype).tiny
    )
    error = (rows.double() - block.logical(exact.reshape(rows.shape))).abs()
    fine = block.logical((bound <= scales.abs() / 4).reshape(rows.shape)) & (
        error <= block.logical(bound.reshape(rows.shape))
    )
    return bool((fine | (rows == 0) & (error == 0)).all())


def _first_difference(weight: Tensor, canonical: PackedInt4) -> str:
    for rows, block in canonical.blocks():
        some, exact = weight[rows], block.dequantize(torch.float64)
        error = (some.double() - exact).abs().nan_to_num(torch.inf)
        limit = 4 * torch.finfo(weight.dtype).eps * exact.abs()
        if bool((error > limit).any()):
            n, k = divmod(int((error - limit).argmax()), canonical.K)
            return (
                f"on the real weights element ({rows.start + n}, {k}) is {float(some[n, k]):g}"
                f" where codes, scales and zeros give {float(exact[n, k]):g}"
            )
    return "on the real weights its rounding follows no order that is known and exceeds the bound of its dtype"
