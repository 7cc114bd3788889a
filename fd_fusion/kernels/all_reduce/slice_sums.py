"""Add the squares of a row in slices: each by itself, then their sums in order, whichever programs have them.

The programs that share a row exchange their sums: each has a line of memory for each row, with a word for every slice
of the others. The words are SENTINEL like those of the slots, and are made SENTINEL again when all threads have read
them (`clear_sums`).
"""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.packing import SENTINEL, without_sentinel
from fd_fusion.kernels.all_reduce.wait import LINE_WORDS, WAIT_MISSING, check_wait, report_failure


@triton.jit
def sum_each_slice(squares, shape):
    """Return the sum of the slices of a program, then that of each, one or two.

    A slice is summed as if its tensor were alone: a thread has the same words of each slice, and adding the zeros in
    place of the other changes no bit.
    """
    if shape.SLICES == 1:
        first = tl.sum(squares, axis=0)
        total, second = first, first
    else:
        is_first = tl.arange(0, 2 * shape.BLOCK) < shape.BLOCK
        first = tl.sum(tl.where(is_first, squares, 0.0), axis=0)
        second = tl.sum(tl.where(is_first, 0.0, squares), axis=0)
        total = first + second
    return total, first, second


@triton.jit
def exchange_sums(slice_sums, wait_state, row, memory, call, shape, polling):
    """Add the sums of the C slices of a row, in order. A program that failed sends NaN, so no program waits for it.
    Each thread polls by itself, without a barrier, and a thread whose time is over reports by itself: the other
    threads may have read all sums (tests: sums_model.py)."""
    c = call.slice_index
    lines = memory.sums + row.sums * shape.C * LINE_WORDS
    for i in tl.static_range(shape.SLICES):
        own_sum = _word(slice_sums[i], wait_state)
        for reader in tl.static_range(shape.C // shape.SLICES):
            line = lines + reader * LINE_WORDS
            tl.store(line + c + i, own_sum, mask=c != reader * shape.SLICES, cache_modifier=".wt")
    own_line = lines + c // shape.SLICES * LINE_WORDS
    total = 0.0
    sums_state = WAIT_MISSING
    polls = 0
    wait_start_ns = tl.full((), 0, tl.int64)
    while sums_state == WAIT_MISSING:
        total = 0.0
        sums_state = 0
        for source in tl.static_range(shape.C):
            own_sum = _word(slice_sums[source % shape.SLICES], wait_state)
            is_own = c // shape.SLICES == source // shape.SLICES
            word = tl.load(own_line + source, mask=is_own == 0, other=own_sum, volatile=True)
            total += word.to(tl.float32, bitcast=True)
            sums_state |= (word == SENTINEL).to(tl.int32)
        polls += 1
        if polls % 1024 == 0:
            wait_bits, wait_start_ns = check_wait(memory, call, wait_start_ns, True, polling.INTERPRETED)
            sums_state |= tl.where(sums_state == WAIT_MISSING, wait_bits, 0)
    if sums_state > WAIT_MISSING:
        threads: tl.constexpr = shape.SLICES * shape.BLOCK // (4 * polling.UNITS)
        report_failure(memory, call, row.number, sums_state, 0, tl.zeros((threads,), tl.int32), shape.N)
    return tl.where(sums_state == 0, total, float("nan"))


@triton.jit
def _word(slice_sum, wait_state):
    return without_sentinel(tl.where(wait_state == 0, slice_sum, float("nan")).to(tl.uint32, bitcast=True))


@triton.jit
def clear_sums(place, memory, call, shape):
    """Make the words for one program SENTINEL again, when all of its threads have read them."""
    tl.debug_barrier()
    own = call.slice_index // shape.SLICES
    line = memory.sums + (place * shape.C + own) * LINE_WORDS
    for source in tl.static_range(shape.C):
        tl.store(line + source, SENTINEL, mask=own != source // shape.SLICES, cache_modifier=".wt")
