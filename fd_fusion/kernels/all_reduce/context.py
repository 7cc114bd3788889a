"""The tuples that the functions of the kernel pass on: what a call works on, and for which shape it is compiled.

A tuple that holds constants is made where it is passed: Triton 3.3 makes tensors of the numbers in a tuple that is
assigned to a name.
"""

from typing import NamedTuple

import triton.language as tl


class Addresses(NamedTuple):
    """The addresses of a call, as integers. See `all_reduce_rms_norm`."""

    x: tl.tensor
    residual: tl.tensor
    weight: tl.tensor
    norm_out: tl.tensor
    residual_out: tl.tensor
    state_memory: tl.tensor
    own_slots: tl.tensor


class Memory(NamedTuple):
    """Pointers to the memory of a group, one set for each (group, H, dtype); sizes in `plan.py`.

    Symmetric memory, which every rank of the group addresses: a control page of 256 bytes, whose first uint32 is the
    abort word, then the slots: a place for the row of each peer, twice. Before the first call and at a reset the page
    is zero and the slots are filled with SLOT_FILL.

    State memory, which this rank alone addresses, int64: `plan.state_memory_words`.
    - [0] the limit of a wait for the row of another rank, in nanoseconds; `check_wait` adds a quarter where it says.
      Read only when a wait is already long, so the limit may be changed at any time.
    - [1] the address of the error page (`error_page.py`).
    - [2..2+N) the addresses of the symmetric memory of all ranks.
    - [10] the counter of rounds: the programs of a launch add 2^20 for each of its rounds together (`count_launch`).
    - [11] the number of rows so far.
    - [16..] words in which the programs that share a row exchange their sums, SENTINEL like those of the slots, and
      with two halves like them, if a launch has rounds; 128 bytes for each reader, since where rows share a line of
      the cache each poll waits for the stores of other rows (0.5 us).
    """

    own_slots: tl.tensor  # uint32: the symmetric memory of this rank
    state_memory: tl.tensor  # uint64
    sums: tl.tensor  # uint32: the same memory from [16] on
    peers: tuple  # of the seven ranks behind this one, uint32: their symmetric memory


class Call(NamedTuple):
    """What is the same for all rows of a program."""

    rank: tl.tensor
    op: tl.tensor
    first_round: tl.tensor  # number of this launch's first round, from the counter
    rounds: tl.tensor  # of this launch
    slice_index: tl.tensor  # c: the first slice of its rows that this program has
    eps: tl.tensor
    weight_offset: tl.tensor


class Row(NamedTuple):
    """The slice of one row that a program works on."""

    number: tl.tensor
    words: tl.tensor  # uint32 [BLOCK]: the slice of x
    offsets: tl.tensor  # of the words in the slice
    mask: tl.tensor
    sums: tl.tensor  # number of the row's place for sums
    slot: tl.tensor  # offset of its half of a slot in the symmetric memory of every rank, in words
    own_slot: tl.tensor  # uint32 pointer to this rank's own slot; `push` does not read it, and gets any


class Round(NamedTuple):
    """A round of a launch: each of its rows has a slot of its own."""

    start: tl.tensor  # its first row
    half: tl.tensor  # of the slots that it uses


class Rows(NamedTuple):
    """The slices that a program has of the rows of a launch: each pointer, uint32, is to the slice of row 0."""

    count: tl.tensor
    offsets: tl.tensor  # of the words in a slice
    mask: tl.tensor
    slots: tl.tensor  # offset of the first slot in the symmetric memory of every rank, in words
    x: tl.tensor
    residual: tl.tensor
    weight: tl.tensor  # address of the whole weight, an integer
    norm_out: tl.tensor
    residual_out: tl.tensor


class Shape(NamedTuple):
    """What the kernel computes. From `plan.constants`."""

    N: tl.constexpr  # ranks
    WORDS: tl.constexpr  # of 4 bytes, in a row
    SLICE: tl.constexpr  # words of a slice
    BLOCK: tl.constexpr  # words of the tensors that hold a slice, a power of two
    C: tl.constexpr  # slices of a row
    SLICES: tl.constexpr  # that a program has: 1 or 2
    PLACES: tl.constexpr  # rows in half a slot
    DTYPE: tl.constexpr
    WEIGHT_DTYPE: tl.constexpr
    HAS_RESIDUAL: tl.constexpr
    TWO_SHOT: tl.constexpr
    RESULTS: tl.constexpr  # by two-shot: rows that an owner sends back, 1 (norm_out) or 2 (residual_out too)
    ROUNDS: tl.constexpr  # whether a launch may have several


class Polling(NamedTuple):
    """How a program polls its slots. From `plan.constants`."""

    POLL: tl.constexpr  # PTX that polls for the rows of all ranks; None under the interpreter
    POLL_RESULTS: tl.constexpr  # PTX that polls for the rows that an owner sends back
    OPERANDS: tl.constexpr  # constraints of the operands of both
    UNITS: tl.constexpr  # 16-byte units of a row in a thread
    INTERPRETED: tl.constexpr
