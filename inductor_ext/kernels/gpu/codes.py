"""Codes to numbers, in Triton: the nibbles of a 16-bit word as four "planes" of exact code - 8, and scales and zeros
out of their pairs. The layout is that of ``planes.py``.

A nibble under the exponent of 1024 (float16) or 128 (bfloat16) is that number plus the code. Two words share a
register, so each instruction makes two codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Nibbles 1 and 3 of float16 are not shifted down: 1024 + 16 q, times 1/16, minus 72.
_FLOAT16 = """
{
.reg .b32 high, one, scale, shift;
mov.b32 one, 0x64086408;
mov.b32 scale, 0x2c002c00;
mov.b32 shift, 0xd480d480;
shr.b32 high, $4, 8;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, high, 0x00f000f0, 0x64006400, 0xea;
sub.f16x2 $0, $0, one;
fma.rn.f16x2 $1, $1, scale, shift;
sub.f16x2 $2, $2, one;
fma.rn.f16x2 $3, $3, scale, shift;
}
"""
# bfloat16 has no bits for that: every nibble is shifted down to 128 + q. Its subtraction is an fma by one.
_BFLOAT16 = """
{
.reg .b32 second, third, fourth, one, shift;
mov.b32 one, 0x3f803f80;
mov.b32 shift, 0xc308c308;
shr.b32 second, $4, 4;
shr.b32 third, $4, 8;
shr.b32 fourth, $4, 12;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, second, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $2, third, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, fourth, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, one, shift;
fma.rn.bf16x2 $1, $1, one, shift;
fma.rn.bf16x2 $2, $2, one, shift;
fma.rn.bf16x2 $3, $3, one, shift;
}
"""
_ASM_FLOAT16: tl.constexpr = tl.constexpr(_FLOAT16)
_ASM_BFLOAT16: tl.constexpr = tl.constexpr(_BFLOAT16)


@triton.jit
def four_planes(w, dtype: tl.constexpr, PTX: tl.constexpr):
    """int16 [..] -> four tensors [..] of code - 8 in dtype, nibble 0 first."""
    if PTX:
        if dtype == tl.float16:
            a, b, c, d = tl.inline_asm_elementwise(
                _ASM_FLOAT16,
                "=&r,=&r,=&r,=&r,r",
                [w],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _ASM_BFLOAT16,
                "=&r,=&r,=&r,=&r,r",
                [w],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
    else:
        a, b, c, d = _plane(w, dtype), _plane(w >> 4, dtype), _plane(w >> 8, dtype), _plane(w >> 12, dtype)
    return a, b, c, d


@triton.jit
def _plane(w, dtype: tl.constexpr):
    if dtype == tl.float16:
        q = ((w & 0xF) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    else:
        q = ((w & 0xF) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    return q.to(dtype)


@triton.jit
def side_by_side(a, b):
    """[R, C], [R, C] -> [R, 2 C]. In the layout of a matmul's first operand no data moves, since the new bit of the
    column is its highest."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def number(values, pair, which, n, N, KIND: tl.constexpr):
    """float32 [BN]: the scales or zeros of rows n of one group: member ``which`` of a pair, or row 2 pair + which in
    float32. ``values`` points to 32-bit words; KIND is their dtype's name."""
    if KIND == "fp32":
        value = tl.load(values + (2 * pair + which) * N + n)
    else:
        value = low_half(tl.load(values + pair * N + n) >> (16 * which), KIND)
    return value


@triton.jit
def low_half(word, KIND: tl.constexpr):
    """float32: the number in the low 16 bits of words."""
    if KIND == "bf16":
        value = (word << 16).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        value = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = word.to(tl.int16).to(tl.float32)
    return value
