"""What fusing is measured against where nothing better is at hand: an all-reduce that pulls.

The common design of a custom all-reduce: all ranks meet, each reads everybody's rows and sums them, and all meet
again before a row may be overwritten. By two-shot each sums only its part of the rows, and after the second meeting
reads the other parts' sums. It takes addresses, so that it serves Paddle and torch alike.

A rank's memory, which all ranks can address: the counter that each program arrives with, by barrier, program and
rank; each program's number of calls; whether a meeting was missed; the addresses of all ranks; from DATA on the rows
to be reduced, and behind the most rows of a call the sums of this rank's part.
"""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.packing import pointer

PROGRAMS, NUM_WARPS, BLOCK = 36, 16, 4096  # as hosts launch theirs; 512 threads, 16 bytes of halves each
MOST_RANKS = 8
COUNTS = 2 * PROGRAMS * MOST_RANKS * 4
MISSED = COUNTS + PROGRAMS * 4
ADDRESSES = 4096 - 8 * MOST_RANKS
DATA = 4096

_PROGRAMS, _RANKS, _TRIES = tl.constexpr(PROGRAMS), tl.constexpr(MOST_RANKS), tl.constexpr(1 << 24)
_COUNTS, _MISSED = tl.constexpr(COUNTS), tl.constexpr(MISSED)
_ADDRESSES, _DATA = tl.constexpr(ADDRESSES), tl.constexpr(DATA)


@triton.jit
def meet(own, rank, place, number, N: tl.constexpr, ORDERED: tl.constexpr):
    """Tell every rank that this program has come for call `number`, and wait until that program of every rank has.

    ORDERED, which takes time: what a program has written before is seen by the same program of the other ranks.
    Without it only the counters cross: rows were written by a kernel that ended before, and are read after they met.
    Bounded: where a rank is missing the sums are wrong, and the word at MISSED says so.
    """
    ranks = tl.arange(0, _RANKS)
    tl.debug_barrier()  # every thread of this program has come
    bases = tl.load(pointer(own + _ADDRESSES, tl.int64) + ranks, mask=ranks < N, other=0)
    theirs = (bases + (place * _RANKS + rank) * 4).to(tl.pointer_type(tl.int32))
    if ORDERED:
        tl.atomic_xchg(theirs, number + tl.zeros_like(ranks), mask=ranks < N, sem="release", scope="sys")
    else:
        tl.store(theirs, number + tl.zeros_like(ranks), mask=ranks < N, cache_modifier=".wt")
    mine = pointer(own, tl.int32) + place * _RANKS + ranks
    arrived = tl.load(mine, mask=ranks < N, other=2147483647, volatile=True)
    tries = 0
    while (tl.min(arrived, axis=0) < number) & (tries < _TRIES):
        arrived = tl.load(mine, mask=ranks < N, other=2147483647, volatile=True)
        tries += 1
    tl.store(pointer(own, tl.int32) + _MISSED // 4, 1, mask=tries >= _TRIES)
    if ORDERED:
        tl.atomic_add(mine, tl.zeros_like(ranks), mask=ranks < N, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["own", "out", "sums", "units", "part", "rank"])
def pull_all_reduce(
    own,
    out,
    sums,
    units,
    part,
    rank,
    N: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    TWO_SHOT: tl.constexpr,
):
    """Sum the rows of all ranks, of `units` 16-byte units of UNIT elements, in fp32 and in rank order.

    By two-shot a rank sums `part` units, and its sums lie `sums` bytes behind the begin of its memory.
    """
    program = tl.program_id(0)
    count = own.to(tl.pointer_type(tl.int32)) + _COUNTS // 4 + program
    number = tl.load(count) + 1
    meet(own, rank, program, number, N, False)
    total = units * UNIT  # a whole number of units, so that a mask splits none of them
    first, last, to = 0, total, out
    if TWO_SHOT:
        first = rank * part * UNIT
        last = tl.minimum(first + part * UNIT, total)
        to = own + sums
    start = first + program * SIZE
    while start < last:
        at = start + tl.arange(0, SIZE)
        summed = tl.zeros((SIZE,), tl.float32)
        for peer in tl.static_range(N):
            base = tl.load(pointer(own + _ADDRESSES, tl.int64) + peer)
            rows = pointer(base, DTYPE) + _DATA // 16 * UNIT
            summed += tl.load(rows + at, mask=at < last, other=0).to(tl.float32)
        tl.store(pointer(to, DTYPE) + at, summed.to(DTYPE), mask=at < last)
        start += _PROGRAMS * SIZE
    meet(own, rank, _PROGRAMS + program, number, N, TWO_SHOT)
    if TWO_SHOT:  # a program reads what the same program of the other ranks has summed
        start = program * SIZE
        while start < part * UNIT:
            inside = start + tl.arange(0, SIZE)
            for peer in tl.static_range(N):
                base = tl.load(pointer(own + _ADDRESSES, tl.int64) + peer)
                at = peer * part * UNIT + inside
                right = (inside < part * UNIT) & (at < total)
                found = tl.load(pointer(base + sums, DTYPE) + at, mask=right, other=0)
                tl.store(pointer(out, DTYPE) + at, found, mask=right)
            start += _PROGRAMS * SIZE
    tl.store(count, number)
