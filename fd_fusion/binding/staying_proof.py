"""The forward that proves that two-shot may leave a residual with the owners of its rows."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import paddle

from fd_fusion.binding.proof import Proof, rows_of_nan
from fd_fusion.reasons import because
from fd_fusion.site import Site


class StayingProof(Proof):
    """The record of one more forward: nothing is fused, and the residual of each linked Site holds NaN. The Site that
    reads it goes on from the whole one; whoever else reads it has NaN, on every rank and in whichever row: also in
    the rows that this rank owns, which with another T another rank may own, and so that no rank goes its own way."""

    def __init__(self, proof: Proof):
        super().__init__([(site, *proof._of[site.name]) for site in proof.sites])
        self.links, self._nans_before = proof.links, proof.nans
        self._whole: Any = None
        self._given: list[weakref.ref] = []  # all residuals of NaN

    def prove(self, site: Site, partial: Any, residual: Any) -> Any:
        self.finished[site.name] += 1
        if self._left is not None and residual is self._left[1]:
            residual = self._whole
        norm_out, self._whole = site.stock.norm(self._total(site, partial), residual)
        if rows_of_nan(norm_out) > self._nans_before[site.name]:
            self.miss(because("residual_read", why=f"what feeds {site.name}"))
        if site.name not in self.links:
            return norm_out, self._whole
        self._left = site, paddle.full_like(self._whole, float("nan"))
        self._given.append(weakref.ref(self._left[1]))
        return norm_out, self._left[1]

    def miss_hook(self, path: str, tensors: Sequence[Any]) -> None:
        """Record that a hook of the layer at `path` got these."""
        if any(ref() is tensor for ref in self._given for tensor in tensors if tensor is not None):
            self.miss(because("residual_read", why=f"a hook of {path}"))

    def miss_kept(self) -> None:
        """Record, after the forward, that the model or a hook of it keeps a residual."""
        self._left = None
        gc.collect()
        if any(ref() is not None for ref in self._given):
            self.miss(because("residual_read", why="the model keeps one after its forward"))
