"""Push one row, finish it, and fail where words do not come: the steps of a row in `kernel.py`."""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce.packing import (
    NAN,
    SENTINEL,
    load_weight,
    mask_if,
    pack,
    unpack,
    without_sentinel,
)
from fd_fusion.kernels.all_reduce.slice_sums import exchange_sums, sum_each_slice
from fd_fusion.kernels.all_reduce.wait import (
    COUNTER,
    WAIT_MISSING,
    check_wait,
    clear_slot,
    place_of,
    poll_slot,
    report_failure,
)


@triton.jit
def receive_results(row, abort_bits, memory, call, shape, polling):
    """Wait for the finished row of another owner, or both rows, which are in the places of ranks 0 and 1 for a last
    rank. Returns words of norm_out and residual_out, the state of the wait, and the counter as it stands now."""
    norm, summed = row.words, row.words
    wait_state = WAIT_MISSING
    wait_start_ns = tl.full((), 0, tl.int64)
    while wait_state == WAIT_MISSING:
        norm, summed, _, _, _, _, _, _, missing_words = poll_slot(
            row, shape.RESULTS, shape.RESULTS + 1, shape.C * shape.SLICE, polling.POLL_RESULTS, polling)  # fmt: skip
        # One state for all threads, each of which has polled by itself.
        wait_state = tl.max(missing_words | abort_bits, axis=0)
        if wait_state == WAIT_MISSING:
            abort_bits, wait_start_ns = check_wait(memory, call, wait_start_ns, True, polling.INTERPRETED)
    clear_slot(row, mask_if(row.mask, wait_state == 0), shape.RESULTS, shape.C * shape.SLICE)
    return norm, summed, wait_state, tl.load(memory.state_memory + COUNTER, volatile=True)


@triton.jit
def _add_words(s, word, DTYPE: tl.constexpr):
    a, b = unpack(word, DTYPE)
    return s[0] + a, s[1] + b


@triton.jit
def finish(row, residual, weight, abort_bits, memory, call, shape, polling):
    """Wait for the words of the peers in a slice, then sum and norm. Returns words of norm_out and residual_out,
    the state of the wait, and the counter as it stands now."""
    N: tl.constexpr = shape.N
    DTYPE: tl.constexpr = shape.DTYPE
    H: tl.constexpr = shape.WORDS if shape.DTYPE == "float32" else 2 * shape.WORDS
    wa, wb = load_weight(weight, row.offsets + call.slice_index * shape.SLICE, row.mask, DTYPE, shape.WEIGHT_DTYPE)
    other = row.words
    if shape.HAS_RESIDUAL:  # nothing reads this residual again: L2 keeps what is read sooner
        other = tl.load(residual + row.offsets, mask=row.mask, other=0, eviction_policy="evict_first")
    a = tl.zeros(row.offsets.shape, tl.float32)
    b = a
    total, first_sum, second_sum = 0.0, 0.0, 0.0
    wait_state = WAIT_MISSING
    wait_start_ns = tl.full((), 0, tl.int64)
    while wait_state == WAIT_MISSING:
        x0, x1, x2, x3, x4, x5, x6, x7, missing_words = poll_slot(
            row, call.rank, N, shape.C * shape.SLICE, polling.POLL, polling)  # fmt: skip
        s = _add_words(unpack(x0, DTYPE), x1, DTYPE)
        s = _add_words(s, x2, DTYPE) if N > 2 else s
        s = _add_words(s, x3, DTYPE) if N > 3 else s
        s = _add_words(s, x4, DTYPE) if N > 4 else s
        s = _add_words(s, x5, DTYPE) if N > 5 else s
        s = _add_words(s, x6, DTYPE) if N > 6 else s
        s = _add_words(s, x7, DTYPE) if N > 7 else s
        # The subtraction of zero keeps the compiler from waiting for the residual before the words.
        a, b = _add_words(s, other - missing_words.to(tl.uint32), DTYPE) if shape.HAS_RESIDUAL else s
        # One reduction does it, if all went well: NaN says that words are missing, or that the payload holds NaN.
        squares = tl.where((missing_words | abort_bits) == 0, a * a + b * b, float("nan"))
        total, first_sum, second_sum = sum_each_slice(squares, shape)
        wait_state = 0
        if total != total:
            # One state for all threads, each of which has polled by itself.
            wait_state = tl.max(missing_words | abort_bits, axis=0)
            if wait_state == WAIT_MISSING:
                abort_bits, wait_start_ns = check_wait(memory, call, wait_start_ns, False, polling.INTERPRETED)
    counter_now = tl.load(memory.state_memory + COUNTER, volatile=True)
    clear_slot(row, mask_if(row.mask, wait_state == 0), N - 1, shape.C * shape.SLICE)
    if shape.C > shape.SLICES:
        total = exchange_sums((first_sum, second_sum), wait_state, row, memory, call, shape, polling)
    scale = tl.rsqrt(total * (1.0 / H) + call.eps)
    norm = pack(a * scale * (wa + call.weight_offset), b * scale * (wb + call.weight_offset), DTYPE,
                polling.INTERPRETED)  # fmt: skip
    return norm, pack(a, b, DTYPE, polling.INTERPRETED), wait_state, counter_now


@triton.jit
def push(row, memory, call, shape):
    """Store a row into the slots of the peers, by two-shot of its owner alone, unless the group is dead."""
    alive = tl.load(memory.own_slots, volatile=True) == 0
    for i in tl.static_range(1, shape.N):
        peer = (call.rank + i) % shape.N
        is_reader = alive & (peer == row.number % shape.N) if shape.TWO_SHOT else alive
        place = place_of(call.rank, peer, shape.N) * (shape.C * shape.SLICE)
        to = memory.peers[i - 1] + row.slot + place + row.offsets
        tl.store(to, without_sentinel(row.words), mask=mask_if(row.mask, is_reader), cache_modifier=".wt")


@triton.jit
def push_results(row, norm, summed, wait_state, memory, shape):
    """By two-shot: store the finished row, or both rows, into the slots of the peers."""
    mask = mask_if(row.mask, wait_state == 0)
    for i in tl.static_range(1, shape.N):
        to = memory.peers[i - 1] + row.slot + row.offsets
        tl.store(to, without_sentinel(norm), mask=mask, cache_modifier=".wt")
        if shape.RESULTS == 2:
            tl.store(to + shape.C * shape.SLICE, without_sentinel(summed), mask=mask, cache_modifier=".wt")


@triton.jit
def fail(norm_out, residual_out, row, wait_state, memory, call, shape):
    """Report the ranks whose words are missing, and make both outputs NaN."""
    missing_ranks = 1 << (row.number % shape.N)
    if not shape.TWO_SHOT or row.number % shape.N == call.rank:
        missing_ranks = 0
        for peer in tl.static_range(shape.N):
            place = place_of(peer, call.rank, shape.N) * (shape.C * shape.SLICE)
            words = row.own_slot + place + row.offsets
            word = tl.load(words, mask=mask_if(row.mask, peer != call.rank), other=0, volatile=True)
            missing_ranks |= tl.max((word == SENTINEL).to(tl.int32), axis=0) << peer
    report_failure(memory, call, row.number, wait_state, missing_ranks, 0, shape.N)
    tl.store(norm_out, tl.full(row.offsets.shape, NAN, tl.uint32), mask=row.mask)
    tl.store(residual_out, tl.full(row.offsets.shape, NAN, tl.uint32), mask=row.mask)
