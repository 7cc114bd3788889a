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

from fd_fusion.kernels._words import NAN, ONES, at, load_weight, pack, sendable, unpack

_TOLD, _TIMED_OUT = tl.constexpr(2), tl.constexpr(4)  # states of a wait, as bits; 1 is "words are missing", 0 done
_HEAD = tl.constexpr(16)  # 8-byte words of local memory before those of the programs
_CONTROL = tl.constexpr(64)  # 4-byte words of the control page


def host_clock():
    """The interpreter's clock, in nanoseconds, as `globaltimer` gives them; the rank that is waited for may need
    this processor. Never compiled."""
    os.sched_yield()
    return time.time_ns()


host_clock.__triton_builtin__ = True  # the compiler looks at every name, in branches that it drops too


@triton.jit
def _look_up(local, home, since, INTERPRETED: tl.constexpr):
    """After many polls: is the group dead, is the time over? Returns the state to add, and when first asked."""
    if INTERPRETED:
        now = host_clock()
    else:
        now = tl.extra.cuda.globaltimer()
    since = tl.where(since == 0, now, since)
    aborted = tl.load(home, volatile=True) != 0
    over = now - since > tl.load(local, volatile=True).to(tl.int64)
    return tl.where(aborted, _TOLD, 0) | tl.where(over, _TIMED_OUT, 0), since


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
def _peers(table, rank, N: tl.constexpr):
    """The memories of the ranks after this one, cyclically. All are read before anything waits for one."""
    a = at(tl.load(table + (rank + 1) % N, volatile=True), tl.uint32)
    b = at(tl.load(table + (rank + 2) % N, volatile=True), tl.uint32) if N > 2 else a
    c = at(tl.load(table + (rank + 3) % N, volatile=True), tl.uint32) if N > 3 else a
    d = at(tl.load(table + (rank + 4) % N, volatile=True), tl.uint32) if N > 4 else a
    e = at(tl.load(table + (rank + 5) % N, volatile=True), tl.uint32) if N > 5 else a
    f = at(tl.load(table + (rank + 6) % N, volatile=True), tl.uint32) if N > 6 else a
    g = at(tl.load(table + (rank + 7) % N, volatile=True), tl.uint32) if N > 7 else a
    return a, b, c, d, e, f, g


@triton.jit
def _look(slot, own, me, words, mask, N: tl.constexpr, SLICE: tl.constexpr):
    """One look at the N rows of a slot; row `me` is `own`, which nobody sends. Rows from N on repeat row 0."""
    a = tl.load(slot + words, mask=mask & (me != 0), other=own, volatile=True)
    b = tl.load(slot + SLICE + words, mask=mask & (me != 1), other=own, volatile=True)
    c = tl.load(slot + 2 * SLICE + words, mask=mask & (me != 2), other=own, volatile=True) if N > 2 else a
    d = tl.load(slot + 3 * SLICE + words, mask=mask & (me != 3), other=own, volatile=True) if N > 3 else a
    e = tl.load(slot + 4 * SLICE + words, mask=mask & (me != 4), other=own, volatile=True) if N > 4 else a
    f = tl.load(slot + 5 * SLICE + words, mask=mask & (me != 5), other=own, volatile=True) if N > 5 else a
    g = tl.load(slot + 6 * SLICE + words, mask=mask & (me != 6), other=own, volatile=True) if N > 6 else a
    h = tl.load(slot + 7 * SLICE + words, mask=mask & (me != 7), other=own, volatile=True) if N > 7 else a
    return a, b, c, d, e, f, g, h


@triton.jit
def _wait(slot, own, me, words, mask, dead, local, home, N: tl.constexpr, SLICE: tl.constexpr,
          INTERPRETED: tl.constexpr):  # fmt: skip
    """Poll until the N rows of a slot have come, and make them unsent again. Returns the rows and the state.

    Each thread looks at memory and clock by itself; the reduction makes the state one for all of them.
    """
    a, b, c, d, e, f, g, h = own, own, own, own, own, own, own, own
    state = 1
    polls = 0
    since = tl.full((), 0, tl.int64)
    while state == 1:
        a, b, c, d, e, f, g, h = _look(slot, own, me, words, mask, N, SLICE)
        late = (a == ONES) | (b == ONES)
        late = late | (c == ONES) | (d == ONES) if N > 2 else late
        late = late | (e == ONES) | (f == ONES) if N > 4 else late
        late = late | (g == ONES) | (h == ONES) if N > 6 else late
        state = tl.max(late.to(tl.int32) | dead, axis=0)
        polls += 1
        if INTERPRETED or polls % 1024 == 0:
            dead, since = _look_up(local, home, since, INTERPRETED)
    for p in tl.static_range(N):
        unsent = tl.full(words.shape, ONES, tl.uint32)
        tl.store(slot + p * SLICE + words, unsent, mask=mask & (me != p) & (state == 0), cache_modifier=".wt")
    return a, b, c, d, e, f, g, h, state


@triton.jit
def _plus(s, word, DTYPE: tl.constexpr):
    a, b = unpack(word, DTYPE)
    return s[0] + a, s[1] + b


@triton.jit
def _sum_slices(part, state, local, home, pid, op, row, epoch, N: tl.constexpr, C: tl.constexpr,
                INTERPRETED: tl.constexpr):  # fmt: skip
    """The sum over the C programs of a row, in slice order. A program that failed hands on NaN, so nobody waits
    for it. Each thread polls by itself: words carry the epoch, so all see the same, and there is no barrier."""
    sums = local + _HEAD + 3 * (pid - pid % C) + 1 + (epoch & 1).to(tl.int32)
    bits = tl.where(state == 0, part, float("nan")).to(tl.uint32, bitcast=True).to(tl.uint64)
    tl.store(sums + 3 * (pid % C), (bits << 32) | epoch, cache_modifier=".wt")
    total = 0.0
    late = 1
    polls = 0
    since = tl.full((), 0, tl.int64)
    while late == 1:
        total = 0.0
        late = 0
        for c in tl.static_range(C):
            word = tl.load(sums + 3 * c, volatile=True)
            total += (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
            late |= (word.to(tl.uint32) != epoch.to(tl.uint32)).to(tl.int32)
        polls += 1
        if polls % 1024 == 0:
            dead, since = _look_up(local, home, since, INTERPRETED)
            late |= dead
    if late > 1:
        _report(local, tl.where((late & _TOLD) != 0, 2, 1), 0, op, row, epoch, N)
    return tl.where(late == 0, total, float("nan"))


@triton.jit
def _finish(slot, own, residual, weight, words, mask, dead, local, home, pid, rank, op, row, epoch, eps,
            weight_offset, N: tl.constexpr, H: tl.constexpr, SLICE: tl.constexpr, C: tl.constexpr,
            DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
            INTERPRETED: tl.constexpr):  # fmt: skip
    """Wait for the peers' words of a slice, then sum and norm. Returns words of norm_out, residual_out; the state."""
    wa, wb = load_weight(weight, words + (pid % C) * SLICE, mask, DTYPE, WEIGHT_DTYPE)
    other = tl.load(residual + words, mask=mask, other=0) if HAS_RESIDUAL else own
    x0, x1, x2, x3, x4, x5, x6, x7, state = _wait(
        slot, own, rank, words, mask, dead, local, home, N, SLICE, INTERPRETED)  # fmt: skip
    s = _plus(unpack(x0, DTYPE), x1, DTYPE)
    s = _plus(s, x2, DTYPE) if N > 2 else s
    s = _plus(s, x3, DTYPE) if N > 3 else s
    s = _plus(s, x4, DTYPE) if N > 4 else s
    s = _plus(s, x5, DTYPE) if N > 5 else s
    s = _plus(s, x6, DTYPE) if N > 6 else s
    s = _plus(s, x7, DTYPE) if N > 7 else s
    a, b = _plus(s, other, DTYPE) if HAS_RESIDUAL else s
    total = tl.sum(a * a + b * b, axis=0)
    if C > 1:
        total = _sum_slices(total, state, local, home, pid, op, row, epoch, N, C, INTERPRETED)
    scale = tl.rsqrt(total * (1.0 / H) + eps)
    norm = pack(a * scale * (wa + weight_offset), b * scale * (wb + weight_offset), DTYPE, INTERPRETED)
    return norm, pack(a, b, DTYPE, INTERPRETED), state


@triton.jit(do_not_specialize=["x", "residual", "weight", "norm_out", "residual_out", "local", "home", "rows",
                               "rank", "op"])  # fmt: skip
def all_reduce_rms_norm(x, residual, weight, norm_out, residual_out, local, home, rows, rank, op, eps, weight_offset,
                        N: tl.constexpr, WORDS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
                        C: tl.constexpr, DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
                        HAS_RESIDUAL: tl.constexpr, TWO_SHOT: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
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
    pid = tl.program_id(0)
    stride = tl.num_programs(0) // C
    table = at(local, tl.int64) + 2
    local = at(local, tl.uint64)
    home = at(home, tl.uint32)
    epochs = local + _HEAD + 3 * pid
    words = tl.arange(0, BLOCK)
    mask = words < (WORDS if C == 1 else tl.minimum(SLICE, WORDS - (pid % C) * SLICE))
    row = pid // C
    while row < rows:  # not a range: the interpreter of some versions cannot take its bounds from arguments
        # All that the first stores need is asked for at once, the slowest first.
        here = row.to(tl.int64) * WORDS + (pid % C) * SLICE
        own = tl.load(at(x, tl.uint32) + here + words, mask=mask, other=0)
        before = tl.load(epochs, volatile=True)
        aborted = tl.load(home, volatile=True)
        peers = _peers(table, rank, N)
        own = sendable(own)
        epoch = tl.where(before >= 0xFFFFFFFF, 2, before + 1)  # 0 is what nobody has written; parity alternates
        dead = tl.where(aborted != 0, _TOLD, 0)
        parity = (epoch & 1).to(tl.int32)
        first = _CONTROL + (pid * (2 * N + 4) + parity * N) * SLICE
        second = _CONTROL + (pid * (2 * N + 4) + 2 * N + parity * 2) * SLICE
        owner = row % N
        for i in tl.static_range(1, N):
            wanted = (dead == 0) & ((rank + i) % N == owner) if TWO_SHOT else dead == 0
            tl.store(peers[i - 1] + first + rank * SLICE + words, own, mask=mask & wanted, cache_modifier=".wt")
        if TWO_SHOT and owner != rank:
            norm, summed, _, _, _, _, _, _, state = _wait(
                home + second, tl.zeros_like(own), -1, words, mask, dead, local, home, 2, SLICE, INTERPRETED
            )
        else:
            norm, summed, state = _finish(
                home + first, own, at(residual, tl.uint32) + here, weight, words, mask, dead, local, home, pid, rank,
                op, row, epoch, eps, weight_offset, N, WORDS if DTYPE == "float32" else 2 * WORDS, SLICE, C, DTYPE,
                WEIGHT_DTYPE, HAS_RESIDUAL, INTERPRETED)  # fmt: skip
            if TWO_SHOT:
                for i in tl.static_range(1, N):
                    to = peers[i - 1] + second + words
                    tl.store(to, sendable(norm), mask=mask & (state == 0), cache_modifier=".wt")
                    tl.store(to + SLICE, sendable(summed), mask=mask & (state == 0), cache_modifier=".wt")
        moved = tl.load(epochs, volatile=True) != before
        norm_out_row = at(norm_out, tl.uint32) + here + words
        residual_out_row = at(residual_out, tl.uint32) + here + words
        tl.store(norm_out_row, norm, mask=mask)
        tl.store(residual_out_row, summed, mask=mask)
        if state != 0:
            missing = 1 << owner
            if not TWO_SHOT or owner == rank:
                missing = 0
                for p in tl.static_range(N):
                    word = tl.load(home + first + p * SLICE + words, mask=mask & (p != rank), other=0, volatile=True)
                    missing |= tl.max((word == ONES).to(tl.int32), axis=0) << p
            _report(local, tl.where((state & _TOLD) != 0, 2, 1), missing, op, row, epoch, N)
        if moved:
            _report(local, tl.full((), 3, tl.int32), 0, op, row, epoch, N)
        if moved or state != 0:
            tl.store(norm_out_row, tl.full(words.shape, NAN, tl.uint32), mask=mask)
            tl.store(residual_out_row, tl.full(words.shape, NAN, tl.uint32), mask=mask)
        tl.store(epochs, epoch)
        if row + stride < rows:  # the words made unsent must be so before any word of the next row
            tl.debug_barrier()
            tl.atomic_xchg(epochs, epoch, sem="acq_rel", scope="sys")
            tl.debug_barrier()
        row += stride
