"""What the bound models of this process have done, for operators: once a minute, at most.

A worker serves no /metrics; the host's API process does. Where PROMETHEUS_MULTIPROC_DIR is set and prometheus_client
is there, the numbers go into that folder, and the process that serves /metrics adds those of all workers up.
Elsewhere they are one line of JSON in the worker's log. `tick` runs in `fd_fusion.check()`, before tokens are
published: never in a forward, never while a graph is captured, and in the thread that also closes workspaces.

    fd_fusion_finished_total{path, reason}   finishes counted by Python: eager, or once while a graph is captured
    fd_fusion_device_rows_total{backend}     rows that kernels finished, graph replays too (triton)
    fd_fusion_fp8_total{what}                norms "made" in FP8 by kernels, and "taken" by layers, counted likewise
    fd_fusion_timeouts_total                 workspaces that ran out of time
    fd_fusion_workspace_bytes                memory of all workspaces
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fd_fusion.binding import lifecycle
from fd_fusion.binding.report import Report

logger = logging.getLogger("fd_fusion")
EVERY_S = 60.0
_Key = tuple[str, ...]  # name of the metric, then the values of its labels
COUNTERS = {  # name: (help, labels)
    "finished": ("Finished pairs, counted by Python: eager, or once at capture", ("path", "reason")),
    "fp8": ("Norms made in FP8, and taken by layers, counted by Python: eager, or once at capture", ("what",)),
    "device_rows": ("Rows finished by fused kernels, counted on the device", ("backend",)),
    "timeouts": ("Fused calls that ran out of time", ()),
}
_next = 0.0
_failures: set[str] = set()
_exporter: Callable[[list[Report]], None] | None = None


def tick(reports: Callable[[], list[Report]], *, every_s: float = EVERY_S) -> None:
    """Write the numbers if the last time is `every_s` ago. Never raises; each failure is logged once."""
    global _next, _exporter
    if (now := time.monotonic()) < _next - EVERY_S + every_s:
        return
    _next = now + EVERY_S
    try:
        bound = reports()
        if any(report.sites for report in bound):
            _exporter = _exporter or choose(os.environ)
            _exporter(bound)
    except Exception as error:  # recorded: tokens are not held up, nor a FusionTimeout hidden, by statistics
        text = f"{type(error).__name__}: {error}"
        if text not in _failures:
            _failures.add(text)
            logger.warning("fd_fusion: no metrics this minute, and no such line again: %s", text)


def choose(environ: Mapping[str, str]) -> Callable[[list[Report]], None]:
    """Return the function that writes the numbers: into prometheus_client's folder, or into the log."""
    name = next(filter(environ.get, ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")), None)
    if name is None:
        return to_log
    folder = environ[name]
    try:
        from prometheus_client import values

        if getattr(values.ValueClass, "_multiprocess", True):  # its class is chosen at its import
            return Prometheus()
        why = f"prometheus_client was imported before {name} was set; set it before the server starts"
        logger.warning("fd_fusion: metrics go to this log: %s", why)
    except ImportError:
        logger.warning("fd_fusion: metrics go to this log: prometheus_client is not installed")
    except (OSError, ValueError) as error:  # a folder that cannot be written; names that are taken
        logger.warning("fd_fusion: metrics go to this log: %s: %s", folder, error)
    return to_log


def totals(reports: Sequence[Report]) -> tuple[Counter[_Key], int]:
    """Return (counters by metric and labels, bytes of all open workspaces, those of dropped models too)."""
    counted: Counter[_Key] = Counter()
    for report in reports:
        for line in report.sites:
            for code, count in line.calls.items():
                path = "fused" if code == "fused" else "stock"
                counted["finished", path, "" if path == "fused" else code] += count
            for what, count in line.site.fp8_calls.items():
                counted["fp8", what] += count
        for line in report.workspaces:
            stats = line.selected.op.stats()
            counted["timeouts",] += stats.get("timeouts") or 0
            if stats.get("device"):
                counted["device_rows", line.backend] += stats["device"]["rows"]
    return counted, lifecycle.taken_bytes()


def to_log(reports: list[Report]) -> None:
    """Write one line of JSON."""
    counted, nbytes = totals(reports)
    data: dict[str, Any] = {"pid": os.getpid(), "workspace_bytes": nbytes}
    for (name, *labels), value in counted.items():
        if labels:
            data.setdefault(name, {})["/".join(filter(None, labels))] = value
        else:
            data[name] = value
    logger.info("fd_fusion metrics %s", json.dumps(data, sort_keys=True, allow_nan=False))


class Prometheus:
    """Our metrics in prometheus_client, which was imported with PROMETHEUS_MULTIPROC_DIR set. Made once a process."""

    def __init__(self) -> None:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge

        self._counters = {name: PrometheusCounter(f"fd_fusion_{name}", *of) for name, of in COUNTERS.items()}
        text = "Memory of all workspaces of fd_fusion"
        self._bytes = Gauge("fd_fusion_workspace_bytes", text, multiprocess_mode="livesum")
        self._written: Counter[_Key] = Counter()

    def __call__(self, reports: list[Report]) -> None:
        counted, nbytes = totals(reports)
        self._bytes.set(nbytes)
        for key, value in counted.items():
            # A model that was bound anew, or a workspace that was reset, counts from zero.
            grown = value - self._written[key] if value >= self._written[key] else value
            metric = self._counters[key[0]]
            (metric.labels(*key[1:]) if key[1:] else metric).inc(grown)
            self._written[key] = value
