"""Kernels by name. A kernel is a module: what it rejects and why, its layout, packing, launch (see ``Kernel``)."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from inductor_ext.formats import PackedInt, PackedMxfp4
from inductor_ext.kernels import table


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a linear kernel is asked to compute, as plain data: a kernel is chosen from this alone, so any device can be
    simulated."""

    op: str
    """"linear", or "linear_mxfp4": scales are e8m0 bytes (uint8), groups 32, the last maybe short, and zeros none."""
    device: str
    """The torch device type: "cpu", "cuda" (NVIDIA and AMD), ..."""
    arch: str
    """"x86_64", "aarch64", "sm_90", "gfx1100", ..."""
    dtype: torch.dtype
    """Of the activations and the result."""
    scale_dtype: torch.dtype
    N: int
    K: int
    group_size: int
    zeros: str
    """"none" (constant: 8, or 128 of 8 bits), "int" or "float"."""
    order: bool
    """Act-order: columns are stored permuted."""
    bias: bool
    codes: str = "int4"
    """Or "int8", or "mxfp4" with that op."""

    @property
    def bits(self) -> int:
        return _bits(self.codes)

    def __str__(self) -> str:
        extras = [f"{self.zeros} zeros"] if self.zeros != "none" else ["symmetric"]
        extras = ["MXFP4"] if self.op == "linear_mxfp4" else extras
        extras += ["act-order"] if self.order else []
        extras += ["bias"] if self.bias else []
        extras += ["int8"] if self.codes == "int8" else []
        return f"N={self.N} K={self.K} G={self.group_size} {_short(self.dtype)}, {', '.join(extras)}"


@dataclasses.dataclass(frozen=True)
class WeightKind:
    """How the experts' weights of one projection are quantised."""

    scale_dtype: torch.dtype
    group_size: int
    zeros: str
    """"none" (constant: 8, or 128 of 8 bits), "int" or "float"."""
    codes: str = "int4"
    """Or "int8"; or "mxfp4": then the scales are e8m0 bytes (uint8), groups are 32 and the last may be short, zeros are
    none."""
    order: bool = False
    """Act-order: columns are stored permuted."""

    @property
    def bits(self) -> int:
        return _bits(self.codes)


@dataclasses.dataclass(frozen=True)
class Mlp:
    """What every expert computes between its two projections, and where the router's weight goes in.

    With h = W13 x (+ b13): y = W2 act(h) (+ b2), and the token's result is the sum over its experts of weight * y.
    """

    activation: str = "silu"
    """"silu", "gelu" (exact), "gelu_tanh", "relu": act(gate) * up, or act(h) without a gate. "swigluoai": gate clamped
    to <= limit, up to -limit..limit, then (up + 1) * gate * sigmoid(alpha * gate), as gpt-oss has it."""
    gate_up: str = "halves"
    """Rows of W13: "halves" (all gates, then all ups), "interleaved" (gate 0, up 0, gate 1, ...), "none" (no gate: W13
    has I rows)."""
    alpha: float = 1.702
    limit: float | None = None
    """Of swigluoai; None does not clamp."""
    apply_router_weight_on_input: bool = False
    """x is multiplied by the router's weight before W13, and y is not."""
    routed_scaling: float = 1.0
    """Multiplies the result."""


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "swigluoai")
GATE_UP = ("halves", "interleaved", "none")


@dataclasses.dataclass(frozen=True)
class MoeProblem:
    """What a kernel for routed experts is asked to compute, as plain data."""

    device: str
    arch: str
    dtype: torch.dtype
    """Of the activations and the result."""
    E: int
    """Experts that have weights here."""
    top_k: int
    H: int
    """Hidden size: K of w13, N of w2."""
    I: int  # noqa: E741  the field's name
    """Intermediate size: K of w2; w13 has 2 I rows, or I without a gate."""
    w13: WeightKind
    w2: WeightKind
    mlp: Mlp
    bias: bool
    expert_map: bool
    op: str = "moe"
    """Or "moe_mxfp4", for weights of such codes."""
    batched: bool = False
    """Tokens come as [E, tokens, H], already sent to their experts, not as [T, H] with ids."""
    fp8: bool = False
    """Of moe_mxfp4: activations are rounded to fp8 by given scales before each projection (W4A8)."""

    @property
    def bits(self) -> int:
        return self.w13.bits

    def __str__(self) -> str:
        zeros = {w.zeros for w in (self.w13, self.w2)} - {"none"}
        extras = [f"{kind} zeros" for kind in sorted(zeros)] or ["symmetric"]
        extras = ["MXFP4", *(["fp8 activations"] if self.fp8 else [])] if self.op == "moe_mxfp4" else extras
        extras += [self.mlp.activation + ("" if self.mlp.gate_up == "halves" else f" ({self.mlp.gate_up})")]
        extras += ["bias"] if self.bias else []
        extras += ["expert_map"] if self.expert_map else []
        extras += ["weighted input"] if self.mlp.apply_router_weight_on_input else []
        extras += ["act-order"] if self.w13.order or self.w2.order else []
        extras += ["int8"] if self.w13.codes == "int8" else []
        extras += ["batched by expert"] if self.batched else []
        sizes = dict.fromkeys((self.w13.group_size, self.w2.group_size))
        return (
            f"E={self.E} top_k={self.top_k} H={self.H} I={self.I} G={'/'.join(map(str, sizes))}"
            f" {_short(self.dtype)}, {', '.join(extras)}"
        )


def _bits(codes: str) -> int:
    return 8 if codes == "int8" else 4


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Packed(NamedTuple):
    """A weight in a kernel's own layout: the tensor arguments of ``w4a16::linear`` after x.

    For the experts of ``w4a16::moe`` each has one more dimension in front, E, and there is no order.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None


class Expected(NamedTuple):
    """What one tensor of a layout must be."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class Layout(NamedTuple):
    """What the tensors of a ``Packed`` must be; zeros and order, if they are there."""

    qweight: Expected
    scales: Expected
    zeros: Expected
    order: Expected


class Kernel(Protocol):
    """The functions that a kernel module has."""

    NAME: str

    def usable(self) -> str | None:
        """Why this process cannot run the kernel at all (not built, no device), or None."""

    def reject(self, problem: Problem) -> str | None:
        """Why the kernel cannot compute this problem, as a sentence; None if it can."""

    def pack(self, canonical: PackedInt) -> Packed:
        """The kernel's layout of a weight. Tensors that need no change are passed through, not copied."""

    def unpack(self, packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
        """The inverse of pack, without loss, for a weight [N, K]."""

    def layout(self, packed: Packed, N: int, K: int, group_size: int) -> Layout:
        """What the tensors of a weight [N, K] must be, for the op's door. Raises ValueError, with a sentence, if the
        layout cannot hold such a weight."""

    def run(self, x: Tensor, packed: Packed, bias: Tensor | None, N: int, group_size: int) -> Tensor:
        """x [M, K] contiguous -> [M, N] in x's dtype, accumulated in float32 and rounded once; or what torch's own
        matmul gives, where the weight is dequantised for it."""


class Routing(NamedTuple):
    """Which experts each token goes to: arguments of ``w4a16::moe`` as they were given."""

    topk_weights: Tensor
    """[T, k], float32, float16 or bfloat16; any strides."""
    topk_ids: Tensor
    """[T, k], int32 or int64; any strides."""
    expert_map: Tensor | None
    """int32 [number]: id -> row of the weights, or -1."""
    number: int
    """Of ids."""


class MoeKernel(Protocol):
    """The functions that a kernel module for routed experts has. One that has w13 in another layout than w2 has
    ``pack_w13`` and ``unpack_w13`` as well."""

    NAME: str
    CHECKS_WEIGHTS: bool
    """run itself raises RuntimeError for weights and biases that are not as they must be. The op leaves it to it: in
    Python, at every call, the check takes a noticeable part of a call with one token."""

    def usable(self) -> str | None:
        """As Kernel.usable."""

    def reject(self, problem: MoeProblem) -> str | None:
        """As Kernel.reject."""

    def pack(self, canonical: PackedInt, experts: int) -> Packed:
        """The kernel's layout of one projection. ``canonical`` has the rows of all experts, one expert after the other:
        codes [E*N, K/8]."""

    def unpack(self, packed: Packed, N: int, K: int, group_size: int) -> PackedInt:
        """The inverse of pack, without loss, for weights [E, N, K]."""

    def layout(self, packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout:
        """As Kernel.layout, for weights [E, N, K]."""

    def run(
        self,
        x: Tensor,
        routing: Routing,
        w13: Packed,
        w2: Packed,
        w13_bias: Tensor | None,
        w2_bias: Tensor | None,
        mlp: Mlp,
        intermediate_size: int,
        group_sizes: tuple[int, int],
    ) -> Tensor:
        """x [T, H] contiguous -> [T, H] in x's dtype.

        A choice of nobody (-1, or mapped to it) contributes nothing, whatever its weight; so does an id without a
        weight on a GPU, which on the CPU raises RuntimeError. Accumulated in float32 in a fixed order; only act(h), and
        with very many tokens each choice's result, may be rounded to x's dtype on the way.
        """


class Mxfp4Kernel(Protocol):
    """The functions that a kernel module for routed experts with MXFP4 weights has, for ``w4a16::moe_mxfp4`` (W4A16)
    and ``w4a16::moe_gemm_a8w4`` (W4A8). As MoeKernel's, with these differences."""

    NAME: str
    CHECKS_WEIGHTS: bool

    def usable(self) -> str | None: ...

    def reject(self, problem: MoeProblem) -> str | None:
        """H and I are any even numbers. What a kernel needs beyond that it pads itself, in ``pack`` or as it runs."""

    def pack(self, canonical: PackedMxfp4, experts: int) -> Packed:
        """codes [E*N, K/2], scales [E*N, ceil(K / 32)] -> Packed(qweight, scales, None, None), E in front."""

    def unpack(self, packed: Packed, N: int, K: int, group_size: int) -> PackedMxfp4:
        """The inverse of pack, without loss: codes [E*N, K/2]. The group size is always 32."""

    def layout(self, packed: Packed, E: int, N: int, K: int, group_size: int) -> Layout: ...

    def run(
        self,
        x: Tensor,
        routing: Routing,
        w13: Packed,
        w2: Packed,
        w13_bias: Tensor | None,
        w2_bias: Tensor | None,
        mlp: Mlp,
        intermediate_size: int,
        input_scales: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """x [T, H] contiguous -> [T, H] in x's dtype.

        input_scales: None is W4A16, and then all is as MoeKernel.run says. Else float32 scalars (any shape of one
        element, on x's device: a GPU need not wait for their values) (s1, s2), and it computes

            h = s1 * (fp8(x / s1) W13^T) + b13;  a = act(h);  y = s2 * (fp8(a / s2) W2^T) + b2

        where fp8 is fp8.to_fp8 (e4m3, saturating, NaN stays NaN), a is not rounded before it, products are of the exact
        values and sums are float32. With apply_router_weight_on_input x is multiplied by the weight before it is
        rounded to fp8.
        """


def check_name(name: str) -> None:
    """Raises ValueError, naming the known ones, if no op has a kernel of this name."""
    if name not in table.names():
        raise ValueError(f"There is no kernel {name!r}; the kernels are {', '.join(table.names())}.")


def load(name: str) -> Kernel:
    """The module of this name for ``w4a16::linear``. Raises as load_for."""
    return cast(Kernel, load_for("linear", name))


def load_moe(name: str) -> MoeKernel:
    """The module of this name for ``w4a16::moe``. Raises as load_for."""
    return cast(MoeKernel, load_for("moe", name))


def pack_experts(
    kernel: MoeKernel | Mxfp4Kernel, canonical: PackedInt | PackedMxfp4, experts: int, w13: bool
) -> Packed:
    """One projection in the kernel's layout. A kernel that has another layout for w13 has a ``pack_w13`` as well."""
    pack: Any = getattr(kernel, "pack_w13", kernel.pack) if w13 else kernel.pack
    packed: Packed = pack(canonical, experts)
    return packed


def unpack_experts(kernel: MoeKernel, packed: Packed, N: int, K: int, group_size: int, w13: bool) -> PackedInt:
    """The inverse, by ``unpack_w13`` likewise."""
    unpack = getattr(kernel, "unpack_w13", kernel.unpack) if w13 else kernel.unpack
    canonical: PackedInt = unpack(packed, N, K, group_size)
    return canonical


def load_linear_mxfp4(name: str) -> Any:
    """The module of this name for ``w4a16::linear_mxfp4``: a Kernel, but of PackedMxfp4. Raises as load_for."""
    return load_for("linear_mxfp4", name)


def load_mxfp4(name: str) -> Mxfp4Kernel:
    """The module of this name for ``w4a16::moe_mxfp4`` and ``w4a16::moe_gemm_a8w4``. Raises as load_for."""
    return cast(Mxfp4Kernel, load_for("moe_mxfp4", name))


@functools.cache
def load_for(op: str, name: str) -> Any:
    """The kernel module of this name for this op. Raises ValueError, naming the known ones, if there is none."""
    check_name(name)
    known = table.rows(op)
    if name not in known:
        raise ValueError(f"There is no kernel {name!r} for {op}; its kernels are {', '.join(sorted(known))}.")
    return importlib.import_module(known[name].module)


def why_unusable(op: str, name: str) -> str | None:
    """Why this process cannot run the kernel of this name for this op; None if it can."""
    try:
        reason: str | None = load_for(op, name).usable()
    except Exception as error:  # one kernel that does not load must not be in the way of the others
        return f"does not load: {type(error).__name__}: {error}"
    return reason
