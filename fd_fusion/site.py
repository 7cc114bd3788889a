"""The one owner of a reduction: a `Site` is one (producer of a partial sum, norm that reads it) pair.

The producer hands its partial sum over; the norm always finishes it, in one kernel or as all-reduce and then the
stock norm. So the two need not agree on anything, and the fallback is right by construction: it starts from the
partial sum. The only decision at run time is `fuses(T)`, pure and equal on all ranks.

This module imports no framework: tensors are opaque, and `bind` gives each Site what it calls, the `spec.FusedOp` of
an open backend and the `Stock` of the host.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sized
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from fd_fusion.reasons import HandOverError, Reason, because, closed

if TYPE_CHECKING:
    from fd_fusion.spec import FusedOp

Tensor = Any
Finished = tuple[Tensor, Tensor]  # (norm_out, residual_out)
Norm = Callable[[Tensor, Tensor | None], Finished]

logger = logging.getLogger("fd_fusion")

# A traced graph can hold no Python object: there a site goes by its number.
_numbers = itertools.count(1)
by_number: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()


def site_of(number: str) -> Site:
    """Return the Site of a traced graph. Raises: FusionError: its model was unbound, or is gone."""
    site = by_number.get(number)
    return closed() if site is None else site


@dataclass(frozen=True)
class Rejected:
    """A pair that got no Site: its layers stay the stock layers. `ranks` are those that refused, if any did."""

    name: str
    reason: Reason
    ranks: tuple[int, ...] = ()


class Stock(Protocol):
    """A host's own way at a pair, so that the fallback is bit-equal to it, and how its layers take a Site.

    `weight()` and `numbers()`, which are eps and weight_offset, are read at each call, as the host reads them.
    """

    norm: Norm  # (sum, residual or None) -> (norm_out, residual_out)

    def reduce(self, partial: Tensor) -> Tensor:
        """All-reduce; it may work in place."""

    def weight(self) -> Tensor: ...
    def numbers(self) -> tuple[float, float]: ...

    def attach(self, site: Site) -> Callable[[], None]:
        """Give both layers the Site. Returns the undo, which restores the instances exactly."""


class Prover(Protocol):
    """The proving pass, for a Site. While it runs a misuse is recorded, not raised."""

    def keep(self, site: Site, partial: Tensor) -> Tensor:
        """Return what the finish gets; `partial` itself may be spoilt after this. It may have no rows."""

    def take(self, site: Site, partial: Tensor, kept: Tensor | None) -> Tensor:
        """Return what to finish in place of the tensor that was handed over; `kept` None: it was not handed over."""

    def prove(self, site: Site, partial: Tensor, residual: Tensor | None) -> Finished: ...
    def miss(self, reason: Reason) -> None: ...


class ForwardCount:
    """The number of forwards of one model: all its Sites share it, and drop what an earlier forward left behind.

    A copy of the model, whose hook it is there too, counts by itself.
    """

    def __init__(self) -> None:
        self.number = 0
        self._whole = 0  # forwards of the whole model
        self._then: tuple[int, Callable[[], bool]] | None = None

    def start(self, *_: Any) -> None:
        """Count a forward at its start, as the hook of the model: what is pending from before counts no more."""
        self.number += 1
        self._whole += 1
        if self._then is not None and self._whole >= self._then[0] and self._then[1]():
            self._then = None

    def start_inside(self, *_: Any) -> None:
        """Count the forward of a layer that holds all pairs, such as a model's decoder, which may be called alone."""
        self.number += 1

    def at_second(self, action: Callable[[], bool]) -> None:
        """Run `action` when the second forward from now starts, and at each later start until it returns True."""
        self._then = self._whole + 2, action

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ForwardCount, ()


class Site:
    """One pair. Both layers hold the same object, as a plain attribute.

    Args:
        name: the pair, "layers.3.self_attn.o_proj -> layers.3.post_attention_layernorm".
        op, stock: the fused way to finish a partial sum, and the host's own.
        caller: () -> who calls now, (thread, stream) for example; two callers at once are an error.
        hooks: the hooks of the layers at both ends that would read a partial sum; empty ones cost nothing.
        forwards: of the model, shared by its Sites; without it a forward that raised costs the next one an error.
    """

    def __init__(
        self,
        name: str,
        op: FusedOp,
        stock: Stock,
        *,
        caller: Callable[[], Hashable] = threading.get_ident,
        hooks: tuple[Sized, ...] = (),
        forwards: ForwardCount | None = None,
    ):
        self.name, self.stock, self._op = name, stock, op
        self.limit = op.limit
        self.number = str(next(_numbers))  # text, since SOT makes a tensor of an int that varies
        by_number[self.number] = self
        self.calls: Counter[str] = Counter()  # by "fused", or the code of the reason why not
        self.fp8_calls: Counter[str] = Counter()  # norms "made" in FP8 by the kernel; "taken" by a layer behind it
        self.takers: int | None = None  # layers that took FP8 in the proving pass; None where nothing counts them
        self.checked = True  # off where a tracer may take a hand-over and its finish apart
        self.refuses_gradients = True  # off where the host only infers, whether it records gradients or not
        self.handed = 0  # partial sums handed over since the proving pass began
        self._stays: tuple[bool, ...] = ()  # (True,) where `leave_residual` was called, for the op
        self._follows = False  # the residual that comes in may be such a one
        self.whole: Tensor | None = None  # in the proving pass, the host's own sum where it adds in another order
        self._caller, self._hooks = caller, hooks
        self.proven = False  # switched on by the proving pass
        self._prover: Prover | None = None
        self._forwards = forwards or ForwardCount()
        # (the tensor, its caller, the number of the forward, its in-place version, what the proving pass finishes)
        self._pending: tuple[Tensor, Hashable, int, int, Tensor] | None = None

    def fuses(self, rows: int) -> bool:
        """Return whether a call of so many rows runs as one kernel. Pure: from `rows` and numbers frozen at bind."""
        return self.proven and rows > 0 and (self.limit is None or rows <= self.limit)

    def why_not(self, rows: int) -> Reason:
        """Return why `fuses(rows)` is false."""
        if rows <= 0:
            return because("no_rows")
        if not self.proven:
            return because("not_proven")
        return because("too_many_rows", rows=rows, limit=self.limit)

    def hand_over(self, partial: Tensor) -> Tensor:
        """Give the partial sum away unreduced, for the producer. Returns the very same tensor.

        One that a forward left behind when it raised is dropped.
        Raises: HandOverError: one of this forward is still unfinished. A second try after the error starts afresh.
        """
        for hooks in self._hooks:
            if hooks:
                self._warn_of_hook()
        if not _rows(partial):  # a host may skip its norm where there are no rows
            if self._prover is not None:
                self._prover.keep(self, partial)
            return partial
        if not self.checked and self._prover is None:
            return partial
        caller, pending, forward = self._caller(), self._pending, self._forwards.number
        if pending is not None and pending[2] == forward:
            if pending[1] != caller:
                self._wrong("two_callers", first=str(pending[1]), second=str(caller))
            self._pending = None
            self._wrong("double_hand_over")
        kept = partial if self._prover is None else self._prover.keep(self, partial)
        self._pending = (partial, caller, forward, getattr(partial, "inplace_version", 0), kept)
        self.handed += 1
        return partial

    def finish(self, partial: Tensor, residual: Tensor | None) -> Finished:
        """Check, for an eager norm, that this is what was handed over, then `complete` it.

        Raises: HandOverError: nothing, or another tensor, was handed over, or by another caller, or it was changed in
            place since.
        """
        return self.complete(self._take(partial), residual)

    def finish_stock(self, partial: Tensor, residual: Tensor | None, norm: Norm) -> Finished:
        """Finish by another norm, which the host asks for in this call: never fused. Raises as `finish` does."""
        return norm(self.total(self._take(partial)), self._gathered(residual))

    def may_follow(self, source: Site) -> bool:
        """Return whether one op serves both, which may leave a residual with the owners of its rows: then both know
        from T alone whether it does."""
        return source._op is self._op and getattr(self._op, "may_stay", False)

    def leave_residual(self, reader: Site) -> None:
        """Leave the residual with the owners of its rows, by two-shot: `reader` alone reads it, as was proven."""
        self._stays, reader._follows = (True,), True
        self.limit = reader.limit = self._op.staying_limit

    def _gathered(self, residual: Tensor | None) -> Tensor | None:
        """Return the whole of a residual that the Site in front may have left with its owners."""
        if residual is None or not (self._follows and self.fuses(_rows(residual))):
            return residual
        flat = residual.reshape([-1, residual.shape[-1]])
        return self._op.whole(flat, self.stock.weight(), *self.stock.numbers()).reshape(residual.shape)

    def _take(self, partial: Tensor) -> Tensor:
        """Return what is to be finished: the tensor itself, once it is known to be what was handed over."""
        if not _rows(partial) or not (self.checked or self._prover is not None):
            return partial
        pending, self._pending = self._pending, None
        if pending is None or pending[2] != self._forwards.number:
            self._wrong("nothing_handed_over")
            return self._prover.take(self, partial, None)
        tensor, first, _, version, kept = pending
        if first != (second := self._caller()):  # before the tensor, which is another one if two forwards run at once
            self._wrong("two_callers", first=str(first), second=str(second))
        elif tensor is not partial:
            self._wrong("other_tensor")
        elif getattr(partial, "inplace_version", 0) != version:
            self._wrong("changed_in_place")
        return partial if self._prover is None else self._prover.take(self, partial, kept)

    def _wrong(self, code: str, **facts: str) -> None:
        """Raise, or in the proving pass record, so that this rank still comes to the votes."""
        reason = because(code, site=self.name, **facts)
        if self._prover is None:
            raise HandOverError(reason)
        self._prover.miss(reason)

    def _warn_of_hook(self) -> None:
        """Log once that a hook reads a partial sum. What the hook changes, the next finish finds."""
        self._hooks = ()
        reason = because("hooked", layer=self.name)
        logger.warning("fd_fusion: %s; %s", reason, reason.remedy)

    def complete(self, partial: Tensor, residual: Tensor | None) -> Finished:
        """Finish a partial sum [..., H] of T rows: one kernel if `fuses(T)`, else all-reduce and the stock norm.

        A failure inside the fused call is raised, never retried: the other ranks are already waiting.
        """
        rows = _rows(partial)
        if self.fuses(rows):
            self.calls["fused"] += 1
            return self.fused(partial, residual)
        self.calls[self.why_not(rows).code] += 1
        if self._prover is not None and rows:
            return self._prover.prove(self, partial, residual)
        return self.run_stock(partial, residual)

    def fused(self, partial: Tensor, residual: Tensor | None) -> Finished:
        """Run the fused call by itself, on [..., H]."""
        shape, stock = partial.shape, self.stock
        if len(shape) == 2:
            return self._op.finish(partial, residual, stock.weight(), *stock.numbers(), *self._stays)
        flat = [-1, shape[-1]]
        residual = None if residual is None else residual.reshape(flat)
        outputs = self._op.finish(partial.reshape(flat), residual, stock.weight(), *stock.numbers(), *self._stays)
        return outputs[0].reshape(shape), outputs[1].reshape(shape)

    def finish_fp8(
        self, partial: Tensor, residual: Tensor | None, form: Any, quantise: Callable[[Tensor, Any], tuple]
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        """Finish [T, H], the norm quantised -> (norm_out or None, codes, scales, residual_out). Raises as `finish`.

        In the kernel where the call is fused and the op has that `Fp8`; else by `quantise`, from the finished norm.
        """
        partial = self._take(partial)
        if not self.quantises(form) or not self.fuses(_rows(partial)):
            norm, residual = self.complete(partial, residual)
            return norm if form.keeps_norm else None, *quantise(norm, form), residual
        self.calls["fused"] += 1
        self.fp8_calls["made"] += 1
        stock = self.stock
        return self._op.finish_fp8(partial, residual, stock.weight(), *stock.numbers(), form, *self._stays)

    def quantises(self, form: Any) -> bool:
        """Return whether the kernel gives that `Fp8`."""
        return form in self._op.fp8

    def count_taken(self) -> None:
        """Count a layer that takes what `finish_fp8` gave in place of its own quantiser."""
        if self._prover is None:
            self.fp8_calls["taken"] += 1
        else:
            self.takers = (self.takers or 0) + 1

    def run_stock(self, partial: Tensor, residual: Tensor | None) -> Finished:
        """All-reduce, then run the host's norm: what the host does without us, bit for bit."""
        return self.stock.norm(self.total(partial), residual)

    def total(self, partial: Tensor) -> Tensor:
        """Run the host's own all-reduce."""
        return self.stock.reduce(partial) if _rows(partial) else partial

    @property
    def proving(self) -> bool:
        return self._prover is not None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Give None to a copy of a layer: what a Site calls belongs to the layers that it was made for."""
        return type(None), ()

    def start_proof(self, prover: Prover) -> None:
        """Fuse nothing until `end_proof`: every finish goes through `prover`, which records a misuse."""
        self.proven, self._prover, self._pending, self.handed = False, prover, None, 0
        self._stays, self._follows, self.limit = (), False, self._op.limit

    def end_proof(self, proven: bool) -> None:
        self.proven, self._prover, self._pending, self.whole = proven, None, None, None

    def holds(self, tensor: Any) -> bool:
        """Return whether this very tensor is handed over and not finished."""
        return self._pending is not None and self._pending[0] is tensor

    def close(self) -> None:
        """Make every later use raise `closed`, from a layer that was kept or a graph that was traced."""
        self.end_proof(False)
        self._op = self.stock = _CLOSED  # whoever kept a method comes to one of these
        self._caller = self._wrong = closed
        entries = "hand_over", "finish", "finish_stock", "finish_fp8", "complete", "fused", "run_stock", "total"
        for entry in entries:
            setattr(self, entry, closed)


# In the place of an op and of the host's own way.
_CLOSED = SimpleNamespace(**dict.fromkeys(("finish", "reduce", "norm", "weight", "numbers"), closed))


def _rows(tensor: Tensor) -> int:
    """Return T of [..., H]."""
    shape = tensor.shape
    return shape[0] if len(shape) == 2 else math.prod(shape[:-1])
