"""A quantiser behind the fused op: the rival of FP8 out of its kernel, which has the same code for a row."""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.context import Row, Shape
from fd_fusion.kernels.all_reduce.kernel import gdc_wait
from fd_fusion.kernels.all_reduce.packing import pointer
from fd_fusion.kernels.all_reduce.quantising import Quantising, store_quantised


@triton.jit
def quantise_rows(x, codes, scales, row_stride, group_stride, WORDS: tl.constexpr, SLICE: tl.constexpr,
                  BLOCK: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
                  FORMULA: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Quantise rows of halves; C programs share a row."""
    if PDL:
        gdc_wait()
    number, c = tl.program_id(0) // C, tl.program_id(0) % C
    offsets = tl.arange(0, BLOCK)
    mask = offsets < tl.minimum(SLICE, WORDS - c * SLICE)
    words = tl.load(pointer(x, tl.uint32) + number.to(tl.int64) * WORDS + c * SLICE + offsets, mask=mask, other=0)
    store_quantised(
        words, Row(number, words, offsets, mask, 0, 0), c,
        Quantising(codes, scales, row_stride, group_stride, 1.0, "codes", FORMULA, INTERPRETED),
        Shape(2, WORDS, SLICE, BLOCK, C, 1, 0, DTYPE, DTYPE, True, False, 1))  # fmt: skip
