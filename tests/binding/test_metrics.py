"""Metrics: what is counted, where it goes, and that nothing is told more often than once a minute."""

import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from fd_fusion.binding import bind as binding
from fd_fusion.binding import lifecycle, metrics
from fd_fusion.binding.backend_selection import SelectedBackend
from fd_fusion.binding.report import Report, SiteLine
from fd_fusion.comm.group import Group
from fd_fusion.config import FusionConfig
from fd_fusion.reasons import FusionTimeout, because
from fd_fusion.spec import Fp8

ROOT = Path(__file__).parents[2]


class FakeOp:
    bytes = 32 << 20

    def __init__(self, rows=0, timeouts=0):
        self.rows, self.timeouts = rows, timeouts

    def stats(self):
        return {"two_shot_rows": 129, "timeouts": self.timeouts, "device": {"rows": self.rows, "calls": 1}}


class Site:
    proven, takers = True, None

    def __init__(self, name, limit=512, **calls):
        self.name, self.limit, self.calls, self.fp8_calls = name, limit, Counter(calls), Counter()


FORM = Fp8("multiply", by_column=True)


def report_in_fp8(*takers):
    """Three Sites: the first two give FP8, which so many layers took in the proving pass."""
    op = FakeOp()
    op.fp8 = (FORM,)
    report = report_of(op)
    for number, (line, count) in enumerate(zip(report.sites[:2], takers)):
        report.sites[number] = dataclasses.replace(line, fp8=FORM)
        line.site.takers, line.site.fp8_calls = count, Counter({"made": 5, "taken": 5 * count} if count else {})
    return report


def report_of(op, sites=3, **more):
    selected = SelectedBackend("triton", op, "tuning table", because("table_differs"))
    report = Report(FusionConfig(), "FD_FUSION_CONFIG", "Model")
    report.sites = [
        SiteLine(Site(f"s{i}", fused=2, too_many_rows=1, **more), selected, (0, 1, 2, 3)) for i in range(sites)
    ]
    return report


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(metrics, "_next", 0.0)
    monkeypatch.setattr(metrics, "_exporter", None)
    monkeypatch.setattr(metrics, "_failures", set())
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


def test_the_start_line_and_the_same_as_data():
    report = report_of(FakeOp(rows=7))
    assert report.lines() == [
        "fd_fusion 0.1.0: 3 sites, triton one-shot <= 128 rows, two-shot <= 512 (tuning table), workspace 32 MB, "
        "group [0..3], config from FD_FUSION_CONFIG",
        "fd_fusion: the ranks read different tuning tables, so none is used; give all ranks one XDG_CACHE_HOME",
    ]
    (space,) = report.to_dict()["workspaces"]
    assert space["stats"]["device"]["rows"] == 7 and space["limit_source"] == "tuning table"
    assert space["note"]["code"] == "table_differs" and report.to_dict()["calls_counted"] == "eager or capture"
    json.dumps(report.to_dict())


@pytest.mark.parametrize(
    "limit, two_shot, told",
    [
        (None, 129, "one-shot <= 128 rows, two-shot any number of rows (built in)"),
        (64, 129, "one-shot <= 64 rows"),
        (9, None, "<= 9 rows"),
    ],
)
def test_the_limits_in_the_start_line(limit, two_shot, told, monkeypatch):
    monkeypatch.setattr(FakeOp, "stats", lambda self: {"two_shot_rows": two_shot})
    selected = SelectedBackend("triton", FakeOp())
    report = Report(FusionConfig(), "x", "Model", sites=[SiteLine(Site("s", limit), selected, (0, 1))])
    assert told in report.lines()[0] and "(built in)" in report.lines()[0]


@pytest.mark.parametrize("limits", [(512, 2048), (2048, 512)])
def test_the_start_line_has_the_limit_that_holds_for_all_sites_of_a_workspace(limits):
    """Those whose residual stays have a larger one; each has its own in the list of sites."""
    selected, other = SelectedBackend("triton", FakeOp()), SelectedBackend("triton", FakeOp())
    lines = [SiteLine(Site("s", limit), selected, (0, 1, 2, 3)) for limit in limits]
    report = Report(FusionConfig(), "x", "Model", sites=[*lines, SiteLine(Site("t", 64), other, (0, 1))])
    assert "two-shot <= 512 (built in)" in report.lines()[0] and "2048" not in report.lines()[0]
    data = report.to_dict()
    assert [space["limit"] for space in data["workspaces"]] == [512, 64]
    assert [site["limit"] for site in data["sites"]] == [*limits, 64]


@pytest.mark.parametrize(
    "nbytes, told",
    [(32 << 20, "32 MB"), ((32 << 20) - 300, "32 MB"), (1 << 19, "0.5 MB"), (17153, "17 KB"), (0, "0 KB")],
)
def test_a_small_workspace_is_not_told_as_none(nbytes, told, monkeypatch):
    monkeypatch.setattr(FakeOp, "bytes", nbytes)
    assert f", workspace {told}, group" in report_of(FakeOp()).lines()[0]


def test_norms_in_fp8_and_who_takes_them():
    report = report_in_fp8(1, 2)
    assert ", 2 norms in FP8, taken by 3 layers, config from" in report.lines()[0] and len(report.lines()) == 2
    counted, _ = metrics.totals([report])
    assert (counted["fp8", "made"], counted["fp8", "taken"]) == (10, 15)
    assert report.to_dict()["sites"][1]["fp8_calls"] == {"made": 5, "taken": 10}


def test_a_norm_whose_fp8_nobody_takes_is_told():
    report = report_in_fp8(1, 0)
    assert ", 1 norms in FP8, taken by 1 layers, config from" in report.lines()[0]
    told = "fd_fusion: 1 norm quantised behind the kernel: no layer took the FP8 of its norm in the proving pass"
    assert told in report.lines()
    assert [site["fp8"] for site in report.to_dict()["sites"]] == ["multiply", "apart", None]


def test_totals(monkeypatch):
    monkeypatch.setattr(lifecycle, "_held", ())
    ops = [FakeOp(rows=50, timeouts=1), FakeOp(rows=4)]
    for one in (*ops, FakeOp()):
        lifecycle.hold(Group("g", 0, 2, (0, 1), None), one)
    counted, nbytes = metrics.totals([report_of(one) for one in ops])
    assert counted["finished", "fused", ""] == 12 and counted["finished", "stock", "too_many_rows"] == 6
    assert counted["device_rows", "triton"] == 54 and counted["timeouts",] == 1
    assert nbytes == 3 * (32 << 20), "each workspace once, and that of a dropped model, which no report has any more"


def test_a_report_tells_what_a_driver_refuses_to_read():
    """After a time-out the device may answer nothing more: the report is for that time too."""

    def stats():
        raise RuntimeError("cuMemcpyDtoHAsync_v2: CUDA_ERROR_ILLEGAL_ADDRESS")

    op = FakeOp()
    op.stats = stats
    report = report_of(op)
    assert "3 sites" in report.lines()[0]
    (space,) = report.to_dict()["workspaces"]
    assert space["stats"] == {"error": "RuntimeError: cuMemcpyDtoHAsync_v2: CUDA_ERROR_ILLEGAL_ADDRESS"}


def test_one_line_of_json_a_minute(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fd_fusion")
    now = [100.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for _ in range(5):
        metrics.tick(lambda: [report_of(FakeOp(rows=50))])
    (record,) = caplog.records
    data = json.loads(record.getMessage().removeprefix("fd_fusion metrics "))
    assert data["finished"] == {"fused": 6, "stock/too_many_rows": 3} and data["device_rows"] == {"triton": 50}
    now[0] += metrics.EVERY_S
    metrics.tick(lambda: [report_of(FakeOp())])
    assert len(caplog.records) == 2


def bind(monkeypatch, op):
    monkeypatch.setattr(binding, "_bound", {"model": types.SimpleNamespace(report=report_of(op))})
    monkeypatch.setattr(lifecycle, "_held", ())
    lifecycle.hold(Group("g", 0, 2, (0, 1), None), op)


def test_a_failing_reader_hides_no_timeout_and_holds_no_token_up(caplog, monkeypatch):
    class CudaError(RuntimeError):
        pass

    def stats():
        raise CudaError("cuMemcpyDtoHAsync_v2: CUDA_ERROR_ILLEGAL_ADDRESS")

    now = [0.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: now.append(now[-1] + 61) or now[-1]))
    op = FakeOp()
    op.stats, op.check = stats, lambda: None
    bind(monkeypatch, op)
    for _ in range(3):
        binding.check()
    op.check = lambda: (_ for _ in ()).throw(FusionTimeout(because("aborted")))
    with pytest.raises(FusionTimeout):
        binding.check()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "CudaError: cuMemcpyDtoHAsync_v2" in line


def test_a_timeout_is_told_at_once(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "fd_fusion")
    op = FakeOp(timeouts=1)
    bind(monkeypatch, op)
    op.check = lambda: None
    binding.check()

    def check():
        raise FusionTimeout(because("aborted"))

    op.check = check
    now = metrics.time.monotonic() + 1.5
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: now))
    for _ in range(3):
        with pytest.raises(FusionTimeout):
            binding.check()
    assert len(caplog.records) == 2 and '"timeouts": 1' in caplog.records[1].getMessage()


def test_nothing_bound_tells_nothing(caplog):
    caplog.set_level(logging.INFO, "fd_fusion")
    metrics.tick(list)
    assert not caplog.records


def test_without_prometheus_client_the_log_says_so(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert metrics.choose({"PROMETHEUS_MULTIPROC_DIR": "/tmp"}) is metrics.to_log
    assert "prometheus_client is not installed" in caplog.text


@pytest.mark.skipif(not importlib.util.find_spec("prometheus_client"), reason="prometheus_client is not installed")
@pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_prometheus_client_that_was_imported_too_early(name, caplog, monkeypatch, tmp_path):
    """It looks at its variable once, at import: set later, the numbers would stay in this process."""
    from prometheus_client import values

    monkeypatch.setattr(values, "ValueClass", values.MutexValue)  # as where no variable is set
    made = []
    monkeypatch.setattr(metrics, "Prometheus", lambda: made.append(1))
    assert metrics.choose({name: str(tmp_path)}) is metrics.to_log and not made
    assert f"prometheus_client was imported before {name} was set" in caplog.text


WORKER = """
import sys, tests.binding.test_metrics as t
from fd_fusion.binding import metrics
op = t.FakeOp(rows=10)
export = metrics.choose({"PROMETHEUS_MULTIPROC_DIR": sys.argv[1]})
assert isinstance(export, metrics.Prometheus)
export([t.report_of(op)]); op.rows = 25; export([t.report_of(op)])
import os; os._exit(0)  # workers are ended, they do not end
"""
SERVER = """
import sys, prometheus_client
from prometheus_client import multiprocess
registry = prometheus_client.CollectorRegistry()
multiprocess.MultiProcessCollector(registry, sys.argv[1])
print(prometheus_client.generate_latest(registry).decode())
"""


@pytest.mark.skipif(not importlib.util.find_spec("prometheus_client"), reason="prometheus_client is not installed")
def test_two_workers_and_a_server_with_prometheus_client(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": path}
    for code in (WORKER, WORKER, SERVER):
        done = subprocess.run([sys.executable, "-c", code, tmp_path], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    values = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith("fd_fusion"))
    assert values['fd_fusion_device_rows_total{backend="triton"}'] == "50.0"
    assert values['fd_fusion_finished_total{path="fused",reason=""}'] == "12.0"
    assert values["fd_fusion_timeouts_total"] == "0.0"
