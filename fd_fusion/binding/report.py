"""The report of a bound model: what fuses, by what, up to which size, and why the rest does not."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fd_fusion import __version__
from fd_fusion.binding.backend_selection import SelectedBackend
from fd_fusion.config import FusionConfig
from fd_fusion.reasons import Reason, because
from fd_fusion.site import Rejected, Site
from fd_fusion.spec import Fp8


@dataclass(frozen=True)
class SiteLine:
    """A Site in the report."""

    site: Site
    selected: SelectedBackend
    ranks: tuple[int, ...]
    fp8: Fp8 | Reason | None = None

    @property
    def quantised_apart(self) -> Reason | None:
        """Why the norm is quantised behind the kernel, or None: in it, or not at all."""
        op = self.selected.op
        if self.fp8 is None or self.fp8 in op.fp8:
            return because("fp8_not_taken") if self.site.takers == 0 else None
        if isinstance(self.fp8, Reason):
            return self.fp8
        got = f"the {self.selected.backend} backend"
        return getattr(op, "no_fp8", None) or because("no_fp8", got=got, need="nothing")

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def calls(self) -> Counter[str]:
        """Return the Python calls so far by "fused" or the code of the reason; the replay of a graph makes none."""
        return self.site.calls


@dataclass
class Report:
    """The outcome of `bind`. `off` is the reason when nothing was even tried."""

    config: FusionConfig | None
    source: str
    model: str
    off: Reason | None = None
    waiting: Reason | None = None  # why a proving pass showed nothing; another one follows
    spread: Reason | None = None  # why outputs were not compared bit by bit
    residual: Reason | None = None  # why two-shot sends the residual back to every rank
    staying: int = 0  # Sites whose residual stays with the owners of its rows, by two-shot
    sites: list[SiteLine] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    qk_fused: list[str] = field(default_factory=list)  # q and k norms that run as one kernel
    qk_stock: dict[str, Reason] = field(default_factory=dict)
    _logged: bool = field(default=False, repr=False)

    @property
    def workspaces(self) -> list[SiteLine]:
        """Return a line of each workspace, with the limit that holds for all its Sites."""
        found: dict[int, SiteLine] = {}
        for line in self.sites:  # where one has no limit none has
            known = found.setdefault(id(line.selected), line)
            found[id(line.selected)] = min(known, line, key=lambda one: one.site.limit or 0)
        return list(found.values())

    @property
    def proven(self) -> bool:
        return bool(self.sites) and all(line.site.proven for line in self.sites)

    def lines(self) -> list[str]:
        """Return one line on what fuses, and one for each reason why something does not, with the number of sites."""
        lines = [self._headline()]
        for reason, count in Counter(_with_remedy(line.reason) for line in self.rejected).items():
            lines.append(f"fd_fusion: {count} pair{'s' * (count != 1)} stock: {reason}")
        for reason in dict.fromkeys(line.selected.note for line in self.workspaces if line.selected.note):
            lines.append(f"fd_fusion: {reason}; {reason.remedy}")
        lines += [f"fd_fusion: {reason}" for reason in (self.waiting, self.spread, self.residual) if reason]
        apart = [line.quantised_apart for line in self.sites]
        for reason, count in Counter(_with_remedy(one) for one in apart if one is not None).items():
            lines.append(f"fd_fusion: {count} norm{'s' * (count != 1)} quantised behind the kernel: {reason}")
        for reason, count in Counter(map(_with_remedy, self.qk_stock.values())).items():
            lines.append(f"fd_fusion: {count} q and k norm{'s' * (count != 1)} stock: {reason}")
        return lines

    def _headline(self) -> str:
        head = f"fd_fusion {__version__}: "
        if self.off is not None and not self.qk_fused:
            return f"{head}off: {self.off}"
        parts = [f"{len(self.sites)} sites", *dict.fromkeys(map(_space, self.workspaces))]
        if self.sites and not self.proven:
            parts.append("not proven yet")
        fp8 = [line.site for line in self.sites if line.fp8 is not None and line.quantised_apart is None]
        if fp8:
            takers = sum(site.takers or 0 for site in fp8)
            parts.append(f"{len(fp8)} norms in FP8" + f", taken by {takers} layers" * (takers > 0))
        if self.qk_fused:
            parts.append(f"{len(self.qk_fused)} q and k norms by triton")
        return head + ", ".join([*parts, f"config from {self.source}"])

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return {
            "version": __version__,
            "model": self.model,
            "source": self.source,
            "config": self.config and self.config.to_dict(),
            "off": self.off and self.off.to_dict(),
            "proven": self.proven,
            "waiting": self.waiting and self.waiting.to_dict(),
            "spread": self.spread and self.spread.to_dict(),
            "residual": self.residual and self.residual.to_dict(),
            "staying": self.staying,
            # Python counts calls when it runs: eager, or once while a graph is captured. What a graph replays is
            # counted on the device alone: stats.device of a workspace.
            "calls_counted": "eager or capture",
            "workspaces": [
                {
                    "backend": line.selected.backend,
                    "ranks": list(line.ranks),
                    "limit": line.site.limit,
                    "limit_source": line.selected.limit_source,
                    "note": line.selected.note and line.selected.note.to_dict(),
                    "workspace_bytes": line.selected.op.bytes,
                    "stats": _stats(line.selected),
                }
                for line in self.workspaces
            ],
            "sites": [
                {
                    "name": line.name,
                    "backend": line.selected.backend,
                    "limit": line.site.limit,
                    "ranks": list(line.ranks),
                    "workspace_bytes": line.selected.op.bytes,
                    "fp8": line.fp8 and (line.fp8.formula if line.quantised_apart is None else "apart"),
                    "calls": dict(line.calls),
                    "fp8_calls": dict(line.site.fp8_calls),
                }
                for line in self.sites
            ],
            "qk_fused": list(self.qk_fused),
            "qk_stock": {name: reason.to_dict() for name, reason in self.qk_stock.items()},
            "rejected": [
                {"name": one.name, "reason": one.reason.to_dict(), "ranks": list(one.ranks)} for one in self.rejected
            ],
        }

    def log(self, logger: logging.Logger) -> None:
        """Log the lines once the outcome is known, the first on rank 0; a warning if what was asked for is off."""
        waiting = bool(self.sites) and not self.proven
        if self._logged or waiting or self.waiting:
            return
        self._logged = True
        import paddle.distributed as dist

        lines = self.lines()
        logger.log(logging.INFO if dist.get_rank() == 0 else logging.DEBUG, lines[0])
        for line in lines[1:]:  # a residual that is sent back is nothing that is off, under `strict` either
            logger.log(logging.INFO if line == f"fd_fusion: {self.residual}" else logging.WARNING, line)


def _with_remedy(reason: Reason) -> str:
    """Return the sentence, and the remedy where there is something to do."""
    return str(reason) if reason.remedy == "nothing to do" else f"{reason}; {reason.remedy}"


def _space(line: SiteLine) -> str:
    """Describe a workspace for the headline: its paths and their limits, its size, its group."""
    ranks, limit, backend = line.ranks, line.site.limit, line.selected.backend
    two_shot = _stats(line.selected).get("two_shot_rows")
    span = f"{ranks[0]}..{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    rows = "any number of rows" if limit is None else f"<= {limit} rows"
    if backend == "triton" and two_shot is not None and (limit is None or two_shot <= limit):
        rows = f"one-shot <= {two_shot - 1} rows, two-shot {rows if limit is None else f'<= {limit}'}"
    elif backend == "triton":
        rows = f"one-shot {rows}"
    size = _size(line.selected.op.bytes)
    return f"{backend} {rows} ({line.selected.limit_source}), workspace {size}, group [{span}]"


def _stats(selected: SelectedBackend) -> dict[str, Any]:
    """Return the op's stats, or the error: a report is for the time after something went wrong too."""
    try:
        return selected.op.stats()
    except Exception as error:  # each driver has its own; recorded in the report
        return {"error": f"{type(error).__name__}: {error}"}


def _size(nbytes: int) -> str:
    """Write bytes in MB with at most one decimal, below 0.1 MB in whole KB."""
    if nbytes < 2**20 // 10:
        return f"{-(-nbytes // 1024)} KB"
    return f"{nbytes / 2**20:.1f}".removesuffix(".0") + " MB"
