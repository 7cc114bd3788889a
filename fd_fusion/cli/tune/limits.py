"""From times to limits: merge over ranks, find where fusing stops winning. Plain arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fd_fusion.tuning.table import Limits

COLUMNS = ("one_shot", "two_shot", "staying", "flashinfer", "unfused")  # staying: two-shot, and the residual stays
Times = Mapping[str, Mapping[int, float]]  # column -> rows -> microseconds; a column that could not run is absent


def merge(ranks: Sequence[Mapping[str, Mapping[Any, float]]]) -> dict[str, dict[int, float]]:
    """The slowest rank counts. A column, or a number of rows, that one rank lacks is dropped.

    The numbers of rows may be text: JSON has made them so.
    """
    merged = {}
    for column in COLUMNS:
        if all(column in times for times in ranks):
            rows = set.intersection(*(set(times[column]) for times in ranks))
            merged[column] = {int(t): max(times[column][t] for times in ranks) for t in sorted(rows, key=int)}
    return merged


def two_shot_rows(times: Times) -> int | None:
    """From how many rows on two-shot is the faster path, at every measured number of rows; None for never. With a
    residual that stays, where it can: so most Sites of a model call it."""
    one, two = times.get("one_shot", {}), times.get("staying") or times.get("two_shot", {})
    faster = takewhile(lambda rows: two[rows] < one[rows], sorted(set(one) & set(two), reverse=True))
    return min(faster, default=None)


def by_backend(times: Times) -> dict[str, dict[int, float]]:
    """The times of each fusing backend; triton's with a residual that is sent back."""
    found = {"triton": by_path(times, "two_shot")} if "one_shot" in times else {}
    return found | ({"flashinfer": dict(times["flashinfer"])} if "flashinfer" in times else {})


def by_path(times: Times, two_shot: str) -> dict[int, float]:
    """The times of triton, by the path that a call would take; `two_shot`: the column of the longer one."""
    switch, two = two_shot_rows(times), times.get(two_shot, {})
    one_shot = {rows: time for rows, time in times["one_shot"].items() if switch is None or rows < switch}
    return one_shot | {rows: time for rows, time in two.items() if switch is not None and rows >= switch}


def find_limits(times: Times) -> Limits | None:
    """The limits that a table keeps, or None where the rival was not measured.

    A limit is the last measured number of rows before the first at which fusing does not win: below it fusing won at
    every size that was measured. Backends that win somewhere are ordered by their geometric mean of time over the
    sizes at which all of them were measured, up to the largest limit.
    """
    rival = times.get("unfused")
    fused = by_backend(times)
    if not rival or not fused:
        return None
    limits = {name: _limit(mine, rival) for name, mine in fused.items()}
    winners = [name for name, limit in limits.items() if limit]
    common = set.intersection(*(set(fused[name]) for name in winners)) if winners else set()
    common = {rows for rows in common if rows <= max(limits.values())}
    order = sorted(winners, key=lambda name: statistics.geometric_mean(fused[name][rows] for rows in common))
    staying = _limit(by_path(times, "staying"), rival) if "staying" in times and "triton" in limits else 0
    return Limits(limits, tuple(order), two_shot_rows(times), staying)


def _limit(mine: Mapping[int, float], rival: Mapping[int, float]) -> int:
    won = takewhile(lambda rows: mine[rows] < rival[rows], sorted(set(mine) & set(rival)))
    return max(won, default=0)
