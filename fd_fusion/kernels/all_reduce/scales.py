"""Divide as `reference.quantise` does, bit for bit: what each group is multiplied with or divided by, and its scale.

The interpreter divides. On a GPU nothing is divided by tl.div_rn: each division would be a branch, and those of a
program would run one after another. What is here instead gives the same bits for all that a half can be
(tests/kernels/all_reduce/fp8_division.py).
"""

import triton
import triton.language as tl

from fd_fusion.reference import FP8_MAX

LARGEST = tl.constexpr(FP8_MAX)
INVERSE = tl.constexpr(1 / FP8_MAX)
TOP = tl.constexpr(float.fromhex("0x1.FEp127"))
TOP_POW2 = tl.constexpr(2.0**127)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _about_reciprocal(x):
    """Within one unit in the last place; x and the result are normal numbers."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _factors(largest, TOO_LARGE: tl.constexpr):
    """Return 448 / largest, to nearest. Of the 11 bits of `largest` one correction of the quotient is enough."""
    bits = largest.to(tl.uint32, bitcast=True)
    part = (bits & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)  # without its exponent
    about = _about_reciprocal(part)
    quotient = about * LARGEST
    quotient = tl.fma(tl.fma(-part, quotient, LARGEST), about, quotient)
    factor = quotient.to(tl.uint32, bitcast=True) - (bits & 0x7F800000) + 0x3F800000
    factor = tl.where(bits == 0x7F800000, 0, factor).to(tl.float32, bitcast=True)
    return tl.where(bits <= 0x03E00000, TOO_LARGE, factor)


@triton.jit
def _inverses(factors):
    """Return 1 / factors, to nearest, for what `_factors` gives."""
    bits = factors.to(tl.uint32, bitcast=True)
    part = (bits & 0x7FFFFF | 0x40000000).to(tl.float32, bitcast=True)  # without its exponent
    exponent = bits & 0x7F800000
    about = _about_reciprocal(part)
    # A factor from 2^126 on has a subnormal inverse: to be rounded once, and to its steps, it is added to a number
    # that has such steps.
    large = tl.where(exponent >= 0x7E800000, exponent - 0x3F800000, 0).to(tl.float32, bitcast=True)
    stepped = about + large
    rest = tl.fma(tl.fma(-part, about, 1.0), about, about - (stepped - large))
    return (stepped + rest - large) * (0x7F800000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def factors_and_scales(largest, POW2: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return factors and scales of `multiply` and `multiply_pow2`."""
    TOO_LARGE: tl.constexpr = TOP_POW2 if POW2 else TOP
    if INTERPRETED:
        factors = tl.div_rn(tl.full(largest.shape, LARGEST, tl.float32), largest)
        factors = tl.where(factors == INFINITY, TOO_LARGE, factors)
    else:
        factors = _factors(largest, TOO_LARGE)
    factors = tl.where(largest == 0, 1.0, factors)
    if POW2:
        factors = (factors.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scales = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), factors) if INTERPRETED else _inverses(factors)
    return factors, scales


@triton.jit
def divisors_and_scales(largest, SEVENTH: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return divisors and scales of `divide` and `divide_7`.

    On a GPU reciprocals in the place of divisors, made larger: by much more than the error of all that follows, and
    by much less than a quotient is away from the middle of two codes where it is not just there.
    """
    largest = tl.maximum(largest, 1e-10) * (7.0 if SEVENTH else 1.0)
    if INTERPRETED:
        scales = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
        divisors = largest
    else:
        quotient = largest * INVERSE
        scales = tl.fma(tl.fma(-quotient, LARGEST, largest), INVERSE, quotient)
        scales = tl.where(largest == INFINITY, INFINITY, scales)
        about = tl.inline_asm_elementwise("rcp.approx.f32 $0, $1;", "=f,f", [largest], tl.float32, True, 1)
        divisors = about * (1 + 2.0**-17 if DTYPE == "bfloat16" else 1 + 2.0**-20)
    return divisors, scales


@triton.jit
def quotient_of(x, divisor, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return 448 x / divisor, to nearest; on a GPU a number of the same code: cut off, it is the middle of two codes
    where the quotient is."""
    if INTERPRETED:
        quotient = tl.div_rn(x * LARGEST, divisor)
    else:
        kept: tl.constexpr = 0xFFFFFF00 if DTYPE == "bfloat16" else 0xFFFFFFE0
        quotient = ((x * LARGEST * divisor).to(tl.uint32, bitcast=True) & kept).to(tl.float32, bitcast=True)
    return quotient
