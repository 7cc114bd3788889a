"""The proving pass: structure does not prove data flow, so the first forward after bind does.

While it runs nothing is fused: every finish gives the stock result, and beside it the fused one is computed on a copy
of the first rows and compared. What is found is voted on, so all ranks come to the same end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fd_fusion.backends.paddle import dtype_name
from fd_fusion.reasons import Reason, because
from fd_fusion.reference import UNIT_ROUNDOFF
from fd_fusion.site import Site

_ROWS = 64  # rows of a call that are compared
_SAMPLE = 16  # values of a row that tell one tensor from another


class Proof:
    """What one forward pass showed of the sites of a model, on this rank."""

    def __init__(self, sites: Sequence[Site], sizes: dict[str, int]):
        self.sites, self._sizes = sites, sizes  # ranks of each site's group, by name
        self._forget()

    def _forget(self) -> None:
        """Start afresh: a forward that raised may be followed by another."""
        self.finished: Counter[str] = Counter()
        self.samples: dict[str, dict[str, Any]] = {}
        self.failure: Reason | None = None

    def start(self) -> None:
        self._forget()
        for site in self.sites:
            site.start_proof(self.prove)

    def prove(self, site: Site, partial, residual, norm):
        """In place of a finish: the stock result, compared with the fused one on the first rows."""
        self.finished[site.name] += 1
        shape = (-1, partial.shape[-1])
        rows = min(_ROWS if site.limit is None else min(_ROWS, site.limit), int(np.prod(partial.shape[:-1])))
        few = partial.reshape(shape)[:rows].clone()  # the stock all-reduce may work in place
        few_residual = None if residual is None else residual.reshape(shape)[:rows].clone()
        stock = norm_out, residual_out = site.stock(partial, residual, norm)
        self.samples[site.name] = {"partial": _sample(few), "residual": _sample(few_residual)}
        try:
            fused = site.fused(few, few_residual)
        except Exception as error:  # recorded, voted on and reported; the pass itself goes on as stock
            self._fail(because("proof_raised", site=site.name, error=f"{type(error).__name__}: {error}"))
            return stock
        scale = self._sizes[site.name] * _norms(few)
        if few_residual is not None:
            scale = scale + _norms(few_residual)
        for name, got, want in (("residual_out", fused[1], residual_out), ("norm_out", fused[0], norm_out)):
            self._compare(site, name, got, want.reshape(shape)[:rows], scale, residual_out.reshape(shape)[:rows])
        return stock

    def _compare(self, site: Site, output: str, got, want, scale: np.ndarray, total) -> None:
        """Row by row: ||fused - stock|| against the roundings that either may make.

        Each of the N + 2 roundings is relative to the terms of the sum, whose size over that of the sum itself is
        the cancellation; four times that, since both sides round.
        """
        dtype = dtype_name(got)
        cancellation = 1.0 + scale / np.maximum(_norms(total), np.finfo(np.float32).tiny)
        allowed = 4 * (self._sizes[site.name] + 2) * UNIT_ROUNDOFF[dtype] * cancellation
        error = relative_errors(as_numpy(got), as_numpy(want))
        if got.dtype != want.dtype or not (error <= allowed).all():
            worst = int(np.argmax(np.nan_to_num(error - allowed, nan=np.inf)))
            facts = {"error": f"{error[worst]:.2e}", "budget": f"{allowed[worst]:.2e}"}
            self._fail(because("proof_failed", site=site.name, output=output, **facts))

    def _fail(self, reason: Reason) -> None:
        self.failure = self.failure or reason

    def own_refusal(self) -> Reason | None:
        """What this rank alone can see."""
        if not any(site.handed for site in self.sites) and self.finished:
            return because("tracing")
        for site in self.sites:
            handed, finished = site.handed, self.finished[site.name]
            if handed != 1 or finished != 1:
                return because("unmatched", site=site.name, handed=handed, finished=finished)
        return self.failure


def joint_refusal(dtypes: Mapping[str, str], samples: Sequence[dict[str, Any]]) -> Reason | None:
    """What only all ranks together can see, from the samples of each, in rank order: the same answer on all.

    `dtypes` gives the dtype of each site by its name.
    """
    for name, dtype in dtypes.items():
        of_ranks = [sample[name] for sample in samples]
        partials = [sample["partial"] for sample in of_ranks]
        if any(partials[0]) and all(partial == partials[0] for partial in partials):
            return because("already_reduced", site=name)
        residuals = [np.array(sample["residual"] or [0.0]) for sample in of_ranks]
        errors = [relative_errors(other[None], residuals[0][None])[0] for other in residuals[1:]]
        if not all(error <= 64 * UNIT_ROUNDOFF[dtype] for error in errors):
            return because("residual_differs", site=name)
    return None


def outputs_refusal(got: Sequence[Any], want: Sequence[Any], sites: int) -> Reason | None:
    """Whether the model's outputs, auxiliary ones too, are those of the stock model.

    Roundings of different sites are independent, so they add up as their square root. Measured on the demo's decoder
    (6 layers, 4 ranks, float32): 3 to 4.4 times that. Sixteen times is allowed, and never more than a third: a leaked
    partial sum of N ranks misses sqrt((N - 1) / N) of the whole, 0.7 and more.
    """
    if len(got) != len(want):
        return because("outputs_differ", output="count", error=str(len(got)), budget=str(len(want)))
    for i, (ours, stock) in enumerate(zip(got, want)):
        if dtype_name(ours) not in UNIT_ROUNDOFF:
            continue  # token numbers and the like
        allowed = min(16 * UNIT_ROUNDOFF[dtype_name(ours)] * (sites + 1) ** 0.5, 1 / 3)
        flat = as_numpy(ours), as_numpy(stock)
        same_shape = flat[0].shape == flat[1].shape
        error = relative_errors(flat[0].reshape(1, -1), flat[1].reshape(1, -1))[0] if same_shape else np.inf
        if not error <= allowed:
            return because("outputs_differ", output=i, error=f"{error:.2e}", budget=f"{allowed:.2e}")
    return None


def as_numpy(tensor) -> np.ndarray:
    return tensor.astype("float32").numpy().astype(np.float64)


def relative_errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """||got - want|| / ||want|| of each row, over finite values; inf where the others are not the same."""
    finite = np.isfinite(want)
    odd = ~((finite == np.isfinite(got)) & (finite | (np.isnan(got) == np.isnan(want)))).all(axis=-1)
    with np.errstate(invalid="ignore"):
        difference = np.where(finite & np.isfinite(got), got - want, 0.0)
    size = np.linalg.norm(np.where(finite, want, 0.0), axis=-1)
    error = np.linalg.norm(difference, axis=-1)
    return np.where(odd, np.inf, np.where(error == 0, 0.0, error / np.maximum(size, np.finfo(np.float32).tiny)))


def _norms(x) -> np.ndarray:
    wide = as_numpy(x)
    return np.linalg.norm(np.where(np.isfinite(wide), wide, 0.0), axis=-1)


def _sample(x) -> list[float] | None:
    if x is None:
        return None
    row = as_numpy(x[0])
    return np.nan_to_num(row[:: max(1, len(row) // _SAMPLE)][:_SAMPLE]).tolist()
