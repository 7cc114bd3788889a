"""Compute the shape of the all-reduce kernel's work and memory: plain arithmetic, no Triton.

Everything here is a function of (N, H, dtype) and, for the memory, of the number of slots: equal on all
ranks, for every T and on both paths, because the bits of the result depend on it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from fd_fusion.kernels.all_reduce import quantise_ptx
from fd_fusion.kernels.all_reduce.poll_ptx import poll
from fd_fusion.reference import DTYPE_BYTES, FP8_GROUP

SIZES = range(2, 9)
SLOT_FILL = 0xFF  # the byte that all slots are filled with before the first call and at a reset
CONTROL_BYTES = 256  # the control page, at the start of every rank's symmetric memory
HEAD_WORDS = 16  # 8-byte words of state memory before the sums: limit, error page, addresses, counters
ERROR_PAGE, ADDRESSES, COUNTER, ROWS = 1, 2, 10, 11  # places of these words: `context.Memory`
COUNTER_STEP = 1 << 20  # what all programs of a launch add to the counter of rounds, for each of its rounds
MOST_ROUNDS = (1 << 31) // COUNTER_STEP - 1  # of a launch: the kernel computes what it adds in 32 bits
LINE_BYTES = 128  # of the cache
SMALLEST = 2.0**-126  # what fp32 holds: the hardware's rsqrt takes less for zero


@dataclass(frozen=True)
class Plan:
    """How the kernel works on a row of H elements: in `split` slices, whose sums are added in order. A program of
    one-shot has a slice, one of two-shot `two_shot_slices` of them: few rows are sooner ready by more programs, many
    rows by fewer, and the bits are the same."""

    size: int
    hidden_size: int
    dtype: str
    split: int
    num_warps: int
    two_shot_rows: int | None  # calls of at least so many rows are better served by two-shot; None: never
    interpreted: bool
    two_shot_slices: int = 1
    fp8: bool = False  # slices hold whole groups of FP8_GROUP elements; another slice is another order of the sums

    @property
    def words(self) -> int:
        """4-byte words in a row."""
        return self.hidden_size * DTYPE_BYTES[self.dtype] // 4

    @property
    def slice_words(self) -> int:
        """Words of a slice, in whole 128-byte lines. The last slice of a row may be shorter."""
        whole = FP8_GROUP // 2 if self.fp8 else 32
        return -(-self.words // (self.split * whole)) * whole

    @property
    def units(self) -> int:
        """16-byte units of one slice that a thread works on, a power of two; masked where the slice is shorter."""
        return 1 << max(0, -(-self.slice_words // (128 * self.num_warps)) - 1).bit_length()

    @property
    def places(self) -> int:
        """Rows in half a slot: one from each peer. The two of a result take the same places, on other ranks."""
        return max(2, self.size - 1) if self.two_shot_rows is not None or self.interpreted else self.size - 1

    @property
    def place_words(self) -> int:
        """Words of a place: a row, in whole slices."""
        return self.split * self.slice_words

    def slices(self, two_shot: bool) -> int:
        """Slices of a row that a program has."""
        return self.two_shot_slices if two_shot else 1

    @property
    def slot_bytes(self) -> int:
        """Bytes of symmetric memory of a slot, which holds one row of a launch."""
        return 2 * self.places * self.place_words * 4


def plan_for(size: int, hidden_size: int, dtype: str, *, interpreted: bool = False, fp8: bool = False) -> Plan:
    """Return the plan for N ranks and rows of H elements. The interpreter runs programs one after another, so under
    the interpreter a row is never split.

    Raises: ValueError: N is not in 2..8, the dtype is unknown, or a row is not a whole number of 16-byte units.
    """
    if size not in SIZES:
        raise ValueError(f"the all-reduce kernel takes 2 to 8 ranks, got {size}")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"the all-reduce kernel takes {sorted(DTYPE_BYTES)}, got {dtype!r}")
    if hidden_size <= 0 or hidden_size * DTYPE_BYTES[dtype] % 16:
        raise ValueError(f"H={hidden_size} of {dtype} is not a whole number of 16-byte units")
    words = hidden_size * DTYPE_BYTES[dtype] // 4
    split, num_warps = (1, 1) if interpreted else _MEASURED.get((size, words)) or _split(size, words)
    slices = 2 if (size, words) in _TWO_SLICES and not interpreted else 1
    return Plan(size, hidden_size, dtype, split, num_warps, _two_shot_rows(size, words), interpreted, slices, fp8)


# Where something else than `_split` says was measured to be faster, on H100 or H200: (N, words): (split, warps).
_MEASURED = {
    (2, 1440): (1, 4),
    (2, 2048): (1, 4),
    (2, 2560): (3, 2),
    (2, 3072): (3, 2),
    (2, 3584): (2, 4),
    (2, 4096): (4, 2),
    (4, 3072): (3, 4),
    (8, 4096): (8, 2),
}
_TWO_SLICES = {(4, 2048), (4, 4096)}  # of two-shot: faster for all T from 64 on, measured on H100
# From how many rows on two-shot is faster, where the residual stays: (N, words), measured on H100.
_TWO_SHOT_ROWS = {(4, 1024): 64, (4, 2048): 40, (4, 2560): 32, (4, 3072): 28, (4, 3584): 28, (4, 4096): 26}


def _split(size: int, words: int) -> tuple[int, int]:
    """Return how many programs share a row, and their warps: one 16-byte unit a thread, a few if the row is long.

    A thread never has less than one unit: then warps would hold copies of the same words, and could read different
    ones.
    """
    split = (1 if words <= 2560 else 2) if size == 2 else 4 if size <= 4 or words <= 1536 else 8
    while split > 1 and words < 256 * split:
        split //= 2
    while split < 8 and words > 4096 * split:
        split *= 2
    num_warps = 1
    while (
        num_warps < (8 if size == 2 else 4) and words > 128 * split * num_warps
    ) or words > 512 * split * num_warps:
        num_warps *= 2
    return split, num_warps


def _two_shot_rows(size: int, words: int) -> int | None:
    """Return the T from which two-shot is faster.

    With a residual that stays two-shot pushes two rows for each of (N-1)/N of the rows, one-shot N-1 rows for each.
    The second hop of two-shot takes some 1.5 us, and the bytes saved count at 270 GB/s, as measured with N=4.
    """
    saved_us = (size - 1 - 2 * (size - 1) / size) * words * 4 / 270e3
    return _TWO_SHOT_ROWS.get((size, words)) or (math.ceil(1.5 / saved_us) if saved_us > 0 else None)


def refuses_fp8(plan: Plan) -> str | None:
    """Return what the plan lacks to quantise in groups, or None."""
    if plan.dtype == "float32":
        return "bfloat16 or float16"
    return f"rows of whole groups of {FP8_GROUP}" if plan.hidden_size % FP8_GROUP else None


def symmetric_bytes(plan: Plan, slots: int) -> int:
    """Return the bytes of symmetric memory of each rank: the control page, then the slots."""
    return CONTROL_BYTES + slots * plan.slot_bytes


def state_memory_bytes(plan: Plan, slots: int) -> int:
    """Return the bytes of state memory of each rank: the head, then a line for each half of a slot and program, for
    the sums of the other programs."""
    return 8 * HEAD_WORDS + (2 * slots * plan.split * LINE_BYTES if plan.split > 1 else 0)


def total_bytes(plan: Plan, slots: int) -> int:
    """Return the bytes of all memory of each rank."""
    return symmetric_bytes(plan, slots) + state_memory_bytes(plan, slots)


def state_memory_words(plan: Plan, slots: int, *, limit: int, error_page: int, addresses: list[int]) -> list[int]:
    """Return the whole state memory before the first call, as int64 words.

    Args:
        limit: how long a program waits for a row of another rank, in nanoseconds.
        error_page: address of the pinned error page, as the device sees it.
        addresses: of the ranks' symmetric memory as mapped in this process, in rank order.
    """
    assert len(addresses) == plan.size
    sums = [-1] * (state_memory_bytes(plan, slots) // 8 - HEAD_WORDS)
    head = [limit, error_page, *addresses]
    return head + [0] * (HEAD_WORDS - len(head)) + sums


def slots_of(plan: Plan, *, workspace_bytes: int, limit: int | None) -> int:
    """Return the number of slots, the most rows of a round: a multiple of N, or less than N where there is no memory
    for more. `workspace_bytes` must hold a slot. Calls have up to `limit` rows, None: any number.
    """
    fixed = total_bytes(plan, 0)
    most = (workspace_bytes - fixed) // (total_bytes(plan, 1) - fixed)
    most = most // plan.size * plan.size or most
    return most if limit is None else min(most, -(-max(1, limit) // plan.size) * plan.size)


def rows_at_once(plan: Plan, slots: int, *, programs: int, two_shot: bool) -> int:
    """Return G, the most rows that a path works on at once. So many programs must be sure to run at the same time
    and leave room for other streams: half of what the device holds.

    By two-shot a program has the rows number, number + G, ...: where G and N have a common factor, some programs own
    many of their rows and others none.
    """
    return _spread(plan, min(slots, max(1, programs * plan.slices(two_shot) // plan.split)), two_shot)


def _spread(plan: Plan, at_once: int, two_shot: bool) -> int:
    """Return the most rows at once, up to `at_once`, of which every program owns some by two-shot."""
    while two_shot and math.gcd(at_once, plan.size) > 1:
        at_once -= 1
    return at_once


class Launch(NamedTuple):
    """Rows of a call that the kernel works on in one launch."""

    programs: int
    start: int  # the first row
    rows: int
    rounds: int


def launches(plan: Plan, slots: int, at_once: tuple[int, int], rows: int, two_shot: bool) -> list[Launch]:
    """Return the launches of a call: one of rounds if that can be, else as few as there are slots for.

    A launch counts its rows anew. So each begins at a multiple of N, where slots are: then rank t % N owns row t of
    the call by two-shot, however calls are cut.

    Args: at_once: rows at the same time, in a launch of one round and in one of rounds; 0: there is no such kernel.
    """
    alone, in_rounds = at_once
    if in_rounds and (one := launch_in_rounds(plan, slots, in_rounds, rows, two_shot)):
        return [one]
    unit = 1 if slots % plan.size else plan.size
    parts = -(-rows // slots)
    starts = [-(-rows // unit) * number // parts * unit for number in range(parts)]
    return [
        Launch(grid(plan, alone, stop - start, two_shot)[0], start, stop - start, 1)
        for start, stop in itertools.pairwise([*starts, rows])
    ]


def launch_in_rounds(plan: Plan, slots: int, at_once: int, rows: int, two_shot: bool) -> Launch | None:
    """Return one launch for a call of more rows than slots, in as few rounds as there are slots for, or None.

    Every program must have a row in each round, by two-shot one for each owner: what a program receives in a round
    shows it that its peers have cleared the one before. Fewer programs are no way out: with 127 at once in place of
    131, 1024 rows of H=4096 and four ranks took 55 us by one launch and 49 by two.
    """
    rounds = -(-rows // slots)
    enough = rows // rounds >= at_once * (plan.size if two_shot else 1)
    if not 1 < rounds <= MOST_ROUNDS or not enough or _spread(plan, at_once, two_shot) != at_once:
        return None
    return Launch(grid(plan, at_once, rows, two_shot)[0], 0, rows, rounds)


def grid(plan: Plan, at_once: int, rows: int, two_shot: bool) -> tuple[int]:
    """Return the grid of a launch of `rows` rows, `at_once` of them at the same time."""
    return (min(at_once, rows) * plan.split // plan.slices(two_shot),)


def constants(
    plan: Plan,
    *,
    weight_dtype: str,
    has_residual: bool,
    two_shot: bool,
    pdl: bool = False,
    residual_stays: bool = False,
    rounds: bool = False,
    fp8: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Return the kernel's constexpr arguments and launch options, by name.

    pdl: start while the kernel in front ends. residual_stays: by two-shot residual_out is right in the rows that this
    rank owns, and NaN in the others. rounds: for launches of several rounds, and up to 6 % slower for one. fp8: for
    `all_reduce_rms_norm_fp8`: its OUTPUT, "codes" or "both", and a formula of `reference.quantise`.
    """
    results = 1 if residual_stays else 2
    assert not two_shot or plan.places >= results, "opened without two-shot: its results have no place"
    assert not fp8 or (plan.fp8 and refuses_fp8(plan) is None)
    slices = plan.slices(two_shot)
    units = plan.units * slices
    # Found by compiling; test_sass.py names what spills, and how much. Fewer registers are more rows in flight, which
    # is speed for large T: 136 in place of 128 cost 13 % on sm_90.
    if plan.dtype == "float32":
        registers = 192 if two_shot else 168
    else:
        registers = 168 if two_shot and plan.size in (2, 8) and units > 1 else 128
    return {
        "N": plan.size,
        "WORDS": plan.words,
        "SLICE": plan.slice_words,
        "BLOCK": 128 * plan.num_warps * plan.units,
        "C": plan.split,
        "SLICES": slices,
        "PLACES": plan.places,
        "DTYPE": plan.dtype,
        "WEIGHT_DTYPE": weight_dtype,
        "HAS_RESIDUAL": has_residual,
        "TWO_SHOT": two_shot,
        "RESULTS": results,
        "ROUNDS": rounds,
        "OPERANDS": ",".join(["=&r"] * 36 * units + ["r"] * 4 * units + ["l"] * 4 * units + ["r"] * 4 * units),
        "UNITS": units,
        "POLL": None if plan.interpreted else poll(plan.size, plan.place_words, units),
        "POLL_RESULTS": None if plan.interpreted else poll(results + 1, plan.place_words, units),
        "PDL": pdl,
        "INTERPRETED": plan.interpreted,
        **({"launch_pdl": True} if pdl else {}),
        **(_of_fp8(plan, units, *fp8) if fp8 else {}),
        "num_warps": plan.num_warps,
        "num_stages": 1,
        # At least two programs fit on a multiprocessor.
        "maxnreg": min(registers, 32768 // (32 * plan.num_warps)),
        "enable_fp_fusion": False,
    }


def _of_fp8(plan: Plan, units: int, output: str, formula: str) -> dict[str, Any]:
    found = {"OUTPUT": output, "FORMULA": formula}
    return found | quantise_ptx.quantising(units, plan.dtype, plan.interpreted)
