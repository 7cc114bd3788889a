"""Quantise a row of the norm to FP8 while it is in registers: `reference.quantise`, bit for bit.

The rounded norm is what is quantised, so that both paths, which end in the same words, give the same codes. A group
of 128 elements is in 16 threads of one warp; no group straddles two programs (`Plan.fp8`). On a GPU each thread
divides for one group alone (`quantise_ptx.py`).
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
    LARGEST: tl.constexpr  # PTX of `quantise_ptx.py`, and its operands; None under the interpreter
    GATHER: tl.constexpr
    STORE_SCALE: tl.constexpr
    OPERANDS_OF_WORDS: tl.constexpr
    OPERANDS_OF_SCALES: tl.constexpr
    PACK: tl.constexpr  # words of a thread


@triton.jit
def _largest(words, quantising, DTYPE: tl.constexpr):
    """Return the largest size in the group of each word, NaN left out, in fp32; on a GPU in the group of the lane."""
    if quantising.LARGEST is None:
        infinity: tl.constexpr = 0x7F80 if DTYPE == "bfloat16" else 0x7C00
        low, high = words & 0x7FFF, (words >> 16) & 0x7FFF
        low, high = tl.where(low > infinity, 0, low), tl.where(high > infinity, 0, high)
        groups: tl.constexpr = (words.shape[0] // GROUP_WORDS, GROUP_WORDS)
        sizes = tl.max(tl.reshape(tl.maximum(low, high), groups), axis=1)  # halves are in the order of their bits
        sizes = tl.reshape(tl.broadcast_to(tl.expand_dims(sizes, 1), groups), words.shape)
    else:
        sizes = tl.inline_asm_elementwise(
            quantising.LARGEST, quantising.OPERANDS_OF_WORDS, [words], tl.uint32, True, quantising.PACK)  # fmt: skip
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


@triton.jit
def _for_words(of_lane, quantising):
    """Return for each word what the lane of its group has."""
    if quantising.GATHER is not None:
        bits = of_lane.to(tl.uint32, bitcast=True)
        bits = tl.inline_asm_elementwise(
            quantising.GATHER, quantising.OPERANDS_OF_WORDS, [bits], tl.uint32, True, quantising.PACK)  # fmt: skip
        of_lane = bits.to(tl.float32, bitcast=True)
    return of_lane


@triton.jit
def _store_scales(scales, row, slice_index, quantising, shape):
    """Store a scale for each group. On a GPU by PTX: tl.store would move the scales to other threads first."""
    groups = slice_index * (shape.SLICE // GROUP_WORDS) + row.offsets // GROUP_WORDS
    place = quantising.scales + row.number.to(tl.int64) * quantising.row_stride * 4
    if quantising.STORE_SCALE is None:
        places = groups.to(tl.int64) * quantising.group_stride
        tl.store(place.to(tl.pointer_type(tl.float32)) + places, scales, mask=row.mask)
    else:
        bits = scales.to(tl.uint32, bitcast=True)
        tl.inline_asm_elementwise(
            quantising.STORE_SCALE, quantising.OPERANDS_OF_SCALES,
            [place, bits, groups, quantising.group_stride * 4, row.mask.to(tl.int32)],
            tl.int32, False, quantising.PACK)  # fmt: skip


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
        largest = _largest(norm, quantising, DTYPE)
        if FORMULA == "divide" or FORMULA == "divide_7":
            divisors, scales = divisors_and_scales(largest, FORMULA == "divide_7", DTYPE, INTERPRETED)
            divisor = _for_words(divisors, quantising)
            a, b = quotient_of(a, divisor, DTYPE, INTERPRETED), quotient_of(b, divisor, DTYPE, INTERPRETED)
        else:
            factors, scales = factors_and_scales(largest, FORMULA == "multiply_pow2", INTERPRETED)
            factor = _for_words(factors, quantising)
            a, b = a * factor, b * factor
        _store_scales(scales, row, slice_index, quantising, shape)
    tl.store(codes_of(row, slice_index, quantising, shape), _to_codes(a, b, INTERPRETED), mask=row.mask)


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
