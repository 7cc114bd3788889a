"""Store a word as the fused kernel stores one, for the proof that a peer's memory can be written."""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.packing import pointer


@triton.jit(do_not_specialize=["address", "value"])
def store_word(address, value):
    """Store the int64 `value` twice at `address`, a multiple of 16: one 16-byte store of system scope."""
    tl.store(pointer(address, tl.uint64) + tl.arange(0, 2), value, cache_modifier=".wt")
