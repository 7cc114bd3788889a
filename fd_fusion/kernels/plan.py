"""The shape of the fused all-reduce kernel's work and memory: plain arithmetic, no Triton.

Everything here is a function of (N, H, dtype) and, for the memory, of the number of programs G: equal on all
ranks, for every T and on both paths, because the bits of the result depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SIZES = range(2, 9)
SLOT_FILL = 0xFF  # the byte that all slots are filled with before the first call and at a reset
CONTROL_BYTES = 256  # the control page, at the start of every rank's symmetric memory
PROGRAM_WORDS = 16  # 8-byte words of local memory before the epochs: limit, error page, the addresses of N ranks
ERROR_PAGE_BYTES = 64

# What the error page says, in its word 0 (bits 0..3). See all_reduce_rms_norm.py.
TIMED_OUT, TOLD, TWO_STREAMS = 1, 2, 3


@dataclass(frozen=True)
class Plan:
    """How a row of H elements is worked on. `split` programs share a row; each holds one slice of it."""

    size: int
    hidden_size: int
    dtype: str
    split: int
    num_warps: int
    two_shot_rows: int | None  # calls of at least so many rows are better served by two-shot; None = never
    interpreted: bool

    @property
    def words(self) -> int:
        """4-byte words in a row."""
        return self.hidden_size * DTYPE_BYTES[self.dtype] // 4

    @property
    def slice_words(self) -> int:
        """Words of a slice, in whole 128-byte lines. The last slice of a row may be shorter."""
        return -(-self.words // (self.split * 32)) * 32

    @property
    def program_bytes(self) -> int:
        """Symmetric memory of one program: two parities of N rows of words, and of the two rows of results."""
        return 2 * (self.size + 2) * self.slice_words * 4


def plan_for(size: int, hidden_size: int, dtype: str, *, interpreted: bool = False) -> Plan:
    """The plan for N ranks and rows of H elements. Under the interpreter programs run one after another, so
    there a row is never split.

    Raises: ValueError: N is not in 2..8, the dtype is unknown, or a row is not a whole number of 16-byte units.
    """
    if size not in SIZES:
        raise ValueError(f"the all-reduce kernel takes 2 to 8 ranks, got {size}")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"the all-reduce kernel takes {sorted(DTYPE_BYTES)}, got {dtype!r}")
    if hidden_size <= 0 or hidden_size * DTYPE_BYTES[dtype] % 16:
        raise ValueError(f"H={hidden_size} of {dtype} is not a whole number of 16-byte units")
    words = hidden_size * DTYPE_BYTES[dtype] // 4
    split = 1
    while not interpreted and split < 8 and size * words > 16384 * split:
        split *= 2
    # At least one 16-byte unit a thread: with fewer, warps would hold copies and could see different words.
    num_warps = max(1, min(8, words // split // 128))
    return Plan(size, hidden_size, dtype, split, num_warps, 16 if size > 2 else None, interpreted)


def slot_bytes(plan: Plan) -> int:
    """Symmetric bytes that one row in flight takes: what G programs need is `symmetric_bytes`."""
    return plan.split * plan.program_bytes


def symmetric_bytes(plan: Plan, programs: int) -> int:
    """Symmetric memory of each rank: the control page, then `programs` slots."""
    return CONTROL_BYTES + programs * slot_bytes(plan)


def local_bytes(plan: Plan, programs: int) -> int:
    """Local memory of each rank: the head, then an epoch and two words of exchange for each program."""
    return 8 * (PROGRAM_WORDS + 3 * programs * plan.split)


def local_words(plan: Plan, programs: int, *, limit: int, error_page: int, addresses: list[int]) -> list[int]:
    """The whole local memory before the first call, as int64 words.

    Args:
        limit: how long a program waits, in nanoseconds.
        error_page: address of the pinned error page, as the device sees it.
        addresses: of the ranks' symmetric memory as mapped in this process, in rank order.
    """
    assert len(addresses) == plan.size
    words = [0] * (local_bytes(plan, programs) // 8)
    words[: 2 + plan.size] = [limit, error_page, *addresses]
    return words


def most_programs(plan: Plan, *, workspace_bytes: int, multiprocessors: int) -> int:
    """G, the most rows in flight: what the memory allows, and one program a multiprocessor, of which at least
    two fit, so that all programs of a call run at once and other streams still find room. 0: too little memory.
    """
    return min((workspace_bytes - CONTROL_BYTES) // slot_bytes(plan), max(1, multiprocessors // plan.split))


def grid(plan: Plan, programs: int, rows: int) -> tuple[int]:
    """The launch grid of a call of `rows` rows, G = `programs`."""
    return (min(rows, programs) * plan.split,)


def constants(plan: Plan, *, weight_dtype: str, has_residual: bool, two_shot: bool) -> dict[str, Any]:
    """The kernel's constexpr arguments and launch options, by name."""
    return {
        "N": plan.size,
        "WORDS": plan.words,
        "SLICE": plan.slice_words,
        "BLOCK": 1 << (plan.slice_words - 1).bit_length(),
        "C": plan.split,
        "DTYPE": plan.dtype,
        "WEIGHT_DTYPE": weight_dtype,
        "HAS_RESIDUAL": has_residual,
        "TWO_SHOT": two_shot,
        "INTERPRETED": plan.interpreted,
        "num_warps": plan.num_warps,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def read_error_page(words: list[int]) -> dict[str, Any] | None:
    """What the int64 words of the error page say, or None if nothing has gone wrong.

    Returns: code (TIMED_OUT, TOLD: another rank ran out of time, TWO_STREAMS), op, row, epoch, missing (ranks).
    """
    for first, epoch in ((words[0], words[1]), (words[2], words[3])):
        if first:
            missing = [rank for rank in range(8) if first >> (4 + rank) & 1]
            return {
                "code": first & 15,
                "op": first >> 16 & 0xFFFFFF,
                "row": first >> 40 & 0x7FFFFF,
                "epoch": epoch,
                "missing": missing,
            }
    return None
