"""Exchange the sums of squares between the C programs that share a row.

Each program has a line of memory for each row, with a word from each of the others. The words are SENTINEL like those
of the slots, and are made SENTINEL again when all threads have read them (`clear_sums`).
"""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.packing import SENTINEL, without_sentinel
from fd_fusion.kernels.all_reduce.wait import LINE_WORDS, WAIT_MISSING, check_wait, report_failure


@triton.jit
def sums_of(row_number, memory, C: tl.constexpr):
    """Return a pointer to the lines of the programs of a row."""
    return memory.sums + row_number * C * LINE_WORDS


@triton.jit
def sum_slices(slice_sum, wait_state, sums, row_number, memory, call, N: tl.constexpr, C: tl.constexpr,
               THREADS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Add the sums of the C programs of a row, in slice order. A program that failed sends NaN, so no program waits
    for it. Each thread polls by itself, without a barrier, and a thread whose time is over reports by itself: the
    other threads may have read all sums (tests: sums_model.py)."""
    c = call.slice_index
    own_sum = without_sentinel(tl.where(wait_state == 0, slice_sum, float("nan")).to(tl.uint32, bitcast=True))
    for reader in tl.static_range(C):
        tl.store(sums + reader * LINE_WORDS + c, own_sum, mask=c != reader, cache_modifier=".wt")
    total = 0.0
    sums_state = WAIT_MISSING
    polls = 0
    wait_start_ns = tl.full((), 0, tl.int64)
    while sums_state == WAIT_MISSING:
        total = 0.0
        sums_state = 0
        for source in tl.static_range(C):
            word = tl.load(sums + c * LINE_WORDS + source, mask=c != source, other=own_sum, volatile=True)
            total += word.to(tl.float32, bitcast=True)
            sums_state |= (word == SENTINEL).to(tl.int32)
        polls += 1
        if polls % 1024 == 0:
            wait_bits, wait_start_ns = check_wait(memory, call, wait_start_ns, True, INTERPRETED)
            sums_state |= tl.where(sums_state == WAIT_MISSING, wait_bits, 0)
    if sums_state > WAIT_MISSING:
        report_failure(memory, call, row_number, sums_state, 0, tl.zeros((THREADS,), tl.int32), N)
    return tl.where(sums_state == 0, total, float("nan"))


@triton.jit
def clear_sums(sums, slice_index, C: tl.constexpr):
    """Make the words for one program SENTINEL again, when all of its threads have read them."""
    tl.debug_barrier()
    for source in tl.static_range(C):
        tl.store(sums + slice_index * LINE_WORDS + source, SENTINEL, mask=slice_index != source, cache_modifier=".wt")
