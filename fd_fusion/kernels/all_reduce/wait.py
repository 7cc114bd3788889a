"""How a program waits for words of other ranks and of its neighbours, and what it does when they do not come.

The state of a wait is 0 or bits WAIT_*: error_page.py.
"""

import os
import time

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce import error_page, plan
from fd_fusion.kernels.all_reduce.packing import ONES, at, both, sendable

ERROR_TIMED_OUT, ERROR_ABORTED = tl.constexpr(error_page.ERROR_TIMED_OUT), tl.constexpr(error_page.ERROR_ABORTED)
ERROR_TWO_STREAMS = tl.constexpr(error_page.ERROR_TWO_STREAMS)
WAIT_MISSING, WAIT_ABORTED = tl.constexpr(error_page.WAIT_MISSING), tl.constexpr(error_page.WAIT_ABORTED)
WAIT_TIMED_OUT = tl.constexpr(error_page.WAIT_TIMED_OUT)
WAIT_TWO_STREAMS = tl.constexpr(error_page.WAIT_TWO_STREAMS)
_RESULTS = tl.constexpr((tl.uint32,) * 8 + (tl.int32,))
COUNTER, ROWS = tl.constexpr(plan.COUNTER), tl.constexpr(plan.ROWS)  # 8-byte words of local memory
HEAD = tl.constexpr(plan.HEAD_WORDS)
LINE = tl.constexpr(plan.LINE // 4)  # 4-byte words of a line of the cache
CONTROL = tl.constexpr(plan.CONTROL_BYTES // 4)  # 4-byte words of the control page
TURN = tl.constexpr(plan.TURN)


def host_clock():
    """The interpreter's clock, in nanoseconds, as `globaltimer` gives them; the rank that is waited for may need
    this processor. Never compiled. Monotonic: a wall clock that is set while a rank waits would end its group; and
    while this process does not run, because the whole machine may be suspended, it goes on by half a second at most.
    """
    os.sched_yield()
    seen, shown = _clock
    now = time.monotonic_ns()
    _clock[:] = now, shown + min(now - seen, 500_000_000)
    return _clock[1]


_clock = [0, 0]  # when the machine's clock was last looked at, and what it was taken for
host_clock.__triton_builtin__ = True  # the compiler looks at every name, in branches that it drops too


@triton.jit
def take_turn(local, rows):
    """Add this program's share to the counter of launches, which it has read. The turn is full when all programs have
    read it: then it counts for the next launch."""
    first = tl.program_id(0) == 0
    others = tl.num_programs(0) - 1
    share = tl.where(first, TURN - others, 1).to(tl.uint64)
    tl.atomic_add(local + COUNTER, share, sem="relaxed", scope="gpu")
    tl.atomic_add(local + ROWS, rows.to(tl.uint64), mask=first, sem="relaxed", scope="gpu")


@triton.jit
def has_moved(seen, turn):
    """Whether the counter shows that another launch has begun before this one has ended: there are two streams."""
    return seen > (turn + 1) * TURN


@triton.jit
def look_up(local, home, turn, since, SECONDHAND: tl.constexpr, INTERPRETED: tl.constexpr):
    """When words stay missing: is the group dead, is the time over, did another stream come by?

    SECONDHAND: what is waited for itself waits for other ranks (an owner, a neighbour). It gets a quarter more time
    than it has itself, so that it is the one to run out and to say which rank is missing.

    Returns the bits to add to the state of the wait (WAIT_*), and when it was first asked.
    """
    if INTERPRETED:
        now = host_clock()
    else:
        now = tl.extra.cuda.globaltimer()
    since = tl.where(since == 0, now, since)
    limit = tl.load(local, volatile=True).to(tl.int64)
    if SECONDHAND:
        limit += limit >> 2
    over = now - since > limit
    aborted = tl.load(home, volatile=True) != 0
    moved = has_moved(tl.load(local + COUNTER, volatile=True), turn)
    bits = tl.where(over, WAIT_TIMED_OUT, 0) | tl.where(aborted, WAIT_ABORTED, 0)
    return bits | tl.where(moved, WAIT_TWO_STREAMS, 0), since


@triton.jit
def report(local, state, missing, op, row, turn, who, N: tl.constexpr):
    """Write the error page, once, and tell every rank unless told of it. Plain stores: threads may differ here.

    who: zero, or a zero for each thread. A scalar is stored by thread 0 alone, whoever else comes here.
    """
    told = (state & WAIT_ABORTED) != 0
    code = tl.where((state & WAIT_TWO_STREAMS) != 0, ERROR_TWO_STREAMS, ERROR_TIMED_OUT)
    code = tl.where(told, ERROR_ABORTED, code)
    page = at(tl.load(local + 1), tl.uint64) + tl.where(told, 2, 0)
    every = who == 0
    record = (row.to(tl.uint64) << 40) | (op.to(tl.uint64) << 16) | (code | (missing << 4)).to(tl.uint64)
    first = tl.load(page, volatile=True) == 0
    tl.store(page + 1 + who, turn, mask=both(every, first), cache_modifier=".wt")
    tl.store(page + who, record, mask=both(every, first), cache_modifier=".wt")
    for p in tl.static_range(N):
        tl.store(
            at(tl.load(local + 2 + p), tl.uint32) + who,
            1,
            mask=both(every, code != ERROR_ABORTED),
            cache_modifier=".wt",
        )


@triton.jit
def peers_of(local, rank, N: tl.constexpr):
    """The memories of the ranks after this one, cyclically. All are read before anything waits for one."""
    table = local + 2
    a = at(tl.load(table + (rank + 1) % N, volatile=True), tl.uint32)
    b = at(tl.load(table + (rank + 2) % N, volatile=True), tl.uint32) if N > 2 else a
    c = at(tl.load(table + (rank + 3) % N, volatile=True), tl.uint32) if N > 3 else a
    d = at(tl.load(table + (rank + 4) % N, volatile=True), tl.uint32) if N > 4 else a
    e = at(tl.load(table + (rank + 5) % N, volatile=True), tl.uint32) if N > 5 else a
    f = at(tl.load(table + (rank + 6) % N, volatile=True), tl.uint32) if N > 6 else a
    g = at(tl.load(table + (rank + 7) % N, volatile=True), tl.uint32) if N > 7 else a
    return a, b, c, d, e, f, g


@triton.jit
def place_of(source, reader, N: tl.constexpr):
    """Where a rank's words lie in a slot of another: the last rank's where the reader's own would."""
    return tl.where(source < N - 1, source, reader)


@triton.jit
def _word(slot, own, source, me, words, mask, N: tl.constexpr, SLICE: tl.constexpr):
    place = place_of(source, me, N) * SLICE
    return tl.load(slot + place + words, mask=both(mask, me != source), other=own, volatile=True)


@triton.jit
def look(slot, own, me, words, mask, N: tl.constexpr, SLICE: tl.constexpr, POLL: tl.constexpr,
          OPERANDS: tl.constexpr, UNITS: tl.constexpr):  # fmt: skip
    """The words of N ranks in a slot; those of rank `me` are `own`, which nobody sends. From N on they repeat others.

    Under the interpreter one look. On a GPU each thread looks until its own words have come or it is tired, with
    no barrier: poll_ptx.py. Returns eight rows, and 1 for each word that has not come.
    """
    if POLL is None:
        a = _word(slot, own, 0, me, words, mask, N, SLICE)
        b = _word(slot, own, 1, me, words, mask, N, SLICE)
        c = _word(slot, own, 2, me, words, mask, N, SLICE) if N > 2 else a
        d = _word(slot, own, 3, me, words, mask, N, SLICE) if N > 3 else a
        e = _word(slot, own, 4, me, words, mask, N, SLICE) if N > 4 else a
        f = _word(slot, own, 5, me, words, mask, N, SLICE) if N > 5 else a
        g = _word(slot, own, 6, me, words, mask, N, SLICE) if N > 6 else a
        h = _word(slot, own, 7, me, words, mask, N, SLICE) if N > 7 else a
        late = (a == ONES) | (b == ONES) | (c == ONES) | (d == ONES)
        late = (late | (e == ONES) | (f == ONES) | (g == ONES) | (h == ONES)).to(tl.int32)
    else:
        absent = tl.where(mask, me, 8)
        a, b, c, d, e, f, g, h, late = tl.inline_asm_elementwise(
            POLL, OPERANDS, [own, (slot + words).to(tl.int64), absent], _RESULTS, False, 4 * UNITS)  # fmt: skip
    return a, b, c, d, e, f, g, h, late


@triton.jit
def clear(slot, words, mask, PLACES: tl.constexpr, SLICE: tl.constexpr):
    """Make the words in the first places of a slot unsent again."""
    for place in tl.static_range(PLACES):
        unsent = tl.full(words.shape, ONES, tl.uint32)
        tl.store(slot + place * SLICE + words, unsent, mask=mask, cache_modifier=".wt")


@triton.jit
def sum_slices(part, state, local, home, sums, c, turn, op, row, N: tl.constexpr, C: tl.constexpr,
                THREADS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """The sum over the C programs of a row, in slice order. A program that failed hands on NaN, so nobody waits
    for it. `sums`: a line for each of the programs, with a word from each; they are unsent like those of the slots,
    and made unsent again when all threads have read them (`clear_sums`). Each thread looks by itself, without a
    barrier, and one whose time is over reports by itself: the others may have found all (tests: sums_model.py)."""
    own = sendable(tl.where(state == 0, part, float("nan")).to(tl.uint32, bitcast=True))
    for reader in tl.static_range(C):
        tl.store(sums + reader * LINE + c, own, mask=c != reader, cache_modifier=".wt")
    total = 0.0
    late = WAIT_MISSING
    looks = 0
    since = tl.full((), 0, tl.int64)
    while late == WAIT_MISSING:
        total = 0.0
        late = 0
        for source in tl.static_range(C):
            word = tl.load(sums + c * LINE + source, mask=c != source, other=own, volatile=True)
            total += word.to(tl.float32, bitcast=True)
            late |= (word == ONES).to(tl.int32)
        looks += 1
        if looks % 1024 == 0:
            dead, since = look_up(local, home, turn, since, True, INTERPRETED)
            late |= tl.where(late == WAIT_MISSING, dead, 0)
    if late > WAIT_MISSING:
        report(local, late, 0, op, row, turn, tl.zeros((THREADS,), tl.int32), N)
    return tl.where(late == 0, total, float("nan"))


@triton.jit
def clear_sums(sums, c, C: tl.constexpr):
    """Make the sums for program c unsent again, when all of its threads have read them."""
    tl.debug_barrier()
    for source in tl.static_range(C):
        tl.store(sums + c * LINE + source, ONES, mask=c != source, cache_modifier=".wt")
