"""One buffer a rank that every rank of the group can address: opened together, proven, closed in order.

`open_symmetric_memory` is collective and ends the same way on all ranks: all of them have the memory, or all raise
the same reason. A driver's answer about reachability is no proof; before the memory is handed out, every rank has
stored words into every peer with the kernel's own store, and every peer has read these words.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from typing import Any

from fd_fusion.comm.cuda_ipc import CudaIpc, process_identity
from fd_fusion.comm.group import Group
from fd_fusion.comm.posix_shm import PosixShm
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.reasons import FusionError, Reason, because

CLOSE_TIMEOUT_S = 5.0  # how long an orderly close waits for the other ranks
_PROOF_BYTES = 16  # what one rank stores into each peer in the proof

_lost: set[str] = set()  # names of groups with a rank that did not come to a close

Push = Callable[[tuple[int, ...], int], None]
"""Store an int64 value, twice, at each of these 16-byte aligned addresses, as the kernel stores its words."""

MemoryProvider = CudaIpc | PosixShm
"""Where the memory comes from: device memory of GPU ranks, or shared memory of CPU ranks."""


class SymmetricMemory:
    """`addresses[p]` is where this process reaches rank p's buffer of `nbytes`; `own` is its own."""

    def __init__(self, group: Group, provider: MemoryProvider, nbytes: int, nonce: str):
        self.group, self.provider, self.nbytes, self.nonce = group, provider, nbytes, nonce
        self._mapped: dict[int, int] = {}  # rank -> address, what is still to be given back
        self.addresses: tuple[int, ...] = ()
        self._closed = False

    @property
    def own(self) -> int:
        return self.addresses[self.group.rank]

    def close(self, *, wait: bool = True) -> bool:
        """Give everything back; may be repeated. Device memory goes in the driver's order: all ranks finish
        their work, unmap their peers, and only then free what they own.

        With `wait` false all memory, and when a peer is gone device memory, is left to the end of the
        process: nothing else can be waited for, and a running kernel may still reach it. Names go in any
        case. Returns whether everything was given back.
        """
        if self._closed:
            return True
        self._closed = True  # a rank that has mapped nothing goes through the steps too: the others wait for it
        orderly = self.provider.free_waits_for_peers
        own = self._mapped.pop(self.group.rank, None)
        peers, self._mapped = list(self._mapped.values()), {}
        if not wait or (orderly and not (self._barrier("closing") and _ignoring_errors(self.provider.synchronize))):
            _ignoring_errors(self.provider.opened_everywhere)
            return False
        failed = [address for address in peers if not _ignoring_errors(self.provider.close, address)]
        if orderly and (failed or not self._barrier("unmapped")):
            return False
        return not failed and (own is None or _ignoring_errors(self.provider.free, own))

    def _barrier(self, step: str) -> bool:
        """Wait for the other ranks; once in vain is enough, whatever else this process has to close."""
        name = self.group.name
        arrived = name not in _lost and barrier(self.group, f"{self.nonce}/{step}", CLOSE_TIMEOUT_S)
        if not arrived:
            _lost.add(name)
        return arrived


def open_symmetric_memory(
    group: Group, nbytes: int, provider: MemoryProvider, push: Push, *, timeout_s: float
) -> SymmetricMemory:
    """Collective: give every rank a zeroed buffer of `nbytes` that all ranks of the group can address.

    Args:
        push: launches the kernel's own store; used for the proof alone.
        timeout_s: how long a silent rank is waited for at each step.
    Raises: FusionError: on all ranks alike, with the reason of the first rank that refused.
    """
    identity, refusal = as_refusal(lambda: {**process_identity(), **provider.identity()})
    identity = {**(identity or {}), "nbytes": nbytes, "salt": secrets.token_hex(8)}
    ranks = agree_or_raise(group, "identity", refusal, identity, timeout_s)
    if refusal := _unreachable(ranks, group):
        raise FusionError(refusal)
    nonce = hashlib.sha256("".join(r["salt"] for r in ranks).encode()).hexdigest()[:16]
    memory = SymmetricMemory(group, provider, nbytes, nonce)
    try:
        handles = _allocate(memory, timeout_s)
        _map(memory, handles, timeout_s)
        _prove(memory, push, timeout_s)
    except FusionError:
        memory.close()  # all ranks come to this close, or one is missing for good
        raise
    except BaseException:
        memory.close(wait=False)
        raise
    _lost.discard(group.name)
    return memory


def whole_lines(nbytes: int) -> int:
    """Round up to whole 128-byte lines."""
    return -(-nbytes // 128) * 128


def barrier(group: Group, name: str, timeout_s: float) -> bool:
    """Wait for all ranks to arrive at `name`, used once. False when one did not, or the store is gone."""
    key, deadline = f"fd_fusion/{group.name}/barrier/{name}", time.monotonic() + timeout_s
    try:
        arrived = group.store.add(key, 1)
        while arrived < group.size:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
            arrived = group.store.add(key, 0)
    except Exception:  # each store has its own errors; after any of them no rank can be waited for through this store
        return False
    return True


def as_refusal(action: Callable[[], Any], code: str = "open_failed") -> tuple[Any, Reason | None]:
    """Run a local step whose failure must be voted on, not raised: (result, None) or (None, reason of this code)."""
    try:
        return action(), None
    except FusionError as error:
        return None, error.reason
    except Exception as error:  # recorded: it becomes this rank's refusal, and every rank raises it
        return None, because(code, error=f"{type(error).__name__}: {error}")


def agree_or_raise(group: Group, topic: str, refusal: Reason | None, data: Any, timeout_s: float) -> tuple[Any, ...]:
    """Hold one vote of the opening: return the data of all ranks, or raise the same FusionError on all."""
    verdict = agree(group, topic, Vote(refusal, data), timeout_s=timeout_s)
    if not verdict.ok:
        raise FusionError(verdict.reason)
    return verdict.data


def on_all_ranks(
    group: Group, topic: str, step: Callable[[], Any], timeout_s: float, *, undo: Callable[[], Any] = lambda: None
) -> Any:
    """Collective: run a local step on every rank. Returns its result; or calls `undo`, and raises, on all alike."""
    result, refusal = as_refusal(step)
    try:
        agree_or_raise(group, topic, refusal, None, timeout_s)
    except FusionError:
        undo()
        raise
    return result


def _unreachable(ranks: tuple[dict[str, Any], ...], group: Group) -> Reason | None:
    """Return why these processes cannot share memory, from the same facts on every rank, or None."""
    for rank, one in enumerate(ranks):
        if one["boot"] != ranks[0]["boot"]:
            return because("other_machine", first=0, second=rank)
        if one.get("mig"):
            return because("mig", rank=rank)
        if one["nbytes"] != ranks[0]["nbytes"]:
            return because("structure_differs", rank=rank, detail=f"{one['nbytes']} bytes of workspace")
        for other in range(rank):
            if one["pid"] == ranks[other]["pid"]:  # to the driver a process is its pid
                return because("same_pid", first=other, second=rank, pid=one["pid"])
    return None


def _allocate(memory: SymmetricMemory, timeout_s: float) -> list[bytes]:
    """Allocate and clear the own buffer, gather the handles of all ranks."""
    group, provider = memory.group, memory.provider

    def allocate() -> str:
        memory._mapped[group.rank], handle = provider.allocate(memory.nbytes)
        provider.fill(memory._mapped[group.rank], memory.nbytes)
        provider.synchronize()
        return handle.hex()

    handle, refusal = as_refusal(allocate)
    handles = [bytes.fromhex(one) for one in agree_or_raise(group, "handle", refusal, handle, timeout_s)]
    assert all(len(handle) == provider.handle_bytes for handle in handles)
    return handles


def _map(memory: SymmetricMemory, handles: list[bytes], timeout_s: float) -> None:
    group = memory.group

    def map_peers() -> None:
        for rank, handle in enumerate(handles):
            if rank != group.rank:
                memory._mapped[rank] = memory.provider.open(handle, memory.nbytes)
        memory.addresses = tuple(memory._mapped[rank] for rank in range(group.size))

    _, refusal = as_refusal(map_peers, "no_peer_access")
    agree_or_raise(group, "mapped", refusal, None, timeout_s)
    memory.provider.opened_everywhere()


def _prove(memory: SymmetricMemory, push: Push, timeout_s: float) -> None:
    """Store this rank's word into every buffer at [rank], then find the words of all ranks in its own."""
    group, provider = memory.group, memory.provider
    base = int(memory.nonce, 16) >> 8

    def store() -> None:
        push(tuple(address + _PROOF_BYTES * group.rank for address in memory.addresses), base + group.rank)
        provider.synchronize()

    on_all_ranks(group, "pushed", store, timeout_s)

    def verify() -> None:
        found = provider.read(memory.own, _PROOF_BYTES * group.size)
        for rank in range(group.size):
            expected = 2 * (base + rank).to_bytes(8, "little")
            if found[_PROOF_BYTES * rank : _PROOF_BYTES * (rank + 1)] != expected:
                raise FusionError(because("probe_failed", rank=rank))
        provider.fill(memory.own, len(found))
        provider.synchronize()

    on_all_ranks(group, "proven", verify, timeout_s)


def _ignoring_errors(step: Callable[..., None], *args: int) -> bool:
    """Run one step of a close; at exit the driver or the context may be gone already."""
    try:
        step(*args)
    except (OSError, RuntimeError, BufferError):
        return False
    return True
