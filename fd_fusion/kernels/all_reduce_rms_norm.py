"""All-reduce + residual add + RMSNorm of a row by one program, or by a few, in one kernel.

    s = ((x_0 + x_1) + ... + x_{N-1}) + residual           in fp32, in rank order, on every rank
    residual_out = round(s);  norm_out = round(s * rsqrt(mean(s^2) + eps) * (weight + weight_offset))

A rank pushes its row into a slot of every peer (one-shot), or of the row's owner, which pushes the finished rows
back (two-shot; the owner of row t is rank t % N). A row travels as 4-byte words. A word of ones means "not yet", and
is never sent (`_words.py`): a reader looks until none is left, then makes the words unsent again. Slots belong to
programs, not rows: program g of G works on the rows g, g+G, ..., in its two slots in turn, and pushes the next row
before it waits for this one. Each slot counts its own epochs and alternates between two buffers by `epoch & 1`. Reuse
is safe because a rank in epoch e of a slot has seen every peer start e-1, hence finish e-2; that holds on both paths
and on any mixture of them, since they share the epochs. Nobody waits in a circle: of a program's rows that some rank
has not finished, all ranks have pushed the first one (tests/protocol_model.py).

Bits: equal on all ranks, for every T and on both paths. What comes behind the words is one and the same `_finish`,
its shape is a function of (N, H, dtype) alone (`plan.py`), and nothing is specialized on a run-time value.

Memory, one set for each (group, H, dtype), sizes in `plan.py`:
- symmetric (every rank addresses every rank's): a control page of 256 bytes, whose first uint32 is the abort word,
  then the slots. Before the first call and at a reset the page is zero and the slots are filled with SLOT_FILL.
- local, int64: `local_words`. [0] the limit on waiting for another rank's row, in nanoseconds (a quarter more for
  what itself waits for ranks); read only when a wait is already long, so it may be changed at any time. [1] the
  address of the error page. [2..2+N) the addresses of the ranks' symmetric memory. From [16] on three words a
  slot: its epoch, a uint32 bit pattern, and two words in which programs that share a row exchange their sums,
  each with the epoch, which therefore is never 0.
- error page: 64 bytes of pinned host memory, zero at first, int64, written with plain stores: [0] record and [1]
  epoch of the first failure of this rank; [2] record and [3] epoch of the first program that found the abort word
  set. A record is code | missing ranks as bits << 4 | op << 16 | row << 40: `read_error_page`.

Bounded wait: the first program that runs out of time sets the abort word of every rank, writes its error page and
NaN. A program that finds the abort word set pushes nothing, waits for nothing and writes NaN; of that one call, a
row that was pushed before may still come out right. On a rank that starts no further call the abort word is the only
sign, so its host must look at that too. Then the workspace is dead until a collective reset (synchronize, barrier,
fill all three memories again, barrier). Two streams on one workspace: an epoch that moved while a program ran is
reported and ends the group likewise.

Source: empty words as the sign are the idea of TensorRT-LLM's Lamport kernels, pushing words that need no flag that
of NCCL's LL protocol; the code is new.
"""

import triton
import triton.language as tl

from fd_fusion.kernels._wait import CONTROL, HEAD, MOVED, TOLD, clear, look, look_up, peers_of, report, sum_slices
from fd_fusion.kernels._words import NAN, ONES, at, both, load_weight, pack, sendable, unpack


@triton.jit
def _results(slot, own, words, mask, dead, local, home, epochs, before, SLICE: tl.constexpr, POLL: tl.constexpr,
             OPERANDS: tl.constexpr, UNITS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Two-shot, not the owner: wait for the finished rows. Returns words of norm_out and residual_out,
    the state, and the epoch as it stands now."""
    norm, summed = own, own
    state = 1
    since = tl.full((), 0, tl.int64)
    while state == 1:
        norm, summed, _, _, _, _, _, _, late = look(slot, own, -1, words, mask, 2, SLICE, POLL, OPERANDS, UNITS)
        state = tl.max(late | dead, axis=0)  # one for all threads, each of which has looked by itself
        if state == 1:
            dead, since = look_up(local, home, epochs, before, since, True, INTERPRETED)
    clear(slot, -1, words, both(mask, state == 0), 2, SLICE)
    return norm, summed, state, tl.load(epochs, volatile=True)


@triton.jit
def _plus(s, word, DTYPE: tl.constexpr):
    a, b = unpack(word, DTYPE)
    return s[0] + a, s[1] + b


@triton.jit
def _finish(slot, own, residual, weight, words, mask, dead, local, home, epochs, pid, rank, op, row, before, epoch,
            eps, weight_offset, N: tl.constexpr, H: tl.constexpr, SLICE: tl.constexpr, C: tl.constexpr,
            DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, POLL: tl.constexpr,
            OPERANDS: tl.constexpr, UNITS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Wait for the peers' words of a slice, then sum and norm. Returns words of norm_out and residual_out,
    the state, and the epoch as it stands now."""
    wa, wb = load_weight(weight, words + (pid % C) * SLICE, mask, DTYPE, WEIGHT_DTYPE)
    other = tl.load(residual + words, mask=mask, other=0) if HAS_RESIDUAL else own
    a = tl.zeros(words.shape, tl.float32)
    b = a
    total = 0.0
    state = 1
    since = tl.full((), 0, tl.int64)
    while state == 1:
        x0, x1, x2, x3, x4, x5, x6, x7, late = look(slot, own, rank, words, mask, N, SLICE, POLL, OPERANDS, UNITS)
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
                dead, since = look_up(local, home, epochs, before, since, False, INTERPRETED)
    seen = tl.load(epochs, volatile=True)
    clear(slot, rank, words, both(mask, state == 0), N, SLICE)
    if C > 1:
        total = sum_slices(
            total, state, local, home, epochs, pid, op, row, before, epoch, N, C, words.shape[0] // (4 * UNITS),
            INTERPRETED)  # fmt: skip
    scale = tl.rsqrt(total * (1.0 / H) + eps)
    norm = pack(a * scale * (wa + weight_offset), b * scale * (wb + weight_offset), DTYPE, INTERPRETED)
    return norm, pack(a, b, DTYPE, INTERPRETED), state, seen


@triton.jit
def _next(before):
    """The epoch behind this one. 0 is what nobody has written; the parity alternates."""
    return tl.where(before >= 0xFFFFFFFF, 2, before + 1)


@triton.jit
def _push(x, table, local, home, words, mask, row, slot, rank, N: tl.constexpr, WORDS: tl.constexpr,
          SLICE: tl.constexpr, TWO_SHOT: tl.constexpr):  # fmt: skip
    """Send a row, by two-shot to its owner alone. Returns the words sent, the slot's epoch so far, and TOLD or 0."""
    # All that the stores need is asked for at once: volatile loads stay in this order.
    own = tl.load(x + row.to(tl.int64) * WORDS, mask=mask, other=0, volatile=True)
    before = tl.load(local + HEAD + 3 * slot, volatile=True)
    aborted = tl.load(home, volatile=True)
    peers = peers_of(table, rank, N)
    own = sendable(own)
    dead = tl.where(aborted != 0, TOLD, 0)
    to = CONTROL + (slot * (2 * N + 4) + (_next(before) & 1).to(tl.int32) * N + rank) * SLICE
    for i in tl.static_range(1, N):
        wanted = (dead == 0) & ((rank + i) % N == row % N) if TWO_SHOT else dead == 0
        tl.store(peers[i - 1] + to + words, own, mask=both(mask, wanted), cache_modifier=".wt")
    return own, before, dead


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
    stride = tl.num_programs(0) // C
    lanes = 2 * tl.program_id(0) + tl.num_programs(0)  # what the slots of this program's two lanes add up to
    table = at(local, tl.int64) + 2
    local = at(local, tl.uint64)
    home = at(home, tl.uint32)
    slot = tl.program_id(0)
    words = tl.arange(0, BLOCK)
    mask = words < (WORDS if C == 1 else tl.minimum(SLICE, WORDS - (slot % C) * SLICE))
    x = at(x, tl.uint32) + (slot % C) * SLICE + words
    row = slot // C
    own, before, dead = _push(x, table, local, home, words, mask, row, slot, rank, N, WORDS, SLICE, TWO_SHOT)
    while row < rows:  # not a range: the interpreter of some versions cannot take its bounds from arguments
        following = row + stride
        following_before, following_dead = before, dead
        if following < rows:  # on its way before this row is waited for
            _, following_before, following_dead = _push(
                x, table, local, home, words, mask, following, lanes - slot, rank, N, WORDS, SLICE,
                TWO_SHOT)  # fmt: skip
        here = row.to(tl.int64) * WORDS + (slot % C) * SLICE
        epochs = local + HEAD + 3 * slot
        epoch = _next(before)
        parity = (epoch & 1).to(tl.int32)
        first = CONTROL + (slot * (2 * N + 4) + parity * N) * SLICE
        second = CONTROL + (slot * (2 * N + 4) + 2 * N + parity * 2) * SLICE
        owner = row % N
        if TWO_SHOT and owner != rank:
            norm, summed, state, seen = _results(
                home + second, own, words, mask, dead, local, home, epochs, before, SLICE, POLL_RESULTS, OPERANDS,
                UNITS, INTERPRETED)  # fmt: skip
        else:
            peers = peers_of(table, rank, N) if TWO_SHOT else ()
            norm, summed, state, seen = _finish(
                home + first, own, at(residual, tl.uint32) + here, weight, words, mask, dead, local, home, epochs,
                slot, rank, op, row, before, epoch, eps, weight_offset, N,
                WORDS if DTYPE == "float32" else 2 * WORDS, SLICE, C, DTYPE, WEIGHT_DTYPE, HAS_RESIDUAL, POLL,
                OPERANDS, UNITS, INTERPRETED)  # fmt: skip
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
            report(local, state, missing, op, row, epoch, 0, N)
            tl.store(norm_out_row, tl.full(words.shape, NAN, tl.uint32), mask=mask)
            tl.store(residual_out_row, tl.full(words.shape, NAN, tl.uint32), mask=mask)
        if seen != before:  # what counts is what thread 0 saw: it alone stores scalars, this epoch too
            report(local, state | MOVED, 0, op, row, epoch, 0, N)
        tl.store(epochs, epoch)
        if following < rows:
            # Once more, since to keep it from the push on takes too many registers; it comes while the fence waits.
            own = tl.load(x + following.to(tl.int64) * WORDS, mask=mask, other=0, volatile=True)
            if following + stride < rows:  # what was made unsent must be so before any word of that row, in this slot
                tl.debug_barrier()
                tl.atomic_xchg(epochs, epoch, sem="acq_rel", scope="sys")
                tl.debug_barrier()
            own = sendable(own)
        row, slot, before, dead = following, lanes - slot, following_before, following_dead
