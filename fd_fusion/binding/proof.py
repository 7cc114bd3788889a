"""The proving pass: structure does not prove data flow, and a name does not prove a kernel.

It shows two things apart. *Data flow*: nothing is fused in it, every finish is the host's own reduce and norm of what
was handed over, and the handed-over tensor itself is filled with NaN; so the model's outputs are the stock forward's,
bit for bit, unless something but the two ends reads or changes a partial sum. *Kernel*: at each Site the fused call
is judged on some rows of the real sums and on numbers with a known answer (`evidence`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from fd_fusion import exact
from fd_fusion.binding import evidence
from fd_fusion.binding.evidence import BARE, WITH, Contract
from fd_fusion.binding.outputs import digest
from fd_fusion.frameworks.tensors import dtype_name, numbers
from fd_fusion.reasons import Reason, because
from fd_fusion.site import Site

_ROWS = 4  # rows of a call that the kernel is tried on: the first, the last, and two between


class Proof:
    """The record of one forward pass over the Sites of a model, on this rank; `site.Prover` has its contract.

    Args: sites: each with its contract, a function that gives its weight, and this rank's number in its group.
    """

    def __init__(self, sites: Sequence[tuple[Site, Contract, Callable[[], Any], int]]):
        self._of = {site.name: (contract, weight, rank) for site, contract, weight, rank in sites}
        self.sites = [site for site, *_ in sites]
        self.finished: Counter[str] = Counter()
        self.without_rows: set[str] = set()
        self.handed_over: dict[str, str] = {}  # hashes of what was handed over
        self.alike: set[str] = set()  # sites at which every rank handed over the same words
        self.words: dict[str, dict[str, Any]] = {}
        self.nans: dict[str, int] = {}  # rows of what each norm gave that hold NaN
        self.links: dict[str, Site] = {}  # by a Site whose residual may stay with its owners: the Site that reads it
        self.failure: Reason | None = None
        self._left: tuple[Site, Any] | None = None  # the last Site, and the residual that it gave

    def keep(self, site: Site, partial: Any) -> Any:
        """Return a copy to finish, and fill the tensor itself with NaN, for whoever reads it."""
        if 0 in partial.shape:
            self.without_rows.add(site.name)
            return partial
        self.handed_over[site.name] = digest(partial)
        kept = partial.clone()
        with paddle.no_grad():
            paddle.assign(paddle.full_like(partial, float("nan")), output=partial)
        return kept

    def take(self, site: Site, partial: Any, kept: Any) -> Any:
        if kept is None:  # another tensor, the model's own input perhaps: a host's all-reduce works in place
            return partial.clone()
        if not bool(paddle.isnan(partial).all()):  # not every op that writes in place counts a version
            self.miss(because("overwritten", site=site.name))
        return kept

    def miss(self, reason: Reason) -> None:
        self.failure = self.failure or reason

    def prove(self, site: Site, partial: Any, residual: Any) -> Any:
        """Return the host's own result in place of a finish, and try the kernel on some rows."""
        self.finished[site.name] += 1
        if self._left is not None and residual is self._left[1] and site.may_follow(self._left[0]):
            self.links[self._left[0].name] = site
        tried = self.finished[site.name] == 1  # a second one is a miss, whatever the kernel gives
        few = _some_rows(partial, site.limit), None if residual is None else _some_rows(residual, site.limit)
        try:
            stock = site.stock.norm(self._total(site, partial), residual)
        finally:
            if tried:
                self._try(site, *few)
        self._left = site, stock[1]
        self.nans[site.name] = rows_of_nan(stock[0])
        return stock

    def _total(self, site: Site, partial: Any) -> Any:
        """Return the host's own sum. Where the host reduces the parts of a block one by one, and the pair their sum
        once, they differ by roundings: then the host's goes on, so that all behind it are the same bits.
        """
        contract, whole = self._of[site.name][0], site.whole
        if whole is None:
            return site.total(partial)
        own = numbers(partial)
        total, site.whole = numbers(site.total(partial)), None
        if not exact.regrouped(total, numbers(whole), own, contract.size, contract.dtype):
            self.miss(because("sum_differs", site=site.name))
        return whole

    def _try(self, site: Site, partial: Any, residual: Any) -> None:
        """Launch the kernel and the host's all-reduce, then judge: other ranks wait for this one in every launch."""
        contract, weight, rank = self._of[site.name]
        calls = _Calls()
        fused = calls.run(site.fused, partial, residual)
        known = [calls.make(lambda of=of: _known(of, contract, partial, site.limit)) for of in (rank, contract.size)]
        probe = calls.run(site.fused, *known)
        host = calls.run(site.run_stock, *known)
        try:
            if calls.error is not None:
                raise calls.error
            real = _numbers(fused)  # of the real sums, judged as far as one rank can; the rest goes into the vote
            own = numbers(partial), None if residual is None else numbers(residual)
            self.words[site.name] = evidence.words_of(*own, real)
            dtypes = {dtype_name(one) for pair in fused.values() for one in pair}
            if dtypes != {contract.dtype}:
                raise TypeError(f"the kernel gave {', '.join(sorted(dtypes))}, not {contract.dtype}")
            reason = evidence.own_refusal(contract, numbers(weight()), real)
            reason = evidence.probe_refusal(contract, _numbers(probe), _numbers(host)) or reason
        except Exception as error:  # recorded, voted on and reported; the pass itself goes on as stock
            reason = because("proof_raised", site=site.name, error=f"{type(error).__name__}: {error}")
        if reason:
            self.miss(reason)

    def own_refusal(self) -> Reason | None:
        """Return why this rank alone refuses, or None."""
        if self.failure:
            return self.failure
        if not any(site.handed for site in self.sites) and self.finished:
            return because("tracing")
        for site in self.sites:
            handed, finished = site.handed, self.finished[site.name]
            if (handed, finished) != (1, 1):
                return because("unmatched", site=site.name, handed=handed, finished=finished)
        return None

    def joint_refusal(self, words: Sequence[Mapping[str, Any]]) -> Reason | None:
        """Return why all ranks of a group together refuse, from the words of its sites, or None."""
        for name in words[0]:
            of_ranks = [of_rank.get(name) for of_rank in words]
            if not all(of_ranks):
                return because("unmatched", site=name, handed=0, finished=0)
            if all(one["partial"] == of_ranks[0]["partial"] for one in of_ranks):
                self.alike.add(name)
            if reason := evidence.joint_refusal(self._of[name][0], of_ranks):
                return reason
        return None


def rows_of_nan(tensor: Any) -> int:
    """Count the rows that hold NaN by their sums: a profile run is no place for a number of each element."""
    return int(paddle.isnan(tensor.sum(-1)).sum())


def vacuous(words: Sequence[Mapping[str, Any]]) -> Reason | None:
    """Return the first site of a group whose sums are zeros on every rank, or not finite, as a reason.

    Of zeros a reduction that is missing, or made twice, would not show; NaN is equal to whatever a fault makes of it.
    """
    for name in words[0]:
        of_ranks = [of_rank[name] for of_rank in words]
        if not np.all([one["finite"] for one in of_ranks], axis=0).any():  # no row that was tried, on every rank
            return because("not_finite", what=name)
        if not any(one["summands"] for one in of_ranks):
            return because("zeros", site=name)
    return None


class _Calls:
    """Run one call after the other, each whatever became of the last one. `error` is the first that was raised."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def make(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # judged when all have run
            self.error = self.error or error
            return None

    def run(self, run: Callable[[Any, Any], Any], partial: Any, residual: Any) -> dict[str, Any]:
        """Run a call with and without the residual, each on copies: a host's all-reduce works in place."""
        forms = {BARE: None} if residual is None else {WITH: residual, BARE: None}
        return {
            form: self.make(lambda rest=rest: run(partial.clone(), None if rest is None else rest.clone()))
            for form, rest in forms.items()
        }


def _known(of: int, contract: Contract, like: Any, limit: int | None) -> Any:
    """Return the numbers with a known answer of a rank; those after the last rank's are the residual."""
    rows = exact.probe_partial(of, contract.size, like.shape[-1], contract.eps, contract.dtype)
    return paddle.to_tensor(rows[:limit], place=like.place).astype(like.dtype)


def _numbers(calls: dict[str, Any]) -> evidence.Outputs:
    return {form: tuple(numbers(one) for one in pair) for form, pair in calls.items()}


def _some_rows(tensor: Any, limit: int | None) -> Any:
    flat = tensor.reshape([-1, tensor.shape[-1]])
    rows = flat.shape[0]
    count = min(_ROWS, rows, rows if limit is None else limit)
    index = np.unique(np.linspace(0, rows - 1, count).astype("int64"))
    return paddle.index_select(flat, paddle.to_tensor(index, place=flat.place), axis=0)
