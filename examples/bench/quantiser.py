"""A quantiser behind the fused op: the rival of FP8 out of its kernel, which has the same code for a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fd_fusion.backends.triton_fp8 import Outputs
from fd_fusion.frameworks import triton_launch
from fd_fusion.frameworks.tensors import maker
from fd_fusion.kernels.all_reduce import quantise_ptx
from fd_fusion.kernels.all_reduce.context import Row, Shape
from fd_fusion.kernels.all_reduce.kernel import gdc_wait
from fd_fusion.kernels.all_reduce.packing import pointer
from fd_fusion.kernels.all_reduce.quantising import Quantising, store_quantised
from fd_fusion.spec import Fp8


@triton.jit
def quantise_rows(x, codes, scales, row_stride, group_stride, WORDS: tl.constexpr, SLICE: tl.constexpr,
                  BLOCK: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
                  FORMULA: tl.constexpr, DTYPE: tl.constexpr, LARGEST: tl.constexpr, GATHER: tl.constexpr,
                  STORE_SCALE: tl.constexpr, OPERANDS_OF_WORDS: tl.constexpr, OPERANDS_OF_SCALES: tl.constexpr,
                  PACK: tl.constexpr):  # fmt: skip
    """Quantise rows of halves; C programs share a row."""
    if PDL:
        gdc_wait()
    number, c = tl.program_id(0) // C, tl.program_id(0) % C
    offsets = tl.arange(0, BLOCK)
    mask = offsets < tl.minimum(SLICE, WORDS - c * SLICE)
    words = tl.load(pointer(x, tl.uint32) + number.to(tl.int64) * WORDS + c * SLICE + offsets, mask=mask, other=0)
    store_quantised(
        words, Row(number, words, offsets, mask, 0, 0, pointer(x, tl.uint32)), c,
        Quantising(codes, scales, row_stride, group_stride, 1.0, "codes", FORMULA, INTERPRETED,
                   LARGEST, GATHER, STORE_SCALE, OPERANDS_OF_WORDS, OPERANDS_OF_SCALES, PACK),
        Shape(2, WORDS, SLICE, BLOCK, C, 1, 0, DTYPE, DTYPE, True, False, 1, False))  # fmt: skip


class Quantiser:
    """The quantiser in one shape, `words` of a row to a program, with outputs as those of the op."""

    def __init__(self, hidden: int, words: int | None, warps: int, device: str, formula: str = "multiply",
                 dtype: str = "bfloat16"):  # fmt: skip
        total = hidden // 2
        words = min(words or total, total)
        pdl = device == "gpu" and triton_launch.uses_pdl()
        self._parts, block = -(-total // words), max(128 * warps, 1 << (words - 1).bit_length())
        constants = {"WORDS": total, "SLICE": words, "BLOCK": block, "C": self._parts, "PDL": pdl}
        constants |= {"INTERPRETED": device == "cpu", "FORMULA": formula, "DTYPE": dtype}
        units = block // (128 * warps)
        constants |= {**quantise_ptx.quantising(units, dtype, device == "cpu"), "PACK": 4 * units}
        constants |= {"num_warps": warps, "enable_fp_fusion": False}
        constants |= {"launch_pdl": True} if pdl else {}
        address = 1 << 40
        self._launch = triton_launch.prepare(quantise_rows, (*(address,) * 3, 2, 2), constants, device).launch

    def __call__(self, norm: torch.Tensor, fp8: Fp8) -> Any:
        made = Outputs(torch, maker("gpu" if norm.is_cuda else "cpu"), norm.shape, fp8)
        codes, scales, row_stride, group_stride, _ = made.arguments(0)
        self._launch(norm.shape[0] * self._parts, norm.data_ptr(), codes, scales, row_stride, group_stride)
        return made
