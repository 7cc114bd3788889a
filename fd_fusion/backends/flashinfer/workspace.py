"""The workspace of FlashInfer's kernel, laid out, filled and given back by us.

FlashInfer's own creation leaves barrier flags uncleared, does not synchronise the device before its barrier, never
frees the control block, or needs torch, each in some of its releases. The kernel only needs addresses:

    comm_buf   N*T*H*e bytes        any content; two-shot copies through it
    flags      N*256 int32          zero
    lamport    3 * N*T*H*e bytes    three buffers in turn; -0.0 in every element means "not written yet"
    control    5 int32 [CTAs of the running call, two-shot flag, lamport flag, N*T*H*e, elements to clear]

and a device table of int64 with comm_buf, flags and lamport of every rank and the own control block. All four lie
in one buffer of symmetric memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import (
    MemoryProvider,
    SymmetricMemory,
    on_all_ranks,
    open_symmetric_memory,
    whole_lines,
)

CONTROL_INTS = 5
_FLAG_BYTES_A_RANK = 256 * 4
_COMM_BYTES_END = 2**30  # the kernel multiplies the size of a lamport buffer by up to 2, in int32
_PIECE = 1 << 20  # bytes of a fill that are copied at once
NEGATIVE_ZERO = {2: b"\x00\x80", 4: b"\x00\x00\x00\x80"}  # by bytes an element


@dataclass(frozen=True)
class Layout:
    """Offsets in each rank's buffer, in bytes, for calls of up to `rows` rows."""

    size: int
    rows: int
    hidden_size: int
    element_bytes: int

    @property
    def comm_bytes(self) -> int:
        return self.size * self.rows * self.hidden_size * self.element_bytes

    @property
    def flags(self) -> int:
        return whole_lines(self.comm_bytes)

    @property
    def lamport(self) -> int:
        return self.flags + self.size * _FLAG_BYTES_A_RANK

    @property
    def control(self) -> int:
        return whole_lines(self.lamport + 3 * self.comm_bytes)

    @property
    def nbytes(self) -> int:
        return self.control + 4 * CONTROL_INTS

    def pointers(self, memory: SymmetricMemory) -> list[int]:
        """Return the table that the kernel reads: 3N + 1 addresses, as this process maps them."""
        parts = [address + offset for offset in (0, self.flags, self.lamport) for address in memory.addresses]
        return [*parts, memory.own + self.control]


def rows_that_fit(nbytes: int, size: int, hidden_size: int, element_bytes: int) -> int:
    """Return the most rows T in `nbytes`: N*T*H*e for two-shot, three times that for one-shot."""
    row = size * hidden_size * element_bytes
    overhead = Layout(size, 0, hidden_size, element_bytes).nbytes + 2 * 128  # two offsets are rounded up
    return min(max(0, nbytes - overhead) // (4 * row), (_COMM_BYTES_END - 1) // row)


def open_memory(group: Group, layout: Layout, provider: MemoryProvider, *, timeout_s: float) -> SymmetricMemory:
    """Collective: allocate, exchange and fill; no rank starts before all have filled.

    Raises: FusionError: on all ranks alike.
    """

    def push(addresses: tuple[int, ...], value: int) -> None:
        for address in addresses:
            provider.write(address, 2 * value.to_bytes(8, "little"))

    memory = open_symmetric_memory(group, layout.nbytes, provider, push, timeout_s=timeout_s)
    on_all_ranks(group, "flashinfer_filled", lambda: fill(layout, memory), timeout_s, undo=memory.close)
    return memory


def fill(layout: Layout, memory: SymmetricMemory) -> None:
    """Put the initial content into the own buffer, which is zero, and wait: a late one would erase a peer's words."""
    piece = NEGATIVE_ZERO[layout.element_bytes] * (_PIECE // layout.element_bytes)
    start, end = layout.lamport, layout.lamport + 3 * layout.comm_bytes
    for offset in range(start, end, _PIECE):
        memory.provider.write(memory.own + offset, piece[: end - offset])
    control = struct.pack(f"<{CONTROL_INTS}i", 0, 0, 0, layout.comm_bytes, 0)
    memory.provider.write(memory.own + layout.control, control)
    memory.provider.synchronize()
