"""The one owner of a reduction: a `Site` is one (producer of a partial sum, norm that reads it) pair.

The producer hands its partial sum over; the norm always finishes it, in one kernel or as all-reduce and then the
stock norm. So there is nothing for the two to agree on, and the fallback is right by construction: it starts from
the partial sum. The only decision at run time is `fuses(T)`, pure and equal on all ranks.

This module knows no framework: tensors are opaque to it, and what it calls is given to it at bind.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from fd_fusion.reasons import HandOverError, Reason, because, closed

Tensor = Any
Finished = tuple[Tensor, Tensor]  # (norm_out, residual_out)
Norm = Callable[[Tensor, Tensor], Finished]

# A traced graph can hold no Python object: there a site goes by its number.
_numbers = itertools.count(1)
by_number: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()


def site_of(number: str) -> Site:
    """The Site of a traced graph. Raises: FusionError: its model was unbound, or is gone."""
    site = by_number.get(number)
    return closed() if site is None else site


@dataclass(frozen=True)
class Rejected:
    """A pair that got no Site: its layers stay the stock layers. `ranks` are those that refused, if any did."""

    name: str
    reason: Reason
    ranks: tuple[int, ...] = ()


class Forwards:
    """Counts the forwards of one model. All its Sites share it, and so tell what an earlier forward left behind."""

    def __init__(self) -> None:
        self.number = 0
        self._then: tuple[int, Callable[[], bool]] = (0, bool)

    def start(self, *_: Any) -> None:
        """At the start of each eager forward: the hook of the model. What is pending from before is dropped."""
        self.number += 1
        if self.number == self._then[0] and not self._then[1]():
            self._then = self.number + 1, self._then[1]

    def at_second(self, action: Callable[[], bool]) -> None:
        """Run `action` when the second forward from now starts, and at each later start until it returns True."""
        self._then = self.number + 2, action


class Site:
    """One pair. Both layers hold the same object, as a plain attribute.

    Args:
        name: the pair, "layers.3.self_attn.o_proj -> layers.3.post_attention_layernorm".
        fused: (partial, residual or None) -> (norm_out, residual_out), one kernel.
        reduce: partial -> its sum over the group: the host's own all-reduce.
        norm: (sum, residual or None) -> (norm_out, residual_out): the host's own norm.
        limit: the most rows that are fused; None means any number.
        user: who runs now, for example (thread, stream); two users at once are an error.
        forwards: of the model, shared by its Sites; without it a forward that raised costs the next one an error.
    """

    def __init__(
        self,
        name: str,
        *,
        fused: Norm,
        reduce: Callable[[Tensor], Tensor],
        norm: Norm,
        limit: int | None,
        user: Callable[[], Hashable] = threading.get_ident,
        forwards: Forwards | None = None,
    ):
        self.name = name
        self.limit = limit
        self.number = str(next(_numbers))  # text, since SOT makes a tensor of an int that varies
        by_number[self.number] = self
        self.calls: Counter[str] = Counter()  # by "fused", or the code of the reason why not
        self.checked = True  # off where a tracer may take a hand-over and its finish apart
        self.refuses_gradients = True  # off where the host only infers, whether it records gradients or not
        self.handed = 0  # partial sums handed over since the proving pass began
        self._fused, self._reduce, self._norm, self._user = fused, reduce, norm, user
        self._proven = False
        self._prove: Callable[[Site, Tensor, Tensor, Norm], Finished] | None = None
        self._forwards = forwards or Forwards()
        self._pending: tuple[Tensor, Hashable, int] | None = None  # the tensor, its user, the number of the forward

    @property
    def proven(self) -> bool:
        """Whether the proving pass has switched this site on."""
        return self._proven

    def fuses(self, rows: int) -> bool:
        """Whether a call of so many rows runs as one kernel. Pure: from `rows` and numbers frozen at bind."""
        return self._proven and rows > 0 and (self.limit is None or rows <= self.limit)

    def why_not(self, rows: int) -> Reason:
        """Why `fuses(rows)` is false."""
        if rows <= 0:
            return because("no_rows")
        if not self._proven:
            return because("not_proven")
        return because("too_many_rows", rows=rows, limit=self.limit)

    def hand_over(self, partial: Tensor) -> Tensor:
        """The producer's end: give the partial sum away unreduced. Returns it, the very same object.

        One that a forward left behind when it raised is dropped.
        Raises: HandOverError: one of this forward is still unfinished. A second try after the error starts afresh.
        """
        if not self.checked or not _rows(partial):  # a host may skip its norm where there are no rows
            return partial
        user, forward = self._user(), self._forwards.number
        if self._pending is not None and self._pending[2] == forward:
            first = self._pending[1]
            if first != user:
                raise HandOverError(because("two_users", site=self.name, first=str(first), second=str(user)))
            self._pending = None
            raise HandOverError(because("double_hand_over", site=self.name))
        self._pending = (partial, user, forward)
        self.handed += 1
        return partial

    def finish(self, partial: Tensor, residual: Tensor | None, norm: Norm | None = None) -> Finished:
        """The norm's end, eager: check that this is what was handed over, then `complete` it.

        Raises: HandOverError: nothing, or another tensor, was handed over, or by another user.
        """
        self._take(partial)
        return self.complete(partial, residual, norm)

    def finish_stock(self, partial: Tensor, residual: Tensor | None, norm: Norm) -> Finished:
        """The norm's end where the host asks for another norm in this call: never fused. Raises as `finish` does."""
        self._take(partial)
        return self.stock(partial, residual, norm)

    def _take(self, partial: Tensor) -> None:
        if not self.checked or not _rows(partial):
            return
        pending, self._pending = self._pending, None
        if pending is None or pending[2] != self._forwards.number:
            raise HandOverError(because("nothing_handed_over", site=self.name))
        if pending[1] != self._user():  # before the tensor, which is another one if two forwards run at once
            first, second = str(pending[1]), str(self._user())
            raise HandOverError(because("two_users", site=self.name, first=first, second=second))
        if pending[0] is not partial:
            raise HandOverError(because("other_tensor", site=self.name))

    def complete(self, partial: Tensor, residual: Tensor | None, norm: Norm | None = None) -> Finished:
        """Finish a partial sum [..., H] of T rows: one kernel if `fuses(T)`, else all-reduce and the stock norm.

        A failure inside the fused call is raised, never retried: the other ranks are already waiting.
        """
        rows = _rows(partial)
        if self.fuses(rows):
            self.calls["fused"] += 1
            return self._fused(partial, residual)
        self.calls[self.why_not(rows).code] += 1
        if self._prove is not None and rows:
            return self._prove(self, partial, residual, norm or self._norm)
        return self.stock(partial, residual, norm or self._norm)

    def stock(self, partial: Tensor, residual: Tensor | None, norm: Norm) -> Finished:
        """All-reduce, then the host's norm: what the host does without us, bit for bit."""
        return norm(self._reduce(partial) if _rows(partial) else partial, residual)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None in a copy of a layer: what a Site calls belongs to the layers that it was made for."""
        return type(None), ()

    def start_proof(self, prove: Callable[[Site, Tensor, Tensor, Norm], Finished]) -> None:
        """Until `end_proof`, nothing is fused and every finish goes through `prove`."""
        self._proven, self._prove, self._pending, self.handed = False, prove, None, 0

    def end_proof(self, proven: bool) -> None:
        self._proven, self._prove, self._pending = proven, None, None

    def close(self) -> None:
        """Every later use raises `closed`, from a layer that was kept or a graph that was traced."""
        self._proven, self._prove, self._pending = False, None, None
        self._fused = self._reduce = self._norm = closed
        for entry in ("hand_over", "finish", "finish_stock", "complete", "stock", "fused"):
            setattr(self, entry, closed)

    def fused(self, partial: Tensor, residual: Tensor | None) -> Finished:
        """The fused call by itself, for the proving pass."""
        return self._fused(partial, residual)


def _rows(tensor: Tensor) -> int:
    """T of [..., H]."""
    return math.prod(tensor.shape[:-1])
