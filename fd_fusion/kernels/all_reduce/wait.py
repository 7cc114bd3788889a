"""Wait for the words of other ranks and of the programs that share a row, and report words that do not come.

The state of a wait is 0, or a sum of the bits WAIT_*: `error_page.py`.
"""

import os
import time

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce import error_page, plan
from fd_fusion.kernels.all_reduce.packing import SENTINEL, mask_if, pointer

ERROR_TIMED_OUT, ERROR_ABORTED = tl.constexpr(error_page.ERROR_TIMED_OUT), tl.constexpr(error_page.ERROR_ABORTED)
ERROR_TWO_STREAMS = tl.constexpr(error_page.ERROR_TWO_STREAMS)
WAIT_MISSING, WAIT_ABORTED = tl.constexpr(error_page.WAIT_MISSING), tl.constexpr(error_page.WAIT_ABORTED)
WAIT_TIMED_OUT = tl.constexpr(error_page.WAIT_TIMED_OUT)
WAIT_TWO_STREAMS = tl.constexpr(error_page.WAIT_TWO_STREAMS)
ERROR_PAGE, ADDRESSES = tl.constexpr(plan.ERROR_PAGE), tl.constexpr(plan.ADDRESSES)
COUNTER, ROWS = tl.constexpr(plan.COUNTER), tl.constexpr(plan.ROWS)
COUNTER_STEP = tl.constexpr(plan.COUNTER_STEP)
LINE_WORDS = tl.constexpr(plan.LINE_BYTES // 4)
_POLLED = tl.constexpr((tl.uint32,) * 8 + (tl.int32,))


def host_clock():
    """Read the interpreter's clock, in nanoseconds like `globaltimer`; the rank that is waited for may need this
    processor. Never compiled. Monotonic: a wall clock that is set while a rank waits would end its group. While this
    process does not run, because the whole machine may be suspended, the clock goes on by half a second at most.
    """
    os.sched_yield()
    last_read, shown = _clock
    now = time.monotonic_ns()
    _clock[:] = now, shown + min(now - last_read, 500_000_000)
    return _clock[1]


_clock = [0, 0]  # the machine's clock at the last read, and what `host_clock` returned
host_clock.__triton_builtin__ = True  # the compiler reads every name, in branches that it drops too


@triton.jit
def count_launch(state_memory, rows, rounds):
    """Add this program's share to the counter of rounds, which it has read. When all programs of a launch have added
    their shares, all have read the counter, and the counter shows the first round of the next launch."""
    is_first = tl.program_id(0) == 0
    others = tl.num_programs(0) - 1
    share = tl.where(is_first, rounds * COUNTER_STEP - others, 1).to(tl.uint64)
    tl.atomic_add(state_memory + COUNTER, share, sem="relaxed", scope="gpu")
    tl.atomic_add(state_memory + ROWS, rows.to(tl.uint64), mask=is_first, sem="relaxed", scope="gpu")


@triton.jit
def shows_two_streams(counter_now, call):
    """Return whether the counter shows that another launch has begun before this one has ended."""
    return counter_now > (call.first_round + call.rounds) * COUNTER_STEP


@triton.jit
def abort_bits(memory):
    """Return the state of a wait that begins: aborted where the group is dead."""
    return tl.where(tl.load(memory.own_slots, volatile=True) != 0, WAIT_ABORTED, 0)


@triton.jit
def check_wait(memory, call, wait_start_ns, INDIRECT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Check a long wait against its time limit, the abort word and the counter of launches.

    INDIRECT: the wait is for a program that itself waits for other ranks (an owner, one that shares the row). Its
    limit is a quarter longer, so that the other wait is the first to end, and its report has the missing rank.

    Returns the bits to add to the state of the wait, and the time of the first check.
    """
    if INTERPRETED:
        now = host_clock()
    else:
        now = tl.extra.cuda.globaltimer()
    wait_start_ns = tl.where(wait_start_ns == 0, now, wait_start_ns)
    limit = tl.load(memory.state_memory, volatile=True).to(tl.int64)
    if INDIRECT:
        limit += limit >> 2
    timed_out = now - wait_start_ns > limit
    aborted = tl.load(memory.own_slots, volatile=True) != 0
    two_streams = shows_two_streams(tl.load(memory.state_memory + COUNTER, volatile=True), call)
    bits = tl.where(timed_out, WAIT_TIMED_OUT, 0) | tl.where(aborted, WAIT_ABORTED, 0)
    return bits | tl.where(two_streams, WAIT_TWO_STREAMS, 0), wait_start_ns


@triton.jit
def report_failure(memory, call, row_number, wait_state, missing_ranks, thread_zeros, N: tl.constexpr):
    """Write the error page, once, and set the abort word of every rank, unless it was set. Plain stores: the threads
    of a program may differ here.

    thread_zeros: zero, or a zero for each thread. A scalar is stored by thread 0 alone, whichever threads are here.
    """
    was_aborted = (wait_state & WAIT_ABORTED) != 0
    code = tl.where((wait_state & WAIT_TWO_STREAMS) != 0, ERROR_TWO_STREAMS, ERROR_TIMED_OUT)
    code = tl.where(was_aborted, ERROR_ABORTED, code)
    page = pointer(tl.load(memory.state_memory + ERROR_PAGE), tl.uint64) + tl.where(was_aborted, 2, 0)
    every_thread = thread_zeros == 0
    low_bits = code | (missing_ranks << 4)
    record = (row_number.to(tl.uint64) << 40) | (call.op.to(tl.uint64) << 16) | low_bits.to(tl.uint64)
    is_empty = tl.load(page, volatile=True) == 0
    tl.store(page + 1 + thread_zeros, call.first_round, mask=mask_if(every_thread, is_empty), cache_modifier=".wt")
    tl.store(page + thread_zeros, record, mask=mask_if(every_thread, is_empty), cache_modifier=".wt")
    for rank in tl.static_range(N):
        abort_word = pointer(tl.load(memory.state_memory + ADDRESSES + rank), tl.uint32) + thread_zeros
        tl.store(abort_word, 1, mask=mask_if(every_thread, code != ERROR_ABORTED), cache_modifier=".wt")


@triton.jit
def peer_memories(state_memory, rank, N: tl.constexpr):
    """Load the addresses of the ranks after this one, cyclically. All are read before anything waits for one."""
    table = state_memory + ADDRESSES
    a = pointer(tl.load(table + (rank + 1) % N, volatile=True), tl.uint32)
    b = pointer(tl.load(table + (rank + 2) % N, volatile=True), tl.uint32) if N > 2 else a
    c = pointer(tl.load(table + (rank + 3) % N, volatile=True), tl.uint32) if N > 3 else a
    d = pointer(tl.load(table + (rank + 4) % N, volatile=True), tl.uint32) if N > 4 else a
    e = pointer(tl.load(table + (rank + 5) % N, volatile=True), tl.uint32) if N > 5 else a
    f = pointer(tl.load(table + (rank + 6) % N, volatile=True), tl.uint32) if N > 6 else a
    g = pointer(tl.load(table + (rank + 7) % N, volatile=True), tl.uint32) if N > 7 else a
    return a, b, c, d, e, f, g


@triton.jit
def place_of(source, reader, N: tl.constexpr):
    """Return the place of a rank's words in a slot of a reader: the last rank's is where the reader's would be."""
    return tl.where(source < N - 1, source, reader)


@triton.jit
def _words_of(source, row, own_rank, N: tl.constexpr, PLACE: tl.constexpr):
    place = place_of(source, own_rank, N) * PLACE
    mask = mask_if(row.mask, own_rank != source)
    return tl.load(row.own_slot + place + row.offsets, mask=mask, other=row.words, volatile=True)


@triton.jit
def poll_slot(row, own_rank, N: tl.constexpr, PLACE: tl.constexpr, POLL: tl.constexpr, polling):
    """Read the words of N ranks in a slot; those of `own_rank` are `row.words`, which no rank sends.

    The interpreter polls once. On a GPU each thread polls until its own words have come, or for so many tries, with
    no barrier: poll_ptx.py. Returns eight rows, from N on copies of others, and 1 for each word that is missing.
    """
    if POLL is None:
        a = _words_of(0, row, own_rank, N, PLACE)
        b = _words_of(1, row, own_rank, N, PLACE)
        c = _words_of(2, row, own_rank, N, PLACE) if N > 2 else a
        d = _words_of(3, row, own_rank, N, PLACE) if N > 3 else a
        e = _words_of(4, row, own_rank, N, PLACE) if N > 4 else a
        f = _words_of(5, row, own_rank, N, PLACE) if N > 5 else a
        g = _words_of(6, row, own_rank, N, PLACE) if N > 6 else a
        h = _words_of(7, row, own_rank, N, PLACE) if N > 7 else a
        missing = (a == SENTINEL) | (b == SENTINEL) | (c == SENTINEL) | (d == SENTINEL)
        missing = missing | (e == SENTINEL) | (f == SENTINEL) | (g == SENTINEL) | (h == SENTINEL)
        missing_words = missing.to(tl.int32)
    else:
        skipped_rank = tl.where(row.mask, own_rank, 8)
        a, b, c, d, e, f, g, h, missing_words = tl.inline_asm_elementwise(
            POLL, polling.OPERANDS, [row.words, (row.own_slot + row.offsets).to(tl.int64), skipped_rank], _POLLED,
            False, 4 * polling.UNITS)  # fmt: skip
    return a, b, c, d, e, f, g, h, missing_words


@triton.jit
def clear_slot(row, mask, PLACES: tl.constexpr, PLACE: tl.constexpr):
    """Fill the first places of a slot with SENTINEL again."""
    for place in tl.static_range(PLACES):
        sentinels = tl.full(row.offsets.shape, SENTINEL, tl.uint32)
        tl.store(row.own_slot + place * PLACE + row.offsets, sentinels, mask=mask, cache_modifier=".wt")
