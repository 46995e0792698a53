"""Codes to numbers, in Triton: the nibbles of a 16-bit word as four "planes" of exact code - zero, and scales and zeros
out of their pairs. The layout is that of ``planes.py``.

A nibble under the exponent of 1024 (float16) or 128 (bfloat16) is that number plus the code, and under that of 256 plus
twice the code. Two words share a register, so each instruction makes two codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Nibbles 1 and 3 of float16 are not shifted down: 1024 + 16 q, times 1/16. bfloat16 has no bits for that: every nibble
# is shifted down, to 256 + 2 q, times 1/2 (128 + q, times one, becomes a slower instruction). What is added to the four
# is in $5 to $8.
_FLOAT16 = """
{
.reg .b32 high, scale;
mov.b32 scale, 0x2c002c00;
shr.b32 high, $4, 8;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, high, 0x00f000f0, 0x64006400, 0xea;
add.f16x2 $0, $0, $5;
fma.rn.f16x2 $1, $1, scale, $6;
add.f16x2 $2, $2, $7;
fma.rn.f16x2 $3, $3, scale, $8;
}
"""
_BFLOAT16 = """
{
.reg .b32 second, third, fourth, half;
mov.b32 half, 0x3f003f00;
shr.b32 second, $4, 4;
shr.b32 third, $4, 8;
shr.b32 fourth, $4, 12;
lop3.b32 $0, $4, 0x000f000f, 0x43804380, 0xea;
lop3.b32 $1, second, 0x000f000f, 0x43804380, 0xea;
lop3.b32 $2, third, 0x000f000f, 0x43804380, 0xea;
lop3.b32 $3, fourth, 0x000f000f, 0x43804380, 0xea;
fma.rn.bf16x2 $0, $0, half, $5;
fma.rn.bf16x2 $1, $1, half, $6;
fma.rn.bf16x2 $2, $2, half, $7;
fma.rn.bf16x2 $3, $3, half, $8;
}
"""


def _less_8(asm: str, *offsets: int) -> str:
    """The same with constants for $5 to $8, of which ptxas makes faster code."""
    registers = [f".reg .b32 less{i};\nmov.b32 less{i}, {bits:#x};\n" for i, bits in enumerate(offsets)]
    for i in range(len(offsets)):
        asm = asm.replace(f"${5 + i}", f"less{i}")
    return asm.replace("{\n", "{\n" + "".join(registers))


_ASM_FLOAT16: tl.constexpr = tl.constexpr(_FLOAT16)
_ASM_BFLOAT16: tl.constexpr = tl.constexpr(_BFLOAT16)
_FLOAT16_LESS_8: tl.constexpr = tl.constexpr(_less_8(_FLOAT16, 0xE408E408, 0xD480D480, 0xE408E408, 0xD480D480))
_BFLOAT16_LESS_8: tl.constexpr = tl.constexpr(_less_8(_BFLOAT16, *[0xC308C308] * 4))


@triton.jit
def four_planes(w, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 [..] -> four tensors [..] of code - 8 in dtype, nibble 0 first: exact."""
    if PTX and dtype == tl.float16:
        a, b, c, d = tl.inline_asm_elementwise(
            _FLOAT16_LESS_8,
            "=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            _BFLOAT16_LESS_8,
            "=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b, c, d = _plane(w, 8, dtype), _plane(w >> 4, 8, dtype), _plane(w >> 8, 8, dtype), _plane(w >> 12, 8, dtype)
    return a, b, c, d


@triton.jit
def four_planes_less(w, z0, z1, z2, z3, dtype: tl.constexpr, PTX: tl.constexpr):
    """As ``four_planes``, of code - zero for zeros 0..16: int32 that broadcast to the shape of w."""
    if PTX and dtype == tl.float16:
        a, b, c, d = tl.inline_asm_elementwise(
            _ASM_FLOAT16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [w, _less_1024(z0), _less_64(z1), _less_1024(z2), _less_64(z3)],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            _ASM_BFLOAT16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [w, _less_128(z0), _less_128(z1), _less_128(z2), _less_128(z3)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b = _plane(w, z0, dtype), _plane(w >> 4, z1, dtype)
        c, d = _plane(w >> 8, z2, dtype), _plane(w >> 12, z3, dtype)
    return a, b, c, d


@triton.jit
def _plane(w, z, dtype: tl.constexpr):
    if dtype == tl.float16:
        q = ((w & 0xF) | 0x6400).to(tl.float16, bitcast=True) + tl.cast(-1024 - z, tl.float16)
    else:
        # In float32, whose upper half the bfloat16 is. Nothing is lost in the lower half, so nothing needs rounding.
        wide = (((w & 0xF) | 0x4300).to(tl.int32) << 16).to(tl.float32, bitcast=True) + tl.cast(-128 - z, tl.float32)
        q = (wide.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return q


# What makes a number plus the code into the code less z. It is put together from bits: one instruction or two, where a
# conversion to floats is slow.


@triton.jit
def _less_1024(z):
    """float16: -1024 - z."""
    return (0xE400 + z).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _less_64(z):
    """float16: -64 - z."""
    return (0xD400 + z * 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _less_128(z):
    """bfloat16: -128 - z."""
    return (0xC300 + z).to(tl.int16).to(tl.bfloat16, bitcast=True)


# Zeros that are no integers, in pairs: $2, with the scales $3. Clamped to 0..16 and added to a number that leaves no
# bit for a fraction they become integers, $0; $1 is what is left of each, times its scale.
_APART_FLOAT16: tl.constexpr = tl.constexpr("""
{
.reg .b32 zero, most, magic, whole;
mov.b32 zero, 0;
mov.b32 most, 0x4c004c00;
mov.b32 magic, 0x64006400;
max.f16x2 whole, $2, zero;
min.f16x2 whole, whole, most;
add.rn.f16x2 whole, whole, magic;
sub.s32 $0, whole, magic;
sub.rn.f16x2 whole, whole, magic;
sub.rn.f16x2 whole, whole, $2;
mul.rn.f16x2 $1, whole, $3;
}
""")
_APART_BFLOAT16: tl.constexpr = tl.constexpr("""
{
.reg .b32 zero, most, magic, less, one, minus, whole;
mov.b32 zero, 0x80008000;
mov.b32 most, 0x41804180;
mov.b32 magic, 0x43004300;
mov.b32 less, 0xc300c300;
mov.b32 one, 0x3f803f80;
mov.b32 minus, 0xbf80bf80;
max.bf16x2 whole, $2, zero;
min.bf16x2 whole, whole, most;
fma.rn.bf16x2 whole, whole, one, magic;
sub.s32 $0, whole, magic;
fma.rn.bf16x2 whole, whole, one, less;
fma.rn.bf16x2 whole, $2, minus, whole;
fma.rn.bf16x2 $1, whole, $3, zero;
}
""")


@triton.jit
def apart(zeros, scales, dtype: tl.constexpr):
    """int32 [..], [..] of pairs in dtype -> pairs of int16 whole zeros, 0..16, and pairs in dtype of
    (whole - zero) * scale: what is still to be added to a weight that was made with them. PTX alone."""
    asm: tl.constexpr = _APART_FLOAT16 if dtype == tl.float16 else _APART_BFLOAT16
    return tl.inline_asm_elementwise(
        asm, "=&r,=&r,r,r", [zeros, scales], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def scaled(q, scale, rest):
    """q * scale + rest, rounded once. PTX alone."""
    asm: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;" if q.dtype == tl.float16 else "fma.rn.bf16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [q, scale, rest], dtype=q.dtype, is_pure=True, pack=2)


@triton.jit
def side_by_side(a, b):
    """[R, C], [R, C] -> [R, 2 C]. In the layout of a matmul's first operand no data moves, since the new bit of the
    column is its highest."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def number(values, pair, which, n, N, KIND: tl.constexpr):
    """float32 [BN] (int32 if KIND is "int16"): the scales or zeros of rows n of one group: member ``which`` of a pair,
    or row 2 pair + which in float32. ``values`` points to 32-bit words; KIND is their dtype's name."""
    if KIND == "fp32":
        value = tl.load(values + (2 * pair + which) * N + n)
    else:
        value = low_half(tl.load(values + pair * N + n) >> (16 * which), KIND)
    return value


@triton.jit
def low_half(word, KIND: tl.constexpr):
    """float32, or int32 of "int16" (of 0..16): the number in the low 16 bits of words."""
    if KIND == "bf16":
        value = (word << 16).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        value = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        tl.static_assert(KIND == "int16")
        value = word & 0xFFFF
    return value
