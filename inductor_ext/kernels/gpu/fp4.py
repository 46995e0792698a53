"""MXFP4 codes and scales to numbers, in Triton. The layout is that of ``fp4_planes.py``.

An e2m1 code is a sign and three bits: the last two of an exponent and the first of a mantissa. Put where bfloat16 (or
float16) has these, they are the code's value times 2**-126 (2**-14), also that of the half, which has no exponent. So
one multiplication makes the number, and with bfloat16 it is the scale's too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from inductor_ext.kernels.gpu.fp4_planes import BITS


def ptx(low: int, fma: str, factor: str, factors: tuple[str, ...] = ("factor",) * 4) -> str:
    """Of two words in $4, the numbers of each plane in $0..$3. The three bits of a code go to ``low`` and up, and the
    result is multiplied by ``factor``, or the plane's own: minus zero is what can be added to a zero of any sign."""
    lines = [".reg .b32 sign, factor, nothing;", f"mov.b32 factor, {factor};", "mov.b32 nothing, 0x80008000;"]
    for plane, (bits, sign) in enumerate(BITS):
        lines.append(_shifted(f"${plane}", low - bits))
        if low - bits == 15 - sign:  # one mask for both
            lines.append(f"and.b32 ${plane}, ${plane}, {_twice(0x8000 | 7 << low)};")
        else:
            lines += [_shifted("sign", 15 - sign), "and.b32 sign, sign, 0x80008000;"]
            lines.append(f"lop3.b32 ${plane}, ${plane}, {_twice(7 << low)}, sign, 0xea;")
        lines.append(f"{fma} ${plane}, ${plane}, {factors[plane]}, nothing;")
    return "\n".join(["{", *lines, "}"])


def _shifted(to: str, by: int) -> str:
    """Neighbours' bits come in at an end, where no mask has any."""
    return f"shl.b32 {to}, $4, {by};" if by >= 0 else f"shr.b32 {to}, $4, {-by};"


def _twice(half: int) -> str:
    return f"0x{half:04x}{half:04x}"


BFLOAT16 = ptx(6, "fma.rn.bf16x2", "0x7e807e80")  # 2**126
FLOAT16 = ptx(9, "fma.rn.f16x2", "0x74007400")  # 2**14
SCALED = ptx(6, "fma.rn.bf16x2", "0", ("$5", "$7", "$9", "$11"))  # each stands in two registers, for two words

# The four bytes of a word, plus 126, as exponents of bfloat16, each twice: 2**126 times the scales.
FACTORS = """
{
.reg .b32 exponents;
add.u32 exponents, $4, 0x7e7e7e7e;
prmt.b32 $0, exponents, 0, 0x0404;
prmt.b32 $1, exponents, 0, 0x1414;
prmt.b32 $2, exponents, 0, 0x2424;
prmt.b32 $3, exponents, 0, 0x3434;
shr.b32 $0, $0, 1;
shr.b32 $1, $1, 1;
shr.b32 $2, $2, 1;
shr.b32 $3, $3, 1;
}
"""
_FACTORS: tl.constexpr = tl.constexpr(FACTORS)
_BFLOAT16: tl.constexpr = tl.constexpr(BFLOAT16)
_FLOAT16: tl.constexpr = tl.constexpr(FLOAT16)
_SCALED: tl.constexpr = tl.constexpr(SCALED)

_A: tl.constexpr = tl.constexpr(BITS[0])
_B: tl.constexpr = tl.constexpr(BITS[1])
_C: tl.constexpr = tl.constexpr(BITS[2])
_D: tl.constexpr = tl.constexpr(BITS[3])


@triton.jit
def scaled_planes(w, scales):
    """int16 [R, C] and int32 [R] of four scales each -> four tensors [R, C] of scaled values in bfloat16. PTX alone."""
    e, f, g, h = tl.inline_asm_elementwise(
        _FACTORS, "=&r,=&r,=&r,=&r,r", [scales], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        _SCALED,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [w, e[:, None], f[:, None], g[:, None], h[:, None]],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def planes(w, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 [..] -> four tensors [..] of values without their scales, in dtype."""
    if PTX:
        if dtype == tl.float16:
            a, b, c, d = tl.inline_asm_elementwise(
                _FLOAT16,
                "=&r,=&r,=&r,=&r,r",
                [w],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _BFLOAT16,
                "=&r,=&r,=&r,=&r,r",
                [w],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
    else:
        a, b, c, d = _plane(w, _A, dtype), _plane(w, _B, dtype), _plane(w, _C, dtype), _plane(w, _D, dtype)
    return a, b, c, d


@triton.jit
def _plane(w, BITS: tl.constexpr, dtype: tl.constexpr):
    """By operations that AMD has for two 16-bit integers at once. A code from 1 on has the bits of its exponent and
    mantissa, as they are, above those of the half; below, the line through 0 and the half is the lower one."""
    HALF: tl.constexpr = 0x3800 if dtype == tl.float16 else 0x3F00
    STEP: tl.constexpr = 0x200 if dtype == tl.float16 else 0x40
    w = w.to(tl.uint16, bitcast=True)
    bits = (w << (13 - BITS[0])) >> 13
    magnitude = tl.minimum(bits * STEP + HALF, tl.minimum(bits, tl.full(w.shape, 2, tl.uint16)) * HALF)
    sign = (w >> BITS[1]) << 15
    return (magnitude + sign).to(dtype, bitcast=True)


@triton.jit
def e8m0(byte):
    """float32: 2 ** (byte - 127), of which the least has no exponent; the byte is not 255."""
    return tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to_e4m3(v):
    """float32 -> the nearest number of e4m3fn in float32, ties to even: 448 at most, and NaN stays NaN."""
    v = tl.where(v > 448.0, 448.0, tl.where(v < -448.0, -448.0, v))
    bits = v.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2**-6 there is no exponent: multiples of 2**-9, the distance of float32's numbers around 24576.
    rounded = tl.where(tl.abs(v) < 0.015625, (v + 24576.0) - 24576.0, rounded)
    return tl.where(v != v, v, rounded)
