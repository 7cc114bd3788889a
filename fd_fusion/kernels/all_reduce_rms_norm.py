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
  are filled with SLOT_FILL.
- local (`local_words`), int64: [0] the limit on waiting (nanoseconds; read only when a
  wait is already long, so it may be changed at any time), [1] the address of the error page,
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

from fd_fusion.kernels._words import NAN, ONES, at, both, load_weight, pack, sendable, unpack

_TOLD, _TIMED_OUT, _MOVED = tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
_RESULTS = tl.constexpr((tl.uint32,) * 8 + (tl.int32,))
_HEAD = tl.constexpr(16)  # 8-byte words of local memory before those of the programs
_CONTROL = tl.constexpr(64)  # 4-byte words of the control page


def host_clock():
    """The interpreter's clock, in nanoseconds, as `globaltimer` gives them; the rank that is waited for may need
    this processor. Never compiled."""
    os.sched_yield()
    return time.time_ns()


host_clock.__triton_builtin__ = True  # the compiler looks at every name, in branches that it drops too


@triton.jit
def _look_up(local, home, epochs, before, since, INTERPRETED: tl.constexpr):
    """When words stay missing: is the group dead, is the time over, did another stream come by?

    Returns the bits to add to the state of the wait (0 done, 1 words are missing), and when it was first asked.
    """
    if INTERPRETED:
        now = host_clock()
    else:
        now = tl.extra.cuda.globaltimer()
    since = tl.where(since == 0, now, since)
    over = now - since > tl.load(local, volatile=True).to(tl.int64)
    aborted = tl.load(home, volatile=True) != 0
    moved = tl.load(epochs, volatile=True) != before
    return tl.where(over, _TIMED_OUT, 0) | tl.where(aborted, _TOLD, 0) | tl.where(moved, _MOVED, 0), since


@triton.jit
def _report(local, state, missing, op, row, epoch, N: tl.constexpr):
    """Write the error page and, unless told of it, tell every rank. Plain stores: threads may differ here."""
    told = (state & _TOLD) != 0
    code = tl.where(told, 2, tl.where((state & _MOVED) != 0, 3, 1))
    page = at(tl.load(local + 1), tl.uint64) + tl.where(told, 2, 0)
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
def _look(slot, own, me, words, mask, N: tl.constexpr, SLICE: tl.constexpr, POLL: tl.constexpr,
          OPERANDS: tl.constexpr, UNITS: tl.constexpr):  # fmt: skip
    """The N rows of a slot; row `me` is `own`, which nobody sends. Rows from N on repeat an earlier one.

    Under the interpreter one look. On a GPU each thread looks until its own words have come or it is tired, with
    no barrier: `poll` in plan.py. Returns eight rows, and 1 for each word that has not come.
    """
    if POLL is None:
        a = tl.load(slot + words, mask=both(mask, me != 0), other=own, volatile=True)
        b = tl.load(slot + SLICE + words, mask=both(mask, me != 1), other=own, volatile=True)
        c = tl.load(slot + 2 * SLICE + words, mask=both(mask, me != 2), other=own, volatile=True) if N > 2 else a
        d = tl.load(slot + 3 * SLICE + words, mask=both(mask, me != 3), other=own, volatile=True) if N > 3 else a
        e = tl.load(slot + 4 * SLICE + words, mask=both(mask, me != 4), other=own, volatile=True) if N > 4 else a
        f = tl.load(slot + 5 * SLICE + words, mask=both(mask, me != 5), other=own, volatile=True) if N > 5 else a
        g = tl.load(slot + 6 * SLICE + words, mask=both(mask, me != 6), other=own, volatile=True) if N > 6 else a
        h = tl.load(slot + 7 * SLICE + words, mask=both(mask, me != 7), other=own, volatile=True) if N > 7 else a
        late = (a == ONES) | (b == ONES) | (c == ONES) | (d == ONES)
        late = (late | (e == ONES) | (f == ONES) | (g == ONES) | (h == ONES)).to(tl.int32)
    else:
        absent = tl.where(mask, me, 8)
        a, b, c, d, e, f, g, h, late = tl.inline_asm_elementwise(
            POLL, OPERANDS, [own, (slot + words).to(tl.int64), absent], _RESULTS, False, 4 * UNITS)  # fmt: skip
    return a, b, c, d, e, f, g, h, late


@triton.jit
def _clear(slot, me, words, mask, N: tl.constexpr, SLICE: tl.constexpr):
    """Make the words of a slot unsent again."""
    for p in tl.static_range(N):
        unsent = tl.full(words.shape, ONES, tl.uint32)
        tl.store(slot + p * SLICE + words, unsent, mask=both(mask, me != p), cache_modifier=".wt")


@triton.jit
def _results(slot, own, words, mask, dead, local, home, epochs, before, SLICE: tl.constexpr, POLL: tl.constexpr,
             OPERANDS: tl.constexpr, UNITS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Two-shot, not the owner: wait for the finished rows. Returns words of norm_out, residual_out; the state."""
    norm, summed = own, own
    state = 1
    since = tl.full((), 0, tl.int64)
    while state == 1:
        norm, summed, _, _, _, _, _, _, late = _look(slot, own, -1, words, mask, 2, SLICE, POLL, OPERANDS, UNITS)
        state = tl.max(late | dead, axis=0)  # one for all threads, each of which has looked by itself
        if state == 1:
            dead, since = _look_up(local, home, epochs, before, since, INTERPRETED)
    _clear(slot, -1, words, both(mask, state == 0), 2, SLICE)
    return norm, summed, state, tl.load(epochs, volatile=True)


@triton.jit
def _sum_slices(part, state, local, home, epochs, pid, op, row, before, epoch, N: tl.constexpr, C: tl.constexpr,
                INTERPRETED: tl.constexpr):  # fmt: skip
    """The sum over the C programs of a row, in slice order. A program that failed hands on NaN, so nobody waits
    for it. Each thread polls by itself: words carry the epoch, so all see the same, and there is no barrier."""
    sums = epochs - 3 * (pid % C) + 1 + (epoch & 1).to(tl.int32)
    bits = tl.where(state == 0, part, float("nan")).to(tl.uint32, bitcast=True).to(tl.uint64)
    tl.store(sums + 3 * (pid % C), (bits << 32) | epoch, cache_modifier=".wt")
    total = 0.0
    late = 1
    looks = 0
    since = tl.full((), 0, tl.int64)
    while late == 1:
        total = 0.0
        late = 0
        for c in tl.static_range(C):
            word = tl.load(sums + 3 * c, volatile=True)
            total += (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
            late |= (word.to(tl.uint32) != epoch.to(tl.uint32)).to(tl.int32)
        looks += 1
        if looks % 1024 == 0:
            dead, since = _look_up(local, home, epochs, before, since, INTERPRETED)
            late |= dead
    if late > 1:
        _report(local, late, 0, op, row, epoch, N)
    return tl.where(late == 0, total, float("nan"))


@triton.jit
def _plus(s, word, DTYPE: tl.constexpr):
    a, b = unpack(word, DTYPE)
    return s[0] + a, s[1] + b


@triton.jit
def _finish(slot, own, residual, weight, words, mask, dead, local, home, epochs, pid, rank, op, row, before, epoch,
            eps, weight_offset, N: tl.constexpr, H: tl.constexpr, SLICE: tl.constexpr, C: tl.constexpr,
            DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, POLL: tl.constexpr,
            OPERANDS: tl.constexpr, UNITS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Wait for the peers' words of a slice, then sum and norm. Returns words of norm_out, residual_out; the state."""
    wa, wb = load_weight(weight, words + (pid % C) * SLICE, mask, DTYPE, WEIGHT_DTYPE)
    other = tl.load(residual + words, mask=mask, other=0) if HAS_RESIDUAL else own
    a = tl.zeros(words.shape, tl.float32)
    b = a
    total = 0.0
    state = 1
    since = tl.full((), 0, tl.int64)
    while state == 1:
        x0, x1, x2, x3, x4, x5, x6, x7, late = _look(slot, own, rank, words, mask, N, SLICE, POLL, OPERANDS, UNITS)
        s = _plus(unpack(x0, DTYPE), x1, DTYPE)
        s = _plus(s, x2, DTYPE) if N > 2 else s
        s = _plus(s, x3, DTYPE) if N > 3 else s
        s = _plus(s, x4, DTYPE) if N > 4 else s
        s = _plus(s, x5, DTYPE) if N > 5 else s
        s = _plus(s, x6, DTYPE) if N > 6 else s
        s = _plus(s, x7, DTYPE) if N > 7 else s
        # The subtraction of zero keeps the compiler from waiting for the residual before the words.
        a, b = _plus(s, other - late.to(tl.uint32), DTYPE) if HAS_RESIDUAL else s
        # One reduction does it, if all went well: NaN says that words are missing, or that the payload holds NaN.
        total = tl.sum(tl.where((late | dead) == 0, a * a + b * b, float("nan")), axis=0)
        state = 0
        if total != total:
            state = tl.max(late | dead, axis=0)  # one for all threads, each of which has looked by itself
            if state == 1:
                dead, since = _look_up(local, home, epochs, before, since, INTERPRETED)
    seen = tl.load(epochs, volatile=True)
    _clear(slot, rank, words, both(mask, state == 0), N, SLICE)
    if C > 1:
        total = _sum_slices(
            total, state, local, home, epochs, pid, op, row, before, epoch, N, C, INTERPRETED)  # fmt: skip
    scale = tl.rsqrt(total * (1.0 / H) + eps)
    norm = pack(a * scale * (wa + weight_offset), b * scale * (wb + weight_offset), DTYPE, INTERPRETED)
    return norm, pack(a, b, DTYPE, INTERPRETED), state, seen


@triton.jit(do_not_specialize=["x", "residual", "weight", "norm_out", "residual_out", "local", "home", "rows",
                               "rank", "op"])  # fmt: skip
def all_reduce_rms_norm(x, residual, weight, norm_out, residual_out, local, home, rows, rank, op, eps, weight_offset,
                        N: tl.constexpr, WORDS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
                        C: tl.constexpr, DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
                        HAS_RESIDUAL: tl.constexpr, TWO_SHOT: tl.constexpr, POLL: tl.constexpr,
                        POLL_RESULTS: tl.constexpr, OPERANDS: tl.constexpr, UNITS: tl.constexpr,
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
        # All that the first stores need is asked for at once: volatile loads stay in this order.
        here = row.to(tl.int64) * WORDS + (pid % C) * SLICE
        own = tl.load(at(x, tl.uint32) + here + words, mask=mask, other=0, volatile=True)
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
            tl.store(peers[i - 1] + first + rank * SLICE + words, own, mask=both(mask, wanted), cache_modifier=".wt")
        if TWO_SHOT and owner != rank:
            norm, summed, state, seen = _results(
                home + second, own, words, mask, dead, local, home, epochs, before, SLICE, POLL_RESULTS, OPERANDS,
                UNITS, INTERPRETED)  # fmt: skip
        else:
            norm, summed, state, seen = _finish(
                home + first, own, at(residual, tl.uint32) + here, weight, words, mask, dead, local, home, epochs,
                pid, rank, op, row, before, epoch, eps, weight_offset, N, WORDS if DTYPE == "float32" else 2 * WORDS,
                SLICE, C, DTYPE, WEIGHT_DTYPE, HAS_RESIDUAL, POLL, OPERANDS, UNITS, INTERPRETED)  # fmt: skip
            if TWO_SHOT:
                for i in tl.static_range(1, N):
                    to = peers[i - 1] + second + words
                    tl.store(to, sendable(norm), mask=both(mask, state == 0), cache_modifier=".wt")
                    tl.store(to + SLICE, sendable(summed), mask=both(mask, state == 0), cache_modifier=".wt")
        norm_out_row = at(norm_out, tl.uint32) + here + words
        residual_out_row = at(residual_out, tl.uint32) + here + words
        tl.store(norm_out_row, norm, mask=mask)
        tl.store(residual_out_row, summed, mask=mask)
        if state != 0:
            missing = 1 << owner
            if not TWO_SHOT or owner == rank:
                missing = 0
                for p in tl.static_range(N):
                    word = tl.load(
                        home + first + p * SLICE + words, mask=both(mask, p != rank), other=0, volatile=True
                    )
                    missing |= tl.max((word == ONES).to(tl.int32), axis=0) << p
            _report(local, state, missing, op, row, epoch, N)
            tl.store(norm_out_row, tl.full(words.shape, NAN, tl.uint32), mask=mask)
            tl.store(residual_out_row, tl.full(words.shape, NAN, tl.uint32), mask=mask)
        if seen != before:  # what counts is what thread 0 saw: it alone stores scalars, this epoch too
            _report(local, state | _MOVED, 0, op, row, epoch, N)
        tl.store(epochs, epoch)
        if row + stride < rows:  # the words made unsent must be so before any word of the next row
            tl.debug_barrier()
            tl.atomic_xchg(epochs, epoch, sem="acq_rel", scope="sys")
            tl.debug_barrier()
        row += stride
