"""The all-reduce kernel with FP8 beside or in the place of norm_out: another entry into `kernel.py`."""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.context import Addresses, Polling, Shape
from fd_fusion.kernels.all_reduce.kernel import gdc_wait, work_on_rows
from fd_fusion.kernels.all_reduce.quantising import Quantising


@triton.jit(do_not_specialize=["x", "residual", "weight", "norm_out", "residual_out", "state_memory", "own_slots",
                               "rows", "rounds", "rank", "op", "codes", "scales", "row_stride",
                               "group_stride"])  # fmt: skip
def all_reduce_rms_norm_fp8(x, residual, weight, norm_out, residual_out, state_memory, own_slots, rows, rounds, rank,
                            op, eps, weight_offset, codes, scales, row_stride, group_stride, static_factor,
                            N: tl.constexpr, WORDS: tl.constexpr, SLICE: tl.constexpr,
                            BLOCK: tl.constexpr, C: tl.constexpr, SLICES: tl.constexpr, PLACES: tl.constexpr,
                            DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                            TWO_SHOT: tl.constexpr, RESULTS: tl.constexpr, ROUNDS: tl.constexpr, POLL: tl.constexpr,
                            POLL_RESULTS: tl.constexpr, OPERANDS: tl.constexpr, UNITS: tl.constexpr,
                            PDL: tl.constexpr, INTERPRETED: tl.constexpr, OUTPUT: tl.constexpr, FORMULA: tl.constexpr,
                            LARGEST: tl.constexpr, GATHER: tl.constexpr, STORE_SCALE: tl.constexpr,
                            OPERANDS_OF_WORDS: tl.constexpr, OPERANDS_OF_SCALES: tl.constexpr):  # fmt: skip
    """Compute `kernel.all_reduce_rms_norm` and quantise norm_out as `reference.quantise` does.

    Args: those of `all_reduce_rms_norm`, and
        norm_out: with OUTPUT "codes" only a failed call writes there; give residual_out.
        codes: address of uint8 [rows, H], a multiple of 8. Of a row that failed every code is NaN.
        scales: address of float32: the scale of group g of row t is at t * row_stride + g * group_stride.
        row_stride, group_stride: in numbers. By rows: H / 128 and 1; by columns: 1 and T as padded by the caller.
        static_factor: fp32, 1 / static_scale; read with FORMULA "static", which writes no scales.
    """
    if PDL:  # as in `all_reduce_rms_norm`
        gdc_wait()
    addresses = Addresses(x, residual, weight, norm_out, residual_out, state_memory, own_slots)
    work_on_rows(
        addresses, rows, rounds, rank, op, eps, weight_offset,
        Shape(N, WORDS, SLICE, BLOCK, C, SLICES, PLACES, DTYPE, WEIGHT_DTYPE, HAS_RESIDUAL, TWO_SHOT, RESULTS,
              ROUNDS),
        Polling(POLL, POLL_RESULTS, OPERANDS, UNITS, INTERPRETED),
        Quantising(codes, scales, row_stride, group_stride, static_factor, OUTPUT, FORMULA, INTERPRETED,
                   LARGEST, GATHER, STORE_SCALE, OPERANDS_OF_WORDS, OPERANDS_OF_SCALES, 4 * UNITS))  # fmt: skip
