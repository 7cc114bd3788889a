"""All-reduce + residual add + RMSNorm of a row by one program, or by a few, in one kernel.

    s = ((x_0 + x_1) + ... + x_{N-1}) + residual           in fp32, in rank order, on every rank
    residual_out = round(s);  norm_out = round(s * rsqrt(mean(s^2) + eps) * (weight + weight_offset))

The life of a row: its program loads it and stores it into the row's slot on every peer (one-shot), or on the row's
owner alone (two-shot; the owner of row t is rank t % N). Then it looks at its own slot until the words of all peers
are there, makes them unsent again, sums, norms and stores both outputs. By two-shot only the owner does so, and
stores the finished rows into the slot on every peer, where the others look for these alone.

A row travels as 4-byte words. A word of ones means "not yet", and is never sent (`packing.py`). Every row of a launch
has a slot of its own, so there are no more rows than slots, no word is used twice in a launch, and nothing in it
waits for a fence. By two-shot, which takes two trips, a program pushes its next row before it waits for one; by
one-shot that was measured to be slower. A slot has two halves, used by launches in turn. A rank that pushes in launch
k has ended k-1, hence has seen every peer start k-1, hence end k-2, which used the same half and made it unsent: the
end of a kernel puts that before the next one. This holds on both paths and any mixture of them, for calls of any
number of rows. Nobody waits in a circle: of a program's rows that some rank has not finished, all ranks push the
first one before they wait for another (tests/kernels/all_reduce/protocol_model.py).

Bits: equal on all ranks, for every T and on both paths. What comes behind the words is one and the same `_finish`,
its shape is a function of (N, H, dtype) alone (`plan.py`), and nothing is specialized on a run-time value.

Memory, one set for each (group, H, dtype), sizes in `plan.py`:
- symmetric (every rank addresses every rank's): a control page of 256 bytes, whose first uint32 is the abort word,
  then the slots: a place for each peer's row, twice. Before the first call and at a reset the page is zero and the
  slots are filled with SLOT_FILL.
- local, int64: `local_words`. [0] the limit on waiting for another rank's row, in nanoseconds (a quarter more for
  what itself waits for ranks); read only when a wait is already long, so it may be changed at any time. [1] the
  address of the error page. [2..2+N) the addresses of the ranks' symmetric memory. [10] the counter of launches: the
  programs of a launch add 2^20 to it together, each when it has read it (`take_turn`). [11] rows so far. From [16]
  on the words in which programs that share a row exchange their sums, unsent like those of the slots; 128 bytes for
  each reader, since where rows share a line of the cache each look waits for what other rows store (0.5 us).
- error page: 64 bytes of pinned host memory, zero at first, int64, written with plain stores: [0] record and [1]
  launch of the first failure of this rank; [2] record and [3] launch of the first program that found the abort word
  set. A record is code | missing ranks as bits << 4 | op << 16 | row << 40: `read_error_page`.

Bounded wait: the first program that runs out of time sets the abort word of every rank, writes its error page and
NaN. A program that finds the abort word set pushes nothing, waits for nothing and writes NaN; of that one call, a
row that was pushed before may still come out right. On a rank that starts no further call the abort word is the only
sign, so its host must look at that too. Then the workspace is dead until a collective reset (synchronize, barrier,
fill all three memories again, barrier). Two streams on one workspace: a counter that shows another launch while a
program runs is reported and ends the group likewise.

Source: empty words as the sign are the idea of TensorRT-LLM's Lamport kernels, pushing words that need no flag that
of NCCL's LL protocol; the code is new.
"""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.packing import NAN, ONES, at, both, load_weight, pack, sendable, unpack
from fd_fusion.kernels.all_reduce.wait import (
    CONTROL,
    COUNTER,
    HEAD,
    LINE,
    TURN,
    WAIT_ABORTED,
    WAIT_MISSING,
    WAIT_TWO_STREAMS,
    clear,
    clear_sums,
    has_moved,
    look,
    look_up,
    peers_of,
    place_of,
    report,
    sum_slices,
    take_turn,
)

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # before Triton 3.5
    gdc_wait = None


@triton.jit
def _results(slot, own, words, mask, dead, local, home, turn, RESULTS: tl.constexpr, SLICE: tl.constexpr,
             POLL: tl.constexpr, OPERANDS: tl.constexpr, UNITS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Two-shot, not the owner: wait for the finished row, or both, which lie where those of ranks 0 and 1 would for a
    last rank. Returns words of norm_out and residual_out, the state, and the counter as it stands now."""
    norm, summed = own, own
    state = WAIT_MISSING
    since = tl.full((), 0, tl.int64)
    while state == WAIT_MISSING:
        norm, summed, _, _, _, _, _, _, late = look(
            slot, own, RESULTS, words, mask, RESULTS + 1, SLICE, POLL, OPERANDS, UNITS)  # fmt: skip
        state = tl.max(late | dead, axis=0)  # one for all threads, each of which has looked by itself
        if state == WAIT_MISSING:
            dead, since = look_up(local, home, turn, since, True, INTERPRETED)
    clear(slot, words, both(mask, state == 0), RESULTS, SLICE)
    return norm, summed, state, tl.load(local + COUNTER, volatile=True)


@triton.jit
def _plus(s, word, DTYPE: tl.constexpr):
    a, b = unpack(word, DTYPE)
    return s[0] + a, s[1] + b


@triton.jit
def _finish(slot, own, residual, weight, words, mask, dead, local, home, sums, c, rank, turn, op, row, eps,
            weight_offset, N: tl.constexpr, H: tl.constexpr, SLICE: tl.constexpr, C: tl.constexpr,
            DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, POLL: tl.constexpr,
            OPERANDS: tl.constexpr, UNITS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Wait for the peers' words of a slice, then sum and norm. Returns words of norm_out and residual_out,
    the state, and the counter as it stands now."""
    wa, wb = load_weight(weight, words + c * SLICE, mask, DTYPE, WEIGHT_DTYPE)
    other = tl.load(residual + words, mask=mask, other=0) if HAS_RESIDUAL else own
    a = tl.zeros(words.shape, tl.float32)
    b = a
    total = 0.0
    state = WAIT_MISSING
    since = tl.full((), 0, tl.int64)
    while state == WAIT_MISSING:
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
            if state == WAIT_MISSING:
                dead, since = look_up(local, home, turn, since, False, INTERPRETED)
    seen = tl.load(local + COUNTER, volatile=True)
    clear(slot, words, both(mask, state == 0), N - 1, SLICE)
    if C > 1:
        total = sum_slices(
            total, state, local, home, sums, c, turn, op, row, N, C, words.shape[0] // (4 * UNITS),
            INTERPRETED)  # fmt: skip
    scale = tl.rsqrt(total * (1.0 / H) + eps)
    norm = pack(a * scale * (wa + weight_offset), b * scale * (wb + weight_offset), DTYPE, INTERPRETED)
    return norm, pack(a, b, DTYPE, INTERPRETED), state, seen


@triton.jit
def _push(own, peers, home, slot, words, mask, row, rank, N: tl.constexpr, SLICE: tl.constexpr,
          TWO_SHOT: tl.constexpr):  # fmt: skip
    """Send a row, by two-shot to its owner alone, unless the group is dead."""
    alive = tl.load(home, volatile=True) == 0
    for i in tl.static_range(1, N):
        peer = (rank + i) % N
        wanted = alive & (peer == row % N) if TWO_SHOT else alive
        to = peers[i - 1] + slot + place_of(rank, peer, N) * SLICE + words
        tl.store(to, sendable(own), mask=both(mask, wanted), cache_modifier=".wt")


@triton.jit
def _fail(norm_out, residual_out, slot, words, mask, local, state, rank, turn, op, row, N: tl.constexpr,
          SLICE: tl.constexpr, TWO_SHOT: tl.constexpr):  # fmt: skip
    """Report the ranks whose words are missing, and make both outputs NaN."""
    missing = 1 << (row % N)
    if not TWO_SHOT or row % N == rank:
        missing = 0
        for p in tl.static_range(N):
            place = place_of(p, rank, N) * SLICE
            word = tl.load(slot + place + words, mask=both(mask, p != rank), other=0, volatile=True)
            missing |= tl.max((word == ONES).to(tl.int32), axis=0) << p
    report(local, state, missing, op, row, turn, 0, N)
    tl.store(norm_out, tl.full(words.shape, NAN, tl.uint32), mask=mask)
    tl.store(residual_out, tl.full(words.shape, NAN, tl.uint32), mask=mask)


@triton.jit(do_not_specialize=["x", "residual", "weight", "norm_out", "residual_out", "local", "home", "rows",
                               "rank", "op"])  # fmt: skip
def all_reduce_rms_norm(x, residual, weight, norm_out, residual_out, local, home, rows, rank, op, eps, weight_offset,
                        N: tl.constexpr, WORDS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
                        C: tl.constexpr, PLACES: tl.constexpr, DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr,
                        HAS_RESIDUAL: tl.constexpr, TWO_SHOT: tl.constexpr,
                        RESULTS: tl.constexpr, POLL: tl.constexpr, POLL_RESULTS: tl.constexpr, OPERANDS: tl.constexpr,
                        UNITS: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """The kernel. Launch it with `grid` and `constants` of `plan.py`, on every rank in the same order.

    Args:
        x, residual, norm_out, residual_out: addresses of [rows, H], contiguous, dtype DTYPE; multiples of 16, as
            all addresses here. Without a residual its address is not read; give any. Either output may be x or
            residual itself, but not both outputs the same memory, and nothing may overlap otherwise. By two-shot
            the residual of a row is read by the owner alone, and with RESULTS == 1 written by the owner alone.
        weight: address of [H], WEIGHT_DTYPE (DTYPE, or float32, or any half).
        local: address of this rank's local memory. home: address of this rank's own symmetric memory.
        rows: T, equal on all ranks, at least 1, no more than there are slots. rank: in the group. op: a number below
            2^24 for the error page.
        eps, weight_offset: fp32; eps > 0.
    """
    if PDL:  # started while the kernel in front ends: what it writes, slots and counter too, counts from here on
        gdc_wait()
    stride = tl.num_programs(0) // C
    row = tl.program_id(0) // C
    c = tl.program_id(0) % C
    words = tl.arange(0, BLOCK)
    mask = words < (WORDS if C == 1 else tl.minimum(SLICE, WORDS - c * SLICE))
    sums = at(local, tl.uint32) + 2 * HEAD
    local = at(local, tl.uint64)
    home = at(home, tl.uint32)
    x = at(x, tl.uint32) + c * SLICE
    residual = at(residual, tl.uint32) + c * SLICE
    norm_out = at(norm_out, tl.uint32) + c * SLICE
    residual_out = at(residual_out, tl.uint32) + c * SLICE
    # All that the first push needs is asked for at once: volatile loads stay in this order.
    own = tl.load(x + row.to(tl.int64) * WORDS + words, mask=mask, other=0, volatile=True)
    turn = tl.load(local + COUNTER, volatile=True) // TURN
    peers = peers_of(local, rank, N)
    half = CONTROL + (2 * c + (turn & 1).to(tl.int32)) * PLACES * SLICE
    _push(own, peers, home, half + row * (2 * C * PLACES * SLICE), words, mask, row, rank, N, SLICE, TWO_SHOT)
    take_turn(local, rows)
    ahead = row + stride
    while row < rows:  # not a range: the interpreter of some versions cannot take its bounds from arguments
        while ahead < tl.minimum(rows, row + (2 if TWO_SHOT else 1) * stride):  # before this row is waited for
            own = tl.load(x + ahead.to(tl.int64) * WORDS + words, mask=mask, other=0, volatile=True)
            slot = half + ahead * (2 * C * PLACES * SLICE)
            _push(own, peers, home, slot, words, mask, ahead, rank, N, SLICE, TWO_SHOT)
            ahead += stride
        slot = half + row * (2 * C * PLACES * SLICE)
        here = row.to(tl.int64) * WORDS
        if TWO_SHOT:  # noqa: SIM102 - decided when this is compiled
            if rows > stride:  # then another row may have been pushed since
                own = tl.load(x + here + words, mask=mask, other=0, volatile=True)
        own = sendable(own)
        dead = tl.where(tl.load(home, volatile=True) != 0, WAIT_ABORTED, 0)
        if TWO_SHOT and row % N != rank:
            norm, summed, state, seen = _results(
                home + slot, own, words, mask, dead, local, home, turn, RESULTS, SLICE, POLL_RESULTS, OPERANDS,
                UNITS, INTERPRETED)  # fmt: skip
        else:
            norm, summed, state, seen = _finish(
                home + slot, own, residual + here, weight, words, mask, dead, local, home, sums + row * C * LINE, c,
                rank, turn, op, row, eps, weight_offset, N, WORDS if DTYPE == "float32" else 2 * WORDS, SLICE, C,
                DTYPE, WEIGHT_DTYPE, HAS_RESIDUAL, POLL, OPERANDS, UNITS, INTERPRETED)  # fmt: skip
            if TWO_SHOT:
                for i in tl.static_range(1, N):
                    to = peers[i - 1] + slot + words
                    tl.store(to, sendable(norm), mask=both(mask, state == 0), cache_modifier=".wt")
                    if RESULTS == 2:
                        tl.store(to + SLICE, sendable(summed), mask=both(mask, state == 0), cache_modifier=".wt")
        tl.store(norm_out + here + words, norm, mask=mask)
        stays = RESULTS == 1 and TWO_SHOT  # with its owner
        tl.store(residual_out + here + words, summed, mask=both(mask, row % N == rank) if stays else mask)
        if state != 0:
            _fail(norm_out + here + words, residual_out + here + words, home + slot, words, mask, local, state, rank,
                  turn, op, row, N, SLICE, TWO_SHOT)  # fmt: skip
        if has_moved(seen, turn):
            report(local, state | WAIT_TWO_STREAMS, 0, op, row, turn, 0, N)
        if C > 1:
            clear_sums(sums + row * C * LINE, c, C)
        row += stride
