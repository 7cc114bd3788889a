"""What a Site's kernel is judged by in the proving pass: pure functions of NumPy arrays, of one rank or of all.

No result is compared with the host's own sum of real numbers: it is compared with the ranks' real partial sums, by a
sample of their words that goes through the vote. The host's sum and norm are compared on exact numbers alone.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_fusion import exact
from fd_fusion.reasons import Reason, because
from fd_fusion.reference import UNIT_ROUNDOFF, round_to

_COLUMNS = 16  # of a row that go through the vote: the first and last two, and others by a fixed seed
WITH, BARE = "", " without a residual"
Outputs = dict[str, tuple[np.ndarray, np.ndarray]]  # by WITH or BARE: (norm_out, residual_out) [T, H], in float32


@dataclass(frozen=True)
class Contract:
    """What the kernel of a Site promises. `in_rank_order`: the exact bits of the sum in rank order."""

    site: str
    size: int
    dtype: str
    eps: float
    weight_offset: float
    in_rank_order: bool


def columns_of(hidden: int) -> np.ndarray:
    """Return the columns of a row whose words go through the vote."""
    if hidden <= _COLUMNS:
        return np.arange(hidden)
    inner = np.random.default_rng(hidden).choice(np.arange(2, hidden - 2), _COLUMNS - 4, replace=False)
    return np.sort(np.concatenate([[0, 1, hidden - 2, hidden - 1], inner]))


def words_of(partial: np.ndarray, residual: np.ndarray | None, fused: Outputs) -> dict[str, Any]:
    """Return this rank's words for the vote, as text of float32, which holds every dtype."""
    columns = columns_of(partial.shape[-1])
    arrays = {"partial": partial, "residual": residual, **{f"out{form}": out for form, (_, out) in fused.items()}}
    words = {name: _pack(array[:, columns]) for name, array in arrays.items() if array is not None}
    return {**words, "summands": bool((partial != 0).any()), "finite": np.isfinite(partial).all(axis=-1).tolist()}


def own_refusal(contract: Contract, weight: np.ndarray, fused: Outputs) -> Reason | None:
    """Check on one rank that each norm_out is the norm of the very sum beside it. Returns the reason, or None."""
    numbers = {"eps": contract.eps, "weight_offset": contract.weight_offset, "dtype": contract.dtype, "rounded": True}
    for form, (norm_out, residual_out) in fused.items():
        reason = _too_far(contract, f"norm_out{form}", exact.norm_excess(norm_out, residual_out, weight, **numbers))
        if reason:
            return reason
    return None


def joint_refusal(contract: Contract, ranks: Sequence[dict[str, Any]]) -> Reason | None:
    """Check what only all ranks together show, from `words_of` of each in rank order. Equal on all ranks."""
    partials = np.stack([_unpack(words["partial"]) for words in ranks])
    residuals = [_unpack(words["residual"]) for words in ranks if "residual" in words]
    if len(residuals) not in (0, len(ranks)):
        return because("residual_differs", site=contract.site)
    for other in residuals[1:]:
        # The sums of a host's own all-reduce may differ between its ranks by their last bits.
        size = float(np.linalg.norm(np.nan_to_num(residuals[0])))
        with np.errstate(invalid="ignore"):  # the same infinity on both
            apart = float(np.linalg.norm(np.nan_to_num(other - residuals[0])))
        if apart > 64 * UNIT_ROUNDOFF[contract.dtype] * size:
            return because("residual_differs", site=contract.site)
    for form, of_form in ((WITH, residuals), (BARE, [None])):
        outs = [_unpack(words[f"out{form}"]) for words in ranks if f"out{form}" in words]
        for out in outs:
            excess = np.min([_sum_excess(contract, out, partials, residual) for residual in of_form], axis=0)
            if reason := _too_far(contract, f"residual_out{form}", excess):
                return reason
    return None


def _sum_excess(contract: Contract, out: np.ndarray, partials: np.ndarray, residual: np.ndarray | None) -> np.ndarray:
    """Return the error of a sum over what is allowed, [T, words]: 0 where it is right."""
    total = exact.rank_order_sum(list(partials), residual)
    want = round_to(total, contract.dtype).astype(np.float32)
    if contract.in_rank_order:
        return np.where(exact.same_bits(out, want), 0.0, np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(out.astype(np.float64) - want)
        allowed = exact.sum_spread(partials, residual, contract.dtype)
        return np.where(
            exact.same_bits(out, want) | ~np.isfinite(want), 0.0, np.nan_to_num(error / allowed, nan=np.inf)
        )


def probe_refusal(contract: Contract, fused: Outputs, host: Outputs) -> Reason | None:
    """Compare the kernel on known numbers with the host's reduce and norm: equal sums, norms within roundings."""
    for form, (norm_out, residual_out) in fused.items():
        wrong = residual_out != host[form][1]
        if wrong.any():
            return _too_far(contract, f"residual_out of known numbers{form}", np.where(wrong, np.inf, 0.0))
        excess = exact.probe_excess(norm_out, host[form][0], contract.dtype)
        if reason := _too_far(contract, f"norm_out of known numbers{form}", excess):
            return reason
    return None


def _too_far(contract: Contract, output: str, excess: np.ndarray) -> Reason | None:
    if (excess <= 1).all():
        return None
    row, column = np.unravel_index(int(np.argmax(np.nan_to_num(excess, nan=np.inf))), excess.shape)
    times = f"{float(excess[row, column]):.3g}"
    return because("proof_failed", site=contract.site, output=output, times=times, row=int(row))


def _pack(words: np.ndarray) -> list[Any]:
    return [list(words.shape), base64.b64encode(np.ascontiguousarray(words, np.float32).tobytes()).decode()]


def _unpack(packed: list[Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed[1]), np.float32).reshape(packed[0])
