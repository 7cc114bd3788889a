"""The forwards that prove a model: stock, proving, and stock again where the two gave other bits."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import paddle

from fd_fusion.binding.ballot import Ballot
from fd_fusion.binding.outputs import (
    NOT_COMPARED,
    Trace,
    first_difference,
    nothing_shown,
    tensors_of,
    within_spread,
)
from fd_fusion.binding.pairs import Pair
from fd_fusion.binding.proof import Proof
from fd_fusion.binding.qk_norms import QKNorm
from fd_fusion.binding.staying_proof import StayingProof
from fd_fusion.reasons import FusionError, Reason, because
from fd_fusion.site import Site

ExampleOf = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Callable[[], Any]]
STOCK, PROVING, AGAIN, STAYING = "stock", "proving", "second stock", "staying"


class Forwards:
    """Run a model's forwards on this rank, and compare what they gave: each as a ballot, for a vote.

    Args: layers: all layers of the model by their paths, to find hooks.
    """

    def __init__(
        self, pairs: Sequence[tuple[Pair, Site]], proof: Proof, example: Callable[[], Any], layers: dict[str, Any]
    ):
        self._pairs, self._proof, self._example, self._layers = pairs, proof, example, layers
        self._outputs: dict[str, list[Any]] = {}
        self._compared = True
        self._traces: dict[str, Trace] = {}
        self._spoilt: set[str] = set()  # buffers that held NaN before the staying forward
        self.raised: Exception | None = None  # what the last forward raised
        self._reason: Reason | None = None  # the same as a reason
        self.spread: Reason | None = None  # why outputs were not compared bit by bit

    def stock(self) -> Ballot:
        return self._ballot(STOCK, self._run(STOCK), Ballot)

    def proving(self, qk_norms: Sequence[QKNorm]) -> Ballot:
        """Run the forward with the Sites attached, in which nothing is fused: its outputs must be the stock ones."""
        return self._ballot(PROVING, self._run_attached(PROVING, self._proof, qk_norms), self._compare)

    def again(self) -> Ballot:
        """Run a second stock forward, where the outputs differed: does stock repeat its own bits?"""
        return self._ballot(AGAIN, self._run(AGAIN), self._judge_spread)

    def staying(self, qk_norms: Sequence[QKNorm]) -> Ballot:
        """Run the forward that proves that a residual may stay with the owners of its rows."""
        proof, takers = StayingProof(self._proof), [(site, site.takers) for _, site in self._pairs]
        raised = self._run_attached(STAYING, proof, qk_norms)
        for site, count in takers:  # a forward that raised may have left a norm before its layers
            site.takers = count
        refusal = raised and because("residual_read", why=str(raised))
        ballot = self._ballot(STAYING, refusal, lambda: Ballot(self._who_reads(proof)))
        ballot.links = list(self._proof.links)
        return ballot

    def _run(self, which: str) -> Reason | None:
        """Run one forward. Returns what it raised as a reason, for the vote: the ranks stay in step."""
        self._traces[which] = trace = Trace({pair.name: pair.reader for pair, _ in self._pairs})
        self.raised = self._reason = None
        try:
            self._spoilt = self._buffers_of_nan() if which == STAYING else set()
            with trace.watching(), paddle.no_grad():  # it is not differentiated, and a Site refuses gradients
                outputs = self._example()
                self._compared = outputs is not NOT_COMPARED
                self._outputs[which] = tensors_of(outputs) if self._compared else []
        except Exception as error:
            reason = because("forward_raised", which=which, error=f"{type(error).__name__}: {error}")
            self.raised, self._reason = error, error.reason if isinstance(error, FusionError) else reason
        return self._reason

    def _run_attached(self, which: str, proof: Proof, qk_norms: Sequence[QKNorm]) -> Reason | None:
        with contextlib.ExitStack() as undo:
            for pair, site in self._pairs:
                undo.callback(pair.stock.attach(site))
                site.start_proof(proof)
                undo.callback(site.end_proof, False)
            for norm in qk_norms:
                undo.callback(norm.attach(_in_place(norm.stock)))
            undo.enter_context(self._recording_hooks(proof if isinstance(proof, StayingProof) else None))
            return self._run(which)

    def _ballot(self, which: str, refusal: Reason | None, judge: Callable[[], Ballot]) -> Ballot:
        """Judge a forward that raised nothing. An error in that is a refusal too: the others wait for this rank."""
        try:
            ballot = judge() if refusal is None else Ballot(refusal)
        except Exception as error:
            ballot = Ballot(because("not_compared", error=f"{type(error).__name__}: {error}"))
        ballot.which, ballot.raised, ballot.reached = which, self._reason, list(self._traces[which].norms)
        return ballot

    def _compare(self) -> Ballot:
        stock, proof = self._outputs[STOCK], self._proof
        empty = bool(stock) and all(0 in tensor.shape for tensor in stock)
        if not proof.finished and (empty or proof.without_rows):  # as that of an idle data-parallel rank
            return Ballot(again=because("no_rows_yet"))
        reason = proof.own_refusal()
        differs = first_difference(self._outputs[PROVING], stock) is not None
        if reason is not None or differs:
            return Ballot(reason, differs=reason is None)
        again = nothing_shown(stock) if self._compared else None
        return Ballot(again=again, linked=self._compared and bool(proof.links))

    def _who_reads(self, staying: StayingProof) -> Reason | None:
        """Return why a residual that stays with its owners would be read elsewhere, or None."""
        staying.miss_kept()
        if (reason := staying.own_refusal()) is not None:
            return reason if reason.code == "residual_read" else because("residual_read", why=str(reason))
        if first_difference(self._outputs[STAYING], self._outputs[STOCK]) is not None:
            part = self._traces[STOCK].parts_at(self._traces[STAYING])
            return because("residual_read", why="the model's output" if part is None else f"what feeds {part}")
        written = sorted(self._buffers_of_nan() - self._spoilt)
        return because("residual_read", why=f"the model's buffer {written[0]}") if written else None

    def _buffers_of_nan(self) -> set[str]:
        """Return the paths of buffers that hold NaN, by their sums: one may be a large cache, or be given back."""
        return {
            f"{path}.{name}".lstrip(".")
            for path, layer in self._layers.items()
            for name, buffer in layer._buffers.items()
            if buffer is not None and buffer._is_initialized() and buffer.is_floating_point()
            if bool(paddle.isnan(buffer.sum()))
        }

    def _judge_spread(self) -> Ballot:
        got, want, again = (self._outputs[which] for which in (PROVING, STOCK, AGAIN))
        if [list(one.shape) for one in again] != [list(one.shape) for one in want]:
            return Ballot(because("shapes_differ"))
        repeats = first_difference(again, want) is None
        self.spread = None if repeats else because("stock_differs")
        output = first_difference(got, want) if repeats else within_spread(got, want, again)
        return Ballot(None if output is None else self._name(output))

    def _name(self, output: int | str) -> Reason:
        stock = self._traces[STOCK]
        for name, (norm_input, _) in stock.norms.items():
            if name in self._proof.alike and norm_input == self._proof.handed_over.get(name):
                return because("already_reduced", site=name)
        return because("outputs_differ", output=output, site=stock.parts_at(self._traces[PROVING]) or "none")

    @contextlib.contextmanager
    def _recording_hooks(self, staying: StayingProof | None) -> Iterator[None]:
        """Record the hooks that get what they must not read, though no output shows it: a producer's very output,
        which is a partial sum, or a residual that is to stay."""

        def record(path: str, values: Sequence[Any]) -> None:
            if staying is not None:
                staying.miss_hook(path, values)
            elif any(site.holds(first) for first in values[:1] for _, site in self._pairs):
                self._proof.miss(because("hooked", layer=path))

        def after(_: Any, inputs: Any, outputs: Any, path: str) -> None:
            record(path, [*(outputs if isinstance(outputs, list | tuple) else [outputs]), *inputs])

        hooks = []
        for path, layer in self._layers.items():
            if getattr(layer, "_forward_post_hooks", None):
                hooks.append(layer.register_forward_post_hook(functools.partial(after, path=path)))
            if staying is not None and getattr(layer, "_forward_pre_hooks", None):
                hooks.append(layer.register_forward_pre_hook(lambda _, inputs, path=path: record(path, inputs)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def on_copies(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that runs `forward` on copies of its arguments, so that a cache, say, changes once."""

    last: list[Any] = []  # a list among them may keep a residual, which is looked for after the forward

    def example() -> Any:
        last.clear()
        try:
            own_args, own_kwargs = copy.deepcopy((args, kwargs))
        except Exception as error:  # each type has its own; raised as a reason
            text = f"{type(error).__name__}: {error}"
            raise FusionError(because("inputs_not_copied", error=text)) from error
        last.extend((own_args, own_kwargs))
        return forward(*own_args, **own_kwargs)

    return example


def _in_place(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the stock norm of q and k as a kernel that works in place: it takes part in what the pass shows."""

    def run(qkv: Any) -> Any:
        return paddle.assign(stock(qkv.clone()), output=qkv)

    return run
