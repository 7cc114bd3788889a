"""The norm behind an all-reduce that is not fused: `tune` and the benchmarks time it, no layer uses it."""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.packing import pointer


@triton.jit(do_not_specialize=["x", "residual", "weight", "eps"])
def add_rms_norm(x, residual, weight, eps, H: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """residual += x; x = norm(residual). One program a row, which stays in registers."""
    lanes = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * H + lanes
    total = tl.load(pointer(x, DTYPE) + at, mask=lanes < H, other=0).to(tl.float32)
    total += tl.load(pointer(residual, DTYPE) + at, mask=lanes < H, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / H + eps)
    w = tl.load(pointer(weight, DTYPE) + lanes, mask=lanes < H, other=0).to(tl.float32)
    tl.store(pointer(residual, DTYPE) + at, total.to(DTYPE), mask=lanes < H)
    tl.store(pointer(x, DTYPE) + at, (total * scale * w).to(DTYPE), mask=lanes < H)
