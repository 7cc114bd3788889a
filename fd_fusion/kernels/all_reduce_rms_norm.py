"""All-reduce + residual add + RMSNorm of one row a program, by words that say themselves that they have arrived.

    s = ((x_0 + x_1) + ... + x_{N-1}) + residual           in fp32, in rank order, on every rank
    residual_out = round(s);  norm_out = round(s * rsqrt(mean(s^2) + eps) * (weight + weight_offset))

A rank pushes its row into a slot of every peer (one-shot), or of the row's owner, which pushes back the finished
rows (two-shot: the owner of row t is rank t % N). A reader polls until every word has come. Slots belong to
programs, not rows: program g works on rows g, g+G, ..., counts its own epochs and alternates between two
buffers by `epoch & 1`. Reuse is safe because a rank in epoch e of a program has seen every peer start e-1, hence
finish e-2; that holds on both paths and on any mixture of them, since they share the epochs.

Bits: equal on all ranks, for every T and on both paths. The path after the words is one and the same `_finish`,
its shape is a function of (N, H, dtype) alone (`plan.py`), and nothing is specialized on a run-time value.

Memory, in bytes, sizes in `plan.py`, one set for each (group, H, dtype):
- symmetric (every rank addresses every rank's): word 0 (uint32) of the control page at offset 0 is the abort
  word. From offset 256 on the slots. Before the first call and at a reset the control page is zero and the slots
  are filled with `symmetric_fill`.
- local (`local_words`), int64: [0] the limit on waiting (nanoseconds; read only
  when a wait is already long, so it may be changed at any time), [1] the address of the error page,
  [2..2+N) the addresses of the ranks' symmetric memory; from [16] on three words a program: the epoch (a uint32
  bit pattern, never 0 once used) and two that programs sharing a row exchange sums in.
- error page: 64 bytes of pinned host memory, zero at first, words of int64, written with plain stores:
  [0] record, [1] epoch of the first failure seen here; [2] record, [3] epoch of a program that found the abort
  word set. A record is code | missing ranks as bits << 4 | op << 16 | row << 40: `read_error_page`.

Bounded wait: the first program that runs out of time sets the abort word of every rank, writes its error page and
NaN. A program that finds the abort word set pushes nothing, waits for nothing and writes NaN. The abort word of
a rank that starts no further call is the only sign there, so its host must look at it too. After that the
workspace is dead until a collective reset (synchronize, barrier, fill all three memories again, barrier).
Two streams on one workspace: an epoch that moved while a program ran is reported and aborts the group likewise.

Source: the words are NCCL's LL and TensorRT-LLM's Lamport ideas; the code is new.
"""

import os
import time

import triton
import triton.language as tl

from fd_fusion.kernels._lanes import NAN_LANE, at, clear, load_weight, pack, receive, send, unpack

_MISSING, _TOLD, _TIMED_OUT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)  # states of a wait; 0 is done


@triton.jit
def _add_or(sum_a, state_a, sum_b, state_b):
    return sum_a + sum_b, state_a | state_b


@triton.jit
def _total(squares, states, INTERPRETED: tl.constexpr):
    """Sum and union over the program in one pass. It also makes the state the same for all threads, each of
    which has looked at clock and memory by itself."""
    if INTERPRETED:  # where a reduction of pairs is a Python loop over the elements
        total, state = tl.sum(squares, axis=0), tl.max(states, axis=0)
    else:
        total, state = tl.reduce((squares, states), 0, _add_or)
    return total, state


def host_clock():
    """The interpreter's clock, in nanoseconds, as `globaltimer` gives them; the rank that is waited for may need
    this processor. Never compiled."""
    os.sched_yield()
    return time.time_ns()


@triton.jit
def _look_up(local, rank, polls, since, INTERPRETED: tl.constexpr):
    """After many polls: is the group dead, is the time over? Returns the state to add and the first look's time."""
    if INTERPRETED:
        now = host_clock()
    else:
        now = tl.extra.cuda.globaltimer()
    since = tl.where(since == 0, now, since)
    abort = tl.load(at(tl.load(local + 2 + rank), tl.uint32), volatile=True)
    limit = tl.load(local, volatile=True).to(tl.int64)
    dead = tl.where(abort != 0, _TOLD, 0) | tl.where(now - since > limit, _TIMED_OUT, 0)
    return dead, since


@triton.jit
def _report(local, code, missing, op, row, epoch, N: tl.constexpr):
    """Write the error page and, unless told of it, tell every rank. Plain stores: threads may differ here."""
    page = at(tl.load(local + 1), tl.uint64) + tl.where(code == 2, 2, 0)
    record = (row.to(tl.uint64) << 40) | (op.to(tl.uint64) << 16) | (code | (missing << 4)).to(tl.uint64)
    tl.store(page + 1, epoch, cache_modifier=".wt")
    tl.store(page, record, cache_modifier=".wt")
    for p in tl.static_range(N):
        tl.store(at(tl.load(local + 2 + p), tl.uint32), 1, mask=code != 2, cache_modifier=".wt")


@triton.jit
def _sum_slices(part, state, local, pid, rank, op, row, epoch, N: tl.constexpr, C: tl.constexpr,
                INTERPRETED: tl.constexpr):  # fmt: skip
    """The sum over the C programs of a row, in slice order. A program that failed hands on NaN, so nobody waits
    for it. Every thread polls by itself: the words carry the epoch, so all see the same, and there is no barrier."""
    part = tl.where(state == 0, part, float("nan"))
    words = local + 16 + 3 * (pid - pid % C) + 1 + (epoch & 1).to(tl.int32)
    bits = part.to(tl.uint32, bitcast=True).to(tl.uint64)
    tl.store(words + 3 * (pid % C), (bits << 32) | epoch, cache_modifier=".wt")
    total = 0.0
    late = 1
    polls = 0
    since = tl.full((), 0, tl.int64)
    while late == 1:
        total = 0.0
        late = 0
        for c in tl.static_range(C):
            word = tl.load(words + 3 * c, volatile=True)
            total += (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
            late |= (word.to(tl.uint32) != epoch.to(tl.uint32)).to(tl.int32)
        polls += 1
        if polls % 1024 == 0:
            dead, since = _look_up(local, rank, polls, since, INTERPRETED)
            late |= dead
    if late > 1:
        _report(local, tl.where((late & _TOLD) != 0, 2, 1), 0, op, row, epoch, N)
    return tl.where(late == 0, total, float("nan"))


@triton.jit
def _finish(own, residual, weight, slots, local, lanes, mask, pid, rank, op, row, epoch, dead, eps, weight_offset,
            N: tl.constexpr, H: tl.constexpr, SLICE: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr,
            WEIGHT_DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SENTINEL: tl.constexpr,
            INTERPRETED: tl.constexpr):  # fmt: skip
    """Wait for the peers' words of one slice; then the sum and the norm. Returns (norm, residual) lanes, state, epoch."""
    WORDS: tl.constexpr = SLICE if SENTINEL else 2 * SLICE
    wa, wb, wc, wd = load_weight(weight, lanes + (pid % C) * SLICE, mask, DTYPE, WEIGHT_DTYPE)
    if HAS_RESIDUAL:
        res = tl.load(residual + lanes, mask=mask, other=0)
    a = tl.zeros(lanes.shape, tl.float32)
    b, c, d = a, a, a
    total = 0.0
    state = 1
    polls = 0
    since = tl.full((), 0, tl.int64)
    while state == 1:
        states = tl.zeros(lanes.shape, tl.int32) | dead
        for p in tl.static_range(N):
            lane, late = receive(slots + p * WORDS, lanes, mask & (p != rank), epoch, SLICE, SENTINEL)
            states = states | late
            pa, pb, pc, pd = unpack(tl.where(p == rank, own, lane), DTYPE)
            if p == 0:
                a, b, c, d = pa, pb, pc, pd
            else:
                a, b, c, d = a + pa, b + pb, c + pc, d + pd
        if HAS_RESIDUAL:
            pa, pb, pc, pd = unpack(res, DTYPE)
            a, b, c, d = a + pa, b + pb, c + pc, d + pd
        total, state = _total((a * a + b * b) + (c * c + d * d), states, INTERPRETED)
        polls += 1
        if INTERPRETED or polls % 1024 == 0:
            dead, since = _look_up(local, rank, polls, since, INTERPRETED)
    moved = tl.load(local + 16 + 3 * pid, volatile=True)
    if state != 0:
        missing = 0
        for p in tl.static_range(N):
            _, late = receive(slots + p * WORDS, lanes, mask & (p != rank), epoch, SLICE, SENTINEL)
            missing |= tl.max(late, axis=0) << p
        _report(local, tl.where((state & _TOLD) != 0, 2, 1), missing, op, row, epoch, N)
    elif SENTINEL:
        for p in tl.static_range(N):
            clear(slots + p * WORDS, lanes, mask & (p != rank))
    if C > 1:
        total = _sum_slices(total, state, local, pid, rank, op, row, epoch, N, C, INTERPRETED)
    scale = tl.rsqrt(total * (1.0 / H) + eps)
    norm = pack(a * scale * (wa + weight_offset), b * scale * (wb + weight_offset),
                c * scale * (wc + weight_offset), d * scale * (wd + weight_offset), DTYPE, INTERPRETED)  # fmt: skip
    summed = pack(a, b, c, d, DTYPE, INTERPRETED)
    return tl.where(state == 0, norm, NAN_LANE), tl.where(state == 0, summed, NAN_LANE), state, moved


@triton.jit
def _take_results(words, local, lanes, mask, pid, rank, op, row, epoch, dead, N: tl.constexpr, SLICE: tl.constexpr,
                  SENTINEL: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Two-shot, not the owner: wait for the finished rows. Returns as `_finish`."""
    WORDS: tl.constexpr = SLICE if SENTINEL else 2 * SLICE
    norm = tl.zeros(lanes.shape, tl.uint64)
    summed = norm
    state = 1
    polls = 0
    since = tl.full((), 0, tl.int64)
    while state == 1:
        norm, late = receive(words, lanes, mask, epoch, SLICE, SENTINEL)
        summed, late_too = receive(words + WORDS, lanes, mask, epoch, SLICE, SENTINEL)
        state = tl.max(late | late_too | dead, axis=0)
        polls += 1
        if INTERPRETED or polls % 1024 == 0:
            dead, since = _look_up(local, rank, polls, since, INTERPRETED)
    moved = tl.load(local + 16 + 3 * pid, volatile=True)
    if state != 0:
        _report(local, tl.where((state & _TOLD) != 0, 2, 1), 1 << (row % N), op, row, epoch, N)
    elif SENTINEL:
        clear(words, lanes, mask)
        clear(words + WORDS, lanes, mask)
    return tl.where(state == 0, norm, NAN_LANE), tl.where(state == 0, summed, NAN_LANE), state, moved


@triton.jit
def _peers(table, rank, N: tl.constexpr):
    """The addresses of the ranks after this one, cyclically. All are read before anything waits for one."""
    a = tl.load(table + (rank + 1) % N, volatile=True)
    b = tl.load(table + (rank + 2) % N, volatile=True) if N > 2 else a
    c = tl.load(table + (rank + 3) % N, volatile=True) if N > 3 else a
    d = tl.load(table + (rank + 4) % N, volatile=True) if N > 4 else a
    e = tl.load(table + (rank + 5) % N, volatile=True) if N > 5 else a
    f = tl.load(table + (rank + 6) % N, volatile=True) if N > 6 else a
    g = tl.load(table + (rank + 7) % N, volatile=True) if N > 7 else a
    return a, b, c, d, e, f, g


@triton.jit(do_not_specialize=["x", "residual", "weight", "norm_out", "residual_out", "local", "home", "rows", "rank", "op"])
def all_reduce_rms_norm(x, residual, weight, norm_out, residual_out, local, home, rows, rank, op, eps, weight_offset,
                        N: tl.constexpr, LANES: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
                        C: tl.constexpr, DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
                        HAS_RESIDUAL: tl.constexpr, TWO_SHOT: tl.constexpr, SENTINEL: tl.constexpr,
                        INTERPRETED: tl.constexpr):  # fmt: skip
    """The kernel. Launch it with `grid` and `constants` of `plan.py`, on every rank in the same order.

    Args:
        x, residual, norm_out, residual_out: addresses of [rows, H], contiguous, dtype DTYPE; multiples of 16, as
            all addresses here. Without a residual its address is not read; give any. Either output may be x or
            residual itself, but not both outputs the same memory, and nothing may overlap otherwise.
        weight: address of [H], WEIGHT_DTYPE (DTYPE, or float32, or any half).
        local: address of this rank's local memory. home: address of this rank's own symmetric memory.
        rows: T, equal on all ranks, at least 1. rank: in the group. op: a number below 2^24 for the error page.
        eps, weight_offset: fp32; eps > 0.
    """
    WORDS: tl.constexpr = SLICE if SENTINEL else 2 * SLICE
    SLOT: tl.constexpr = 2 * (N + 2) * WORDS * 8
    pid = tl.program_id(0)
    stride = tl.num_programs(0) // C
    peers = _peers(at(local, tl.int64) + 2, rank, N)
    local = at(local, tl.uint64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < (LANES if C == 1 else tl.minimum(SLICE, LANES - (pid % C) * SLICE))
    epochs = local + 16 + 3 * pid
    epoch = tl.load(epochs)
    row = pid // C
    while row < rows:  # not a range: the interpreter of some versions cannot take its bounds from arguments
        before = epoch
        epoch = tl.where(epoch >= 0xFFFFFFFF, 2, epoch + 1)  # 0 is what nobody has written; parity alternates
        dead = tl.where(tl.load(at(home, tl.uint32), volatile=True) != 0, _TOLD, 0)
        here = row.to(tl.int64) * LANES + (pid % C) * SLICE
        parity = (epoch & 1).to(tl.int64)
        first = 256 + pid.to(tl.int64) * SLOT + parity * (N * WORDS * 8)
        second = first + (2 * N - (N - 2) * parity) * (WORDS * 8)
        owner = row % N
        own = tl.load(at(x, tl.uint64) + here + lanes, mask=mask, other=0)
        for i in tl.static_range(1, N):
            p = (rank + i) % N
            to = at(peers[i - 1] + first + rank.to(tl.int64) * (WORDS * 8), tl.uint64)
            wanted = (dead == 0) & (p == owner) if TWO_SHOT else dead == 0
            send(to, lanes, mask & wanted, own, epoch, SLICE, SENTINEL)
        if TWO_SHOT and owner != rank:
            norm, summed, state, moved = _take_results(
                at(home + second, tl.uint64), local, lanes, mask, pid, rank, op, row, epoch, dead, N, SLICE, SENTINEL,
                INTERPRETED)  # fmt: skip
        else:
            norm, summed, state, moved = _finish(
                own, at(residual, tl.uint64) + here, weight, at(home + first, tl.uint64), local, lanes, mask, pid,
                rank, op, row, epoch, dead, eps, weight_offset, N, LANES * (2 if DTYPE == "float32" else 4), SLICE,
                C, DTYPE, WEIGHT_DTYPE, HAS_RESIDUAL, SENTINEL, INTERPRETED)  # fmt: skip
            if TWO_SHOT:
                for i in tl.static_range(1, N):
                    to = at(peers[i - 1] + second, tl.uint64)
                    send(to, lanes, mask & (state == 0), norm, epoch, SLICE, SENTINEL)
                    send(to + WORDS, lanes, mask & (state == 0), summed, epoch, SLICE, SENTINEL)
        norm_out_row = at(norm_out, tl.uint64) + here + lanes
        residual_out_row = at(residual_out, tl.uint64) + here + lanes
        tl.store(norm_out_row, norm, mask=mask)
        tl.store(residual_out_row, summed, mask=mask)
        if moved != before:
            _report(local, tl.full((), 3, tl.int32), 0, op, row, epoch, N)
            tl.store(norm_out_row, tl.zeros(lanes.shape, tl.uint64) + NAN_LANE, mask=mask)
            tl.store(residual_out_row, tl.zeros(lanes.shape, tl.uint64) + NAN_LANE, mask=mask)
        tl.store(epochs, epoch)
        if SENTINEL and row + stride < rows:  # cleared words must be seen before the next row's words are
            tl.debug_barrier()
            tl.atomic_xchg(epochs, epoch, sem="acq_rel", scope="sys")
            tl.debug_barrier()
        row += stride
