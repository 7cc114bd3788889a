"""Compute all-reduce + residual add + RMSNorm of a row by one program, or by a few, in one kernel.

    s = ((x_0 + x_1) + ... + x_{N-1}) + residual           in fp32, in rank order, on every rank
    residual_out = round(s);  norm_out = round(s * rsqrt(mean(s^2) + eps) * (weight + weight_offset))

The life of row t by one-shot, on every rank alike:
    1. Its program loads the rank's own row and stores it into the slot of row t on every peer: it pushes the row.
    2. It polls the slot on its own rank until the words of all peers are there.
    3. It fills the slot with SENTINEL again. This 4-byte word means "not yet"; data that looks like it, a NaN, is
       sent as another NaN (`packing.py`). At the start all slots are full of it.
    4. It sums all rows in rank order, its own from registers, norms, and stores both outputs.
By two-shot rank t % N owns the row. The others push it to the owner alone. The owner loads its own and does 2 to 4,
and pushes the finished row into the slot on every peer before it stores: norm_out, and residual_out unless that stays
(RESULTS 2 or 1). The program of each peer polls for them, fills the slot with SENTINEL and stores both outputs, NaN
for a residual that stays: the next call needs it in the row's owner alone.

A program has every G-th row of a round, with G rows at work at once: by one-shot one after the other. By two-shot in
batches of N such rows: it pushes the rows of the other owners, finishes the row that its rank owns, then receives the
others. So every program has rows to finish; what an owner waits for its peers push before they wait for anything of
the batch, and what a program receives the owners finish before they receive. C programs may share a row, a slice
each, and exchange the sums of their squares in memory of their rank (`slice_sums.py`).

Slots: a launch works in rounds, one where there are slots for all of its rows; for one round the kernel is compiled
without the code of others (ROUNDS). Every row of a round has a slot of its own, so a round uses no word twice and
needs no fence inside. A slot has two halves, which the rounds use in turn, counted through all launches by a counter
in state memory. What round k pushes finds its half empty:
    - Round k-2 was the last that used this half, and each program cleared what it had received there.
    - A program that pushes in round k has received words of round k-1 from the same program of every peer; or its
      launch has just begun, and the launch before has ended, in which all programs have received such words.
    - That peer had ended k-2 before it pushed them: in between lies the end of a kernel, or the fence of that program
      between two rounds.
For this every program has a row in each round, by two-shot one for each owner (`plan.launch_in_rounds`), on all ranks
alike. It holds on both paths and any mixture of them. No circle of ranks waits for each other
(tests/kernels/all_reduce/protocol_model.py).

Bits: equal on all ranks, for every T and on both paths. Both paths end in the same `finish`, the slices in which the
squares of a row are summed are a function of (N, H, dtype) alone (`plan.py`, `slice_sums.py`), however many of them a
program has, and nothing is specialized on a run-time value.

Memory: `context.Memory`.

Bounded wait: the first program that runs out of time sets the abort word of every rank, and writes its error page and
NaN. A program that finds the abort word set pushes nothing, waits for nothing and writes NaN; of that one call, a
row that was pushed before may still come out right. On a rank that starts no further call the abort word is the only
sign, so the host of that rank must read it too. Then the workspace is dead until a collective reset (synchronize,
barrier, fill all three memories again, barrier). Two streams on one workspace: a counter that shows another launch
while a program runs is reported and ends the group likewise.

Source: empty words as the sign are the idea of TensorRT-LLM's Lamport kernels, pushing words that need no flag that
of NCCL's LL protocol; the code is new.
"""

import triton
import triton.language as tl

from fd_fusion.kernels.all_reduce import plan
from fd_fusion.kernels.all_reduce.context import Addresses, Call, Memory, Polling, Round, Row, Rows, Shape
from fd_fusion.kernels.all_reduce.packing import NAN, mask_if, pointer, without_sentinel
from fd_fusion.kernels.all_reduce.quantising import Quantising, fail_quantised, store_quantised
from fd_fusion.kernels.all_reduce.row import fail, finish, push, push_results, receive_results
from fd_fusion.kernels.all_reduce.slice_sums import clear_sums
from fd_fusion.kernels.all_reduce.wait import (
    COUNTER,
    COUNTER_STEP,
    WAIT_TWO_STREAMS,
    abort_bits,
    count_launch,
    peer_memories,
    report_failure,
    shows_two_streams,
)

try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # before Triton 3.5
    gdc_wait = None

CONTROL_WORDS = tl.constexpr(plan.CONTROL_BYTES // 4)
HEAD_WORDS = tl.constexpr(plan.HEAD_WORDS)


@triton.jit
def work_on_rows(addresses, count, rounds, rank, op, eps, weight_offset, shape, polling, quantising):
    """Push and finish the rows of one program."""
    rounds = rounds if shape.ROUNDS else 1
    programs: tl.constexpr = shape.C // shape.SLICES  # of a row
    stride = tl.num_programs(0) // programs
    number = tl.program_id(0) // programs
    c = tl.program_id(0) % programs * shape.SLICES
    offsets = tl.arange(0, shape.SLICES * shape.BLOCK)
    if shape.SLICES == 1:
        mask = offsets < (shape.WORDS if shape.C == 1 else tl.minimum(shape.SLICE, shape.WORDS - c * shape.SLICE))
    elif shape.SLICE == shape.BLOCK:
        mask = offsets < shape.WORDS - c * shape.SLICE
    else:  # a slice does not fill its part of the tensors
        which, offsets = offsets // shape.BLOCK, offsets % shape.BLOCK
        mask = offsets < tl.minimum(shape.SLICE, shape.WORDS - (c + which) * shape.SLICE)
        offsets += which * shape.SLICE
    sums = pointer(addresses.state_memory, tl.uint32) + 2 * HEAD_WORDS
    state_memory = pointer(addresses.state_memory, tl.uint64)
    own_slots = pointer(addresses.own_slots, tl.uint32)
    x = pointer(addresses.x, tl.uint32) + c * shape.SLICE
    # All that the first push needs is loaded at once: volatile loads stay in this order.
    words = tl.load(x + number.to(tl.int64) * shape.WORDS + offsets, mask=mask, other=0, volatile=True)
    counter = tl.load(state_memory + COUNTER, volatile=True)
    first_round = counter // COUNTER_STEP
    if shape.ROUNDS:  # the first program may have added its share, all the rounds less one for each other program
        first_round -= tl.where(counter % COUNTER_STEP < COUNTER_STEP // 2, 0, rounds - 1).to(tl.uint64)
    memory = Memory(own_slots, state_memory, sums, peer_memories(state_memory, rank, shape.N))
    call = Call(rank, op, first_round, rounds, c, eps, weight_offset)
    rows = Rows(
        count,
        offsets,
        mask,
        CONTROL_WORDS + c * shape.SLICE,
        x,
        pointer(addresses.residual, tl.uint32) + c * shape.SLICE,
        addresses.weight,
        pointer(addresses.norm_out, tl.uint32) + c * shape.SLICE,
        pointer(addresses.residual_out, tl.uint32) + c * shape.SLICE,
    )
    half = (first_round & 1).to(tl.int32)
    _push(number, words, Round(0, half), rows, memory, call, shape)
    count_launch(state_memory, count, rounds)
    if shape.TWO_SHOT:
        _two_shot(number, stride, half, rows, memory, call, shape, polling, quantising)
    else:
        _one_shot(number, stride, half, words, rows, memory, call, shape, polling, quantising)


@triton.jit
def _one_shot(first, stride, half, words, rows, memory, call, shape, polling, quantising):
    """Finish the first row of a program, which is pushed, then push and finish one after the other. A row is
    quantised while the words of the next one are under way."""
    number = first
    start = 0
    end = _end_of_first_round(rows, call, shape)
    rounds_begun = 1
    while number < rows.count:  # not a range: the interpreter of some versions cannot take its bounds from arguments
        norm, wait_state = _finish(
            number, words, Round(start, half), rows, memory, call, shape, polling, quantising)  # fmt: skip
        finished = number
        number += stride
        if shape.ROUNDS:  # noqa: SIM102, which Triton cannot join
            if (number >= end) & (end < rows.count):
                start = end
                number = start + first
                half, rounds_begun, end = _next_round(half, rounds_begun, rows, call, polling)
        if number < rows.count:
            words = _load(number, rows, shape)
            _push(number, words, Round(start, half), rows, memory, call, shape)
        _quantise(finished, norm, wait_state, rows, call, shape, quantising)


@triton.jit
def _two_shot(first, stride, half, rows, memory, call, shape, polling, quantising):
    """Work on the rows of a program in batches of N, of which this rank owns one where N and the stride have no
    common factor: push the rows of the others, finish the own row, then receive the others. The first is pushed. No
    batch reaches from one round into the next."""
    to_push = first + stride
    to_finish = first
    to_receive = first
    batch_end = first + shape.N * stride
    start = 0
    round_end = _end_of_first_round(rows, call, shape)
    rounds_begun = 1
    while to_receive < rows.count:
        end = tl.minimum(round_end, batch_end)
        while to_push < end:
            if to_push % shape.N != call.rank:
                _push(to_push, _load(to_push, rows, shape), Round(start, half), rows, memory, call, shape)
            to_push += stride
        while to_finish < end:
            if to_finish % shape.N == call.rank:
                words = _load(to_finish, rows, shape)
                norm, wait_state = _finish(
                    to_finish, words, Round(start, half), rows, memory, call, shape, polling, quantising)  # fmt: skip
                _quantise(to_finish, norm, wait_state, rows, call, shape, quantising)
            to_finish += stride
        while to_receive < end:
            if to_receive % shape.N != call.rank:
                norm, wait_state = _receive(
                    to_receive, Round(start, half), rows, memory, call, shape, polling, quantising)  # fmt: skip
                _quantise(to_receive, norm, wait_state, rows, call, shape, quantising)
            to_receive += stride
        if shape.ROUNDS:  # noqa: SIM102, which Triton cannot join
            if (to_receive >= round_end) & (round_end < rows.count):
                start = round_end
                half, rounds_begun, round_end = _next_round(half, rounds_begun, rows, call, polling)
                to_push = start + first
                to_finish = to_push
                to_receive = to_push
        batch_end = to_receive + shape.N * stride


@triton.jit
def _end_of_round(rounds_begun, rows, call):
    """Return the row behind the last one of a round: the first rounds have one row more than the others."""
    fewest = rows.count // call.rounds
    return fewest * rounds_begun + tl.minimum(rounds_begun, rows.count - fewest * call.rounds)


@triton.jit
def _end_of_first_round(rows, call, shape):
    return _end_of_round(1, rows, call) if shape.ROUNDS else rows.count


@triton.jit
def _next_round(half, rounds_begun, rows, call, polling):
    """Begin the next round. What this program has cleared in the last one is cleared for all ranks before anything
    that it pushes from here on."""
    if not polling.INTERPRETED:
        tl.debug_barrier()
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1)
    return 1 - half, rounds_begun + 1, _end_of_round(rounds_begun + 1, rows, call)


@triton.jit
def _slot(number, of_round, rows, shape):
    """Return the offset of the half of a slot that a row has, in words of the symmetric memory of every rank."""
    half_words: tl.constexpr = shape.PLACES * shape.C * shape.SLICE
    return rows.slots + of_round.half * half_words + (number - of_round.start) * (2 * half_words)


@triton.jit
def _sums_of(number, of_round, shape):
    """Return which of the places for sums a row has. Two halves are for the rounds of a launch: between launches the
    end of a kernel has cleared them, and two ranks lose 3 % at (8192, 512) by the second."""
    return 2 * (number - of_round.start) + of_round.half if shape.ROUNDS else number


@triton.jit
def _load(number, rows, shape):
    return tl.load(rows.x + number.to(tl.int64) * shape.WORDS + rows.offsets, mask=rows.mask, other=0, volatile=True)


@triton.jit
def _push(number, words, of_round, rows, memory, call, shape):
    slot, sums = _slot(number, of_round, rows, shape), _sums_of(number, of_round, shape)
    push(Row(number, words, rows.offsets, rows.mask, sums, slot, memory.own_slots), memory, call, shape)


@triton.jit
def _finish(number, words, of_round, rows, memory, call, shape, polling, quantising):
    """Finish a row of words that are pushed; by two-shot this rank owns the row, and its peers get the result.
    Returns the words of its norm and the state of the wait, for `_quantise`."""
    slot, sums = _slot(number, of_round, rows, shape), _sums_of(number, of_round, shape)
    row = Row(number, without_sentinel(words), rows.offsets, rows.mask, sums, slot, memory.own_slots + slot)
    residual = rows.residual + number.to(tl.int64) * shape.WORDS
    norm, summed, wait_state, counter_now = finish(
        row, residual, rows.weight, abort_bits(memory), memory, call, shape, polling)  # fmt: skip
    if shape.TWO_SHOT:
        push_results(row, norm, summed, wait_state, memory, shape)
    _store(row, norm, summed, wait_state, counter_now, rows, memory, call, shape, quantising)
    if shape.C > shape.SLICES:
        clear_sums(sums, memory, call, shape)
    return norm, wait_state


@triton.jit
def _receive(number, of_round, rows, memory, call, shape, polling, quantising):
    """Receive a row from its owner, and return as `_finish`. A residual that stays is NaN here, for whoever reads the
    row all the same."""
    slot, sums = _slot(number, of_round, rows, shape), _sums_of(number, of_round, shape)
    # Nothing is loaded: the compiler takes the layout of the words from a load, and the polling code needs that one.
    nothing = tl.load(rows.x + rows.offsets, mask=mask_if(rows.mask, rows.count < 0), other=NAN)
    row = Row(number, nothing, rows.offsets, rows.mask, sums, slot, memory.own_slots + slot)
    norm, summed, wait_state, counter_now = receive_results(row, abort_bits(memory), memory, call, shape, polling)
    if shape.RESULTS == 1:
        summed = nothing
    _store(row, norm, summed, wait_state, counter_now, rows, memory, call, shape, quantising)
    return norm, wait_state


@triton.jit
def _store(row, norm, summed, wait_state, counter_now, rows, memory, call, shape, quantising):
    start = row.number.to(tl.int64) * shape.WORDS
    norm_out = rows.norm_out + start + row.offsets
    residual_out = rows.residual_out + start + row.offsets
    if quantising.OUTPUT != "codes":
        tl.store(norm_out, norm, mask=row.mask)
    tl.store(residual_out, summed, mask=row.mask)
    if wait_state != 0:
        fail(norm_out, residual_out, row, wait_state, memory, call, shape)
    if shows_two_streams(counter_now, call):
        report_failure(memory, call, row.number, wait_state | WAIT_TWO_STREAMS, 0, 0, shape.N)


@triton.jit
def _quantise(number, norm, wait_state, rows, call, shape, quantising):
    """Store codes and scales, last: the registers of the sum are free."""
    if quantising.OUTPUT != "norm":
        row = Row(number, norm, rows.offsets, rows.mask, 0, 0, rows.x)
        store_quantised(norm, row, call.slice_index, quantising, shape)
        if wait_state != 0:
            fail_quantised(row, call.slice_index, quantising, shape)


@triton.jit(do_not_specialize=["x", "residual", "weight", "norm_out", "residual_out", "state_memory", "own_slots",
                               "rows", "rounds", "rank", "op"])  # fmt: skip
def all_reduce_rms_norm(x, residual, weight, norm_out, residual_out, state_memory, own_slots, rows, rounds, rank, op,
                        eps, weight_offset, N: tl.constexpr, WORDS: tl.constexpr, SLICE: tl.constexpr,
                        BLOCK: tl.constexpr, C: tl.constexpr, SLICES: tl.constexpr, PLACES: tl.constexpr,
                        DTYPE: tl.constexpr, WEIGHT_DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                        TWO_SHOT: tl.constexpr, RESULTS: tl.constexpr, ROUNDS: tl.constexpr, POLL: tl.constexpr,
                        POLL_RESULTS: tl.constexpr, OPERANDS: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
                        INTERPRETED: tl.constexpr):  # fmt: skip
    """Compute the formula above for all rows of a launch: launch the kernel on every rank in the same order, with
    `launches` and `constants` of `plan.py`.

    Args:
        x, residual, norm_out, residual_out: addresses of [rows, H], contiguous, dtype DTYPE; multiples of 16, as
            all addresses here. Without a residual its address is not read; give any. Either output may be x or
            residual itself, but not both outputs the same memory, and nothing may overlap otherwise. By two-shot
            the residual of a row is read by the owner alone, and with RESULTS == 1 written by the owner alone.
        weight: address of [H], WEIGHT_DTYPE (DTYPE, or float32, or any half).
        state_memory: address of this rank's state memory. own_slots: address of this rank's own symmetric memory.
        rows: T, equal on all ranks, at least 1. rounds: of about T / rounds rows each, no more than there are slots;
            without ROUNDS one, whatever is given. Grid and rounds are the launch's. rank: in the group. op: a
            number below 2^24 for the error page.
        eps, weight_offset: fp32; eps > 0.
    """
    if PDL:  # started while the kernel in front ends: its stores, of slots and counter too, are visible from here on
        gdc_wait()
    addresses = Addresses(x, residual, weight, norm_out, residual_out, state_memory, own_slots)
    work_on_rows(
        addresses, rows, rounds, rank, op, eps, weight_offset,
        Shape(N, WORDS, SLICE, BLOCK, C, SLICES, PLACES, DTYPE, WEIGHT_DTYPE, HAS_RESIDUAL, TWO_SHOT, RESULTS,
              ROUNDS),
        Polling(POLL, POLL_RESULTS, OPERANDS, UNITS, INTERPRETED),
        Quantising(0, 0, 0, 0, 0.0, "norm", "", INTERPRETED, None, None, None, None, None, 0))  # fmt: skip
