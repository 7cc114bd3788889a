"""A yardstick for the QK norm's benchmark: the same accesses, no arithmetic."""

import triton
import triton.language as tl

from fd_fusion.kernels.qk_rms_norm import gdc_wait


@triton.jit(do_not_specialize=["rows"])
def load_store_kernel(
    x, rows, stride, ROW_HEADS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr
):
    """Flip the sign of x[rows, :ROW_HEADS * D]: its own exact inverse, so that replays do not drift."""
    if PDL:
        gdc_wait()
    item = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]
    row = (item // ROW_HEADS).to(tl.int64)
    place = x + row * stride + (item % ROW_HEADS * D + tl.arange(0, D)[None, :])
    tl.store(place, -tl.load(place, mask=row < rows), mask=row < rows)
