"""Quantise a row of the norm to FP8 while it is in registers: `reference.quantise`, bit for bit.

The rounded norm is what is quantised, so that both paths, which end in the same words, give the same codes. A group
of 128 elements is in 16 threads of one warp; no group straddles two programs (`Plan.fp8`).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.packing import unpack
from fd_fusion.kernels.all_reduce.scales import divisors_and_scales, factors_and_scales, quotient_of
from fd_fusion.reference import FP8_GROUP

GROUP_WORDS = tl.constexpr(FP8_GROUP // 2)  # of two halves


class Quantising(NamedTuple):
    """What a call writes of the norm. The scale of group g of row t is at t * row_stride + g * group_stride."""

    codes: tl.tensor  # address of uint8 [rows, H]
    scales: tl.tensor  # address of float32; a multiple of 4
    row_stride: tl.tensor
    group_stride: tl.tensor
    static_factor: tl.tensor
    OUTPUT: tl.constexpr  # "norm", "codes" or "both"
    FORMULA: tl.constexpr  # of `reference.quantise`
    INTERPRETED: tl.constexpr


@triton.jit
def _by_group(tensor):
    return tl.reshape(tensor, (tensor.shape[0] // GROUP_WORDS, GROUP_WORDS))


@triton.jit
def _by_word(of_groups):
    """Return what each group has, for each word of the group."""
    wide = tl.broadcast_to(tl.expand_dims(of_groups, 1), (of_groups.shape[0], GROUP_WORDS))
    return tl.reshape(wide, (of_groups.shape[0] * GROUP_WORDS,))


@triton.jit
def _larger(a, b):
    """Of two words of bf16 that are not negative, half by half, the larger; NaN only where both are."""
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.uint32, True, 1)


@triton.jit
def _larger_fp16(a, b):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.uint32, True, 1)


@triton.jit
def _largest(words, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the largest size in each group, NaN left out, in fp32: halves are in the order of their bits."""
    infinity: tl.constexpr = 0x7F80 if DTYPE == "bfloat16" else 0x7C00
    if not INTERPRETED:
        words = tl.reduce(_by_group(words & 0x7FFF7FFF), 1, _larger if DTYPE == "bfloat16" else _larger_fp16)
    low, high = words & 0x7FFF, (words >> 16) & 0x7FFF
    low, high = tl.where(low > infinity, 0, low), tl.where(high > infinity, 0, high)
    sizes = tl.maximum(low, high)
    if INTERPRETED:
        sizes = tl.max(_by_group(sizes), axis=1)
    return unpack(sizes, DTYPE)[0]


@triton.jit
def _code_by_bits(value):
    """Round to e4m3 for the interpreter, which knows no saturation."""
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # in steps of 2^-9
    code = (size + 0x7FFFF + ((size >> 20) & 1) - 0x3C000000) >> 20
    code = tl.where(size < 0x3C800000, tiny, tl.where(size >= 0x43E00000, 0x7E, code))
    return tl.where(size > 0x7F800000, 0x7F, code | ((bits >> 24) & 0x80))


@triton.jit
def _to_codes(a, b, INTERPRETED: tl.constexpr):
    """Round two fp32 tensors to e4m3: the first is in the lower byte."""
    if INTERPRETED:
        codes = (_code_by_bits(a) | (_code_by_bits(b) << 8)).to(tl.uint16)
    else:
        codes = tl.inline_asm_elementwise("cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [a, b], tl.uint16,
                                          True, 1)  # fmt: skip
    return codes


# Store $2 at $1 + $3 * $4 if $5. Computed outside, the address would be kept in registers while words are awaited.
STORE_SCALE = tl.constexpr("""{
.reg .pred stored;
.reg .u64 place;
mad.wide.s32 place, $3, $4, $1;
setp.ne.s32 stored, $5, 0;
@stored st.global.f32 [place], $2;
mov.b32 $0, 0;
}""")


@triton.jit
def _store_scales(scales, row_number, groups, mask, quantising):
    """Store a scale for each group. On a GPU by PTX: tl.store would move the scales to other threads first."""
    row = quantising.scales + row_number.to(tl.int64) * quantising.row_stride * 4
    if quantising.INTERPRETED:
        places = groups.to(tl.int64) * quantising.group_stride
        tl.store(row.to(tl.pointer_type(tl.float32)) + places, scales, mask=mask)
    else:
        operands = [row, scales, groups, quantising.group_stride * 4, mask.to(tl.int32)]
        tl.inline_asm_elementwise(STORE_SCALE, "=r,l,f,r,r,r", operands, tl.int32, False, 1)


@triton.jit
def store_quantised(norm, row, slice_index, quantising, shape):
    """Store the codes and the scales of this program's slice of a row. `norm`: its words."""
    DTYPE: tl.constexpr = shape.DTYPE
    FORMULA: tl.constexpr = quantising.FORMULA
    INTERPRETED: tl.constexpr = quantising.INTERPRETED
    a, b = unpack(norm, DTYPE)
    if FORMULA == "static":
        a, b = a * quantising.static_factor, b * quantising.static_factor
    else:
        largest = _largest(norm, DTYPE, INTERPRETED)
        if FORMULA == "divide" or FORMULA == "divide_7":
            divisors, scales = divisors_and_scales(largest, FORMULA == "divide_7", DTYPE, INTERPRETED)
            divisor = _by_word(divisors)
            a, b = quotient_of(a, divisor, DTYPE, INTERPRETED), quotient_of(b, divisor, DTYPE, INTERPRETED)
        else:
            factors, scales = factors_and_scales(largest, FORMULA == "multiply_pow2", INTERPRETED)
            factor = _by_word(factors)
            a, b = a * factor, b * factor
        # As with the words of `kernel.work_on_rows`, a slice may not fill its part of the tensors.
        in_slice, of_slice = tl.arange(0, largest.shape[0]), slice_index
        if shape.SLICES > 1:
            of_slice += in_slice // (shape.BLOCK // GROUP_WORDS)
            in_slice %= shape.BLOCK // GROUP_WORDS
        words_here = tl.minimum(shape.SLICE, shape.WORDS - of_slice * shape.SLICE) if shape.C > 1 else shape.WORDS
        groups = of_slice * (shape.SLICE // GROUP_WORDS) + in_slice
        _store_scales(scales, row.number, groups, in_slice * GROUP_WORDS < words_here, quantising)
    codes = _to_codes(a, b, INTERPRETED)
    tl.store(codes_of(row, slice_index, quantising, shape), codes, mask=row.mask)


@triton.jit
def codes_of(row, slice_index, quantising, shape):
    """Return pointers to the codes of the words of a slice, two in one. A hint of 8 bytes: by 16 a thread would store
    what other threads have."""
    codes = tl.multiple_of(quantising.codes.to(tl.pointer_type(tl.uint16)), 8)
    return codes + row.number.to(tl.int64) * shape.WORDS + slice_index * shape.SLICE + row.offsets


@triton.jit
def fail_quantised(row, slice_index, quantising, shape):
    """Make all codes of a slice NaN."""
    nan = tl.full(row.offsets.shape, 0x7F7F, tl.uint16)
    tl.store(codes_of(row, slice_index, quantising, shape), nan, mask=row.mask)
