"""A form of `quantising.py` that is measured beside it: as fp8_spread.py, and the largest by two instructions.

Quantise a row of the norm to FP8 while it is in registers: `reference.quantise`, bit for bit.

The rounded norm is what is quantised, so that both paths, which end in the same words, give the same codes. A group
of 128 elements is in 16 threads of one warp; no group straddles two programs (`Plan.fp8`).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import num_warps

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


def _select(units, value):
    """PTX: v = value(u), u the lane's unit."""
    text = f"mov.b32 v, {value(0)};"
    for unit in range(1, units):
        text += f"setp.eq.u32 p, lane, {unit}; selp.b32 v, {value(unit)}, v, p;"
    return text


def _largest_ptx(units, kind, infinity):
    """PTX: of a thread's words the largest size in the group of one unit, by its lane, in all results."""
    count = 4 * units
    text = "{.reg .u32 lane; .reg .pred p, low; .reg .b32 v, a, b, c, d, " + ", ".join(f"s{u}" for u in range(units))
    text += "; mov.u32 lane, %laneid; and.b32 a, lane, 16; setp.eq.u32 low, a, 0;"
    text += f"and.b32 lane, lane, {units - 1};"
    for unit in range(units):
        for number, name in enumerate("abcd"):
            text += f"abs.{kind} {name}, ${count + 4 * unit + number};"
        text += f"max.{kind} a, a, b; max.{kind} c, c, d; max.{kind} a, a, c;"
        text += "and.b32 b, a, 0xFFFF; shr.u32 a, a, 16;"
        text += "".join(f"setp.gt.u32 p, {x}, {infinity}; selp.b32 {x}, 0, {x}, p;" for x in "ab")
        text += "max.u32 a, a, b; selp.b32 b, a, 0, low; selp.b32 c, 0, a, low;"
        text += "redux.sync.max.u32 b, b, 0xffffffff; redux.sync.max.u32 c, c, 0xffffffff;"
        text += f"selp.b32 s{unit}, b, c, low;"
    return text + _select(units, lambda unit: f"s{unit}") + "".join(f"mov.b32 ${n}, v;" for n in range(count)) + "}"


def _gather_ptx(units):
    """PTX: what each unit's lane has, for each word of the unit."""
    text = f"{{.reg .b32 v; mov.b32 v, ${4 * units};"
    for unit in range(units):
        text += f"shfl.sync.idx.b32 ${4 * unit}, v, {unit}, {(32 - units) << 8 | 0x1F}, 0xffffffff;"
    for number in range(4 * units):
        text += f"mov.b32 ${number}, ${number // 4 * 4};" if number % 4 else ""
    return text + "}"


def _store_ptx(units):
    """PTX: store a scale for the group of the lane's unit."""
    count = 4 * units
    row, scale, group, stride, mask = (count * number for number in range(1, 6))
    text = "{.reg .u32 lane; .reg .pred p; .reg .b32 v, g; .reg .u64 place; mov.u32 lane, %laneid;"
    text += (
        f"and.b32 lane, lane, {units - 1};" + _select(units, lambda unit: f"${group + 4 * unit}") + "mov.b32 g, v;"
    )
    text += _select(units, lambda unit: f"${mask + 4 * unit}") + f"mad.wide.s32 place, g, ${stride}, ${row};"
    text += f"setp.ne.s32 p, v, 0; @p st.global.f32 [place], ${scale};"
    return text + "".join(f"mov.b32 ${number}, 0;" for number in range(count)) + "}"


def _kinds(units, *kinds):
    return tl.constexpr(",".join(kind for kind in kinds for _ in range(4 * units)))


BF16_1, BF16_2, BF16_4, BF16_8 = (tl.constexpr(_largest_ptx(units, "bf16x2", "0x7F80")) for units in (1, 2, 4, 8))
FP16_1, FP16_2, FP16_4, FP16_8 = (tl.constexpr(_largest_ptx(units, "f16x2", "0x7C00")) for units in (1, 2, 4, 8))
GATHER_1, GATHER_2, GATHER_4, GATHER_8 = (tl.constexpr(_gather_ptx(units)) for units in (1, 2, 4, 8))
STORE_1, STORE_2, STORE_4, STORE_8 = (tl.constexpr(_store_ptx(units)) for units in (1, 2, 4, 8))
INTS_1, INTS_2, INTS_4, INTS_8 = (_kinds(units, "=r", "r") for units in (1, 2, 4, 8))
FLOATS_1, FLOATS_2, FLOATS_4, FLOATS_8 = (_kinds(units, "=&f", "f") for units in (1, 2, 4, 8))
STORED_1, STORED_2, STORED_4, STORED_8 = (_kinds(units, "=r", "l", "f", "r", "r", "r") for units in (1, 2, 4, 8))


@triton.jit
def _largest(words, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr, UNITS: tl.constexpr):
    """Return the largest size in the group of each word, NaN left out, in fp32: halves are ordered as their bits.

    On a GPU in the groups of the lane's unit.
    """
    if INTERPRETED:
        infinity: tl.constexpr = 0x7F80 if DTYPE == "bfloat16" else 0x7C00
        low, high = words & 0x7FFF, (words >> 16) & 0x7FFF
        low, high = tl.where(low > infinity, 0, low), tl.where(high > infinity, 0, high)
        groups: tl.constexpr = words.shape[0] // GROUP_WORDS
        sizes = tl.max(tl.reshape(tl.maximum(low, high), (groups, GROUP_WORDS)), axis=1)
        wide = tl.broadcast_to(tl.expand_dims(sizes, 1), (groups, GROUP_WORDS))
        sizes = tl.reshape(wide, (groups * GROUP_WORDS,))
    else:
        BF16: tl.constexpr = BF16_1 if UNITS == 1 else BF16_2 if UNITS == 2 else BF16_4 if UNITS == 4 else BF16_8
        FP16: tl.constexpr = FP16_1 if UNITS == 1 else FP16_2 if UNITS == 2 else FP16_4 if UNITS == 4 else FP16_8
        TEXT: tl.constexpr = BF16 if DTYPE == "bfloat16" else FP16
        INTS: tl.constexpr = INTS_1 if UNITS == 1 else INTS_2 if UNITS == 2 else INTS_4 if UNITS == 4 else INTS_8
        sizes = tl.inline_asm_elementwise(TEXT, INTS, [words], tl.uint32, True, 4 * UNITS)
    return unpack(sizes, DTYPE)[0]


@triton.jit
def _gather(x, INTERPRETED: tl.constexpr, UNITS: tl.constexpr):
    if not INTERPRETED:
        TEXT: tl.constexpr = (
            GATHER_1 if UNITS == 1 else GATHER_2 if UNITS == 2 else GATHER_4 if UNITS == 4 else GATHER_8
        )
        FLOATS: tl.constexpr = (
            FLOATS_1 if UNITS == 1 else FLOATS_2 if UNITS == 2 else FLOATS_4 if UNITS == 4 else FLOATS_8
        )
        x = tl.inline_asm_elementwise(TEXT, FLOATS, [x], tl.float32, True, 4 * UNITS)
    return x


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
def _store_scales(scales, row, slice_index, quantising, shape, INTERPRETED: tl.constexpr, UNITS: tl.constexpr):
    """Store a scale for each group. On a GPU by PTX: tl.store would move the scales to other threads first."""
    groups = slice_index * (shape.SLICE // GROUP_WORDS) + row.offsets // GROUP_WORDS
    place = quantising.scales + row.number.to(tl.int64) * quantising.row_stride * 4
    if INTERPRETED:
        places = groups.to(tl.int64) * quantising.group_stride
        tl.store(place.to(tl.pointer_type(tl.float32)) + places, scales, mask=row.mask)
    else:
        operands = [place, scales, groups, quantising.group_stride * 4, row.mask.to(tl.int32)]
        TEXT: tl.constexpr = STORE_1 if UNITS == 1 else STORE_2 if UNITS == 2 else STORE_4 if UNITS == 4 else STORE_8
        KINDS: tl.constexpr = (
            STORED_1 if UNITS == 1 else STORED_2 if UNITS == 2 else STORED_4 if UNITS == 4 else STORED_8
        )
        tl.inline_asm_elementwise(TEXT, KINDS, operands, tl.int32, False, 4 * UNITS)


@triton.jit
def store_quantised(norm, row, slice_index, quantising, shape, INTERPRETED: tl.constexpr):
    """Store the codes and the scales of this program's slice of a row. `norm`: its words."""
    DTYPE: tl.constexpr = shape.DTYPE
    FORMULA: tl.constexpr = quantising.FORMULA
    UNITS: tl.constexpr = 1 if INTERPRETED else norm.shape[0] // (128 * num_warps())
    a, b = unpack(norm, DTYPE)
    if FORMULA == "static":
        a, b = a * quantising.static_factor, b * quantising.static_factor
    else:
        largest = _largest(norm, DTYPE, INTERPRETED, UNITS)
        if FORMULA == "divide" or FORMULA == "divide_7":
            divisors, scales = divisors_and_scales(largest, FORMULA == "divide_7", DTYPE, INTERPRETED)
            divisor = _gather(divisors, INTERPRETED, UNITS)
            a, b = quotient_of(a, divisor, DTYPE, INTERPRETED), quotient_of(b, divisor, DTYPE, INTERPRETED)
        else:
            factors, scales = factors_and_scales(largest, FORMULA == "multiply_pow2", INTERPRETED)
            factor = _gather(factors, INTERPRETED, UNITS)
            a, b = a * factor, b * factor
        _store_scales(scales, row, slice_index, quantising, shape, INTERPRETED, UNITS)
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
