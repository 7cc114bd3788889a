"""`python -m fd_fusion tune`: from times to limits, the whole command under the interpreter, and all that fails."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.segments import left, none_left

from fd_fusion.cli.processes import ranks
from fd_fusion.cli.tune import command as tune
from fd_fusion.cli.tune import limits as tune_limits
from fd_fusion.kernels.all_reduce.plan import plan_for
from fd_fusion.tuning.limits import built_in_limit
from fd_fusion.tuning.table import Fingerprint, read_limits, table_lock, table_path, versions_here

ROOT = Path(__file__).parents[3]


def times(**columns):
    return {name: dict(zip((1, 8, 64, 512), column)) for name, column in columns.items()}


def test_the_slowest_rank_counts_and_what_one_lacks_is_dropped():
    ranks_times = [times(one_shot=[1, 2], unfused=[9]), times(one_shot=[3, 1], unfused=[7], two_shot=[1])]
    assert tune_limits.merge(ranks_times) == {"one_shot": {1: 3, 8: 2}, "unfused": {1: 9}}


@pytest.mark.parametrize(
    "one, two, switch", [([1, 2, 3, 9], [2, 1, 2, 3], 8), ([1] * 4, [2] * 4, None), ([2] * 4, [1, 1, 3, 1], 512)]
)
def test_two_shot_from_where_it_stays_faster(one, two, switch):
    assert tune_limits.two_shot_rows(times(one_shot=one, two_shot=two)) == switch


def test_a_limit_lies_below_the_first_loss_and_the_fastest_comes_first():
    found = tune_limits.find_limits(
        times(one_shot=[3, 4, 9, 40], two_shot=[5, 6, 7, 30], flashinfer=[2, 3, 11, 5], unfused=[9, 9, 10, 20])
    )
    assert found.rows == {"triton": 64, "flashinfer": 8}, "a win beyond a loss does not count"
    assert found.two_shot_rows == 64 and found.order == ("flashinfer", "triton")


def test_two_shot_begins_by_a_residual_that_stays_and_the_limit_holds_for_one_that_does_not():
    ours = times(one_shot=[3, 4, 9, 40], two_shot=[5, 6, 8, 30], staying=[5, 3, 6, 15])
    found = tune_limits.find_limits({**ours, **times(unfused=[9, 7, 9, 20])})
    assert found.two_shot_rows == 8 and found.rows == {"triton": 64} and found.staying_rows == 512
    assert tune_limits.find_limits({**ours, **times(unfused=[9, 7, 9, 14])}).staying_rows == 64
    del ours["staying"]
    assert tune_limits.find_limits({**ours, **times(unfused=[9, 7, 9, 20])}).staying_rows == 0


NAMES = {
    "triton one-shot": "one_shot",
    "triton two-shot": "two_shot",
    "flashinfer one-shot": "flashinfer",
    "nccl + norm": "unfused",
}


@pytest.mark.parametrize("name", ["all_reduce_flashinfer_n2", "all_reduce_link_n2", "rivals_n2", "rivals_n4"])
def test_the_built_in_limits_lie_where_fusing_won(name):
    """Over NVLink, at no measured T up to the built-in limit is fusing slower than NCCL and a norm."""
    result = json.loads((ROOT / f"examples/results/{name}.json").read_text())
    measured = {}
    for row in result["rows"]:
        if row["name"] in NAMES and row["us"]:
            measured.setdefault(row["H"], {}).setdefault(NAMES[row["name"]], {})[row["T"]] = row["us"]
    assert len(measured) >= 4
    for hidden_size, columns in measured.items():
        found = tune_limits.find_limits(columns)
        assert found.order[0] == "triton" and found.rows["triton"] >= 64, (hidden_size, found)
        assert built_in_limit("gpu", result["ranks"], hidden_size) <= found.rows["triton"], (hidden_size, found)


@pytest.mark.parametrize(
    "name, size, two_shot, cells",
    [
        ("rivals_n2", 2, "", 80),
        ("rivals_n4", 4, "", 80),
        ("rivals_n4", 4, ", the residual stays", 240),
        ("all_reduce_24mb_n4", 4, ", the residual stays", 32),  # as many slots as the built-in limits give
    ],
)
def test_up_to_the_built_in_limits_no_cell_lost_to_a_pull_or_to_nccl(name, size, two_shot, cells):
    """By the path that a call takes without a table; where the residual stays, to nothing that was measured."""
    result = json.loads((ROOT / f"examples/results/{name}.json").read_text())
    us = {(row["H"], row["T"], row["name"]): row["us"] for row in result["rows"]}
    limits = {hidden: built_in_limit("gpu", size, hidden, stays=bool(two_shot)) for hidden, _, _ in us}
    whole = ("pull +", "nccl", "symm", "flashinfer") if two_shot else ("pull +", "nccl")
    others = {name for *_, name in us if name.startswith(whole)}
    compared = 0
    for hidden, rows in {(hidden, rows) for hidden, rows, _ in us if rows <= limits[hidden]}:
        switch = plan_for(size, hidden, "bfloat16").two_shot_rows
        path = "triton one-shot" if switch is None or rows < switch else f"triton two-shot{two_shot}"
        for other in others:
            compared += (hidden, rows, other) in us
            assert us[hidden, rows, path] < us.get((hidden, rows, other), math.inf), (hidden, rows, other)
    assert compared >= cells and max(limits.values()) == {2: 2048, 4: 1024}[size]


def test_where_two_shot_begins_it_is_the_faster_path_with_a_residual_that_stays():
    """And up to half of that one-shot is."""
    result = json.loads((ROOT / "examples/results/rivals_n4.json").read_text())
    us = {(row["H"], row["T"], row["name"]): row["us"] for row in result["rows"]}
    for hidden, rows, name in us:
        if name == "triton two-shot, the residual stays":
            one_shot, begins = us[hidden, rows, "triton one-shot"], plan_for(4, hidden, "bfloat16").two_shot_rows
            assert rows < begins or us[hidden, rows, name] <= 1.01 * one_shot, (hidden, rows)
            assert 2 * rows > begins or one_shot < us[hidden, rows, name], (hidden, rows)


def test_the_built_in_limits_of_groups_that_were_not_measured_stay_cautious():
    assert [built_in_limit("gpu", size, 4096) for size in range(3, 9)] == [64, 512, 64, 64, 64, 64]
    assert [built_in_limit("gpu", 4, hidden) for hidden in (2048, 8192, 16384)] == [1024, 256, 128]
    assert [built_in_limit("gpu", size, 8192, stays=True) for size in range(3, 9)] == [64, 1024, 32, 32, 32, 32]


def test_never_winning_and_a_missing_rival():
    assert tune_limits.find_limits(times(one_shot=[9] * 4, unfused=[1] * 4)).order == ()
    assert tune_limits.find_limits(times(one_shot=[9] * 4)) is None
    assert tune_limits.find_limits({}) is None


RESULT = {
    "times": {"one_shot": {"1": 3.0, "8": 4.0}, "unfused": {"1": 9.0, "8": 3.0}},
    "skipped": {"flashinfer": "FlashInfer is not installed"},
    "rival": "a pull up to 8 rows, NCCL",
    "gpu": "GPU X",
}
TWO_GPUS = {"device": "gpu", "arch": 90, "gpus": 2}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def run(monkeypatch, *args, here=TWO_GPUS, measure=lambda *_: [RESULT, RESULT]):
    monkeypatch.setattr(tune, "_framework", lambda: here)
    monkeypatch.setattr(tune, "_measure", measure)
    return tune.main(["--hidden-size", "4096", *args])


def test_what_is_measured_on_gpus_is_stored_for_bind(cache, monkeypatch, capsys):
    assert run(monkeypatch) == 0
    limits, reason = read_limits(Fingerprint("GPU X", 2, 4096, "bfloat16", versions_here()), table_path())
    assert reason is None and limits.rows == {"triton": 1} and limits.order == ("triton",)
    told = capsys.readouterr().out
    assert "triton: fusing wins up to 1 rows" in told and f"stored in {table_path()}" in told
    assert "flashinfer: not measured: FlashInfer is not installed" in told
    assert "unfused: a pull up to 8 rows, NCCL" in told


@pytest.mark.parametrize(
    "here, result",
    [
        (TWO_GPUS, {**RESULT, "times": {"one_shot": {"1": 3.0}}}),
        ({"device": "cpu", "arch": None, "gpus": 0}, {**RESULT, "gpu": None}),
    ],
    ids=["no rival", "CPU"],
)
def test_what_is_not_stored(cache, monkeypatch, capsys, here, result):
    assert run(monkeypatch, here=here, measure=lambda *_: [result, result]) == 0
    assert not table_path().exists() and "not stored: " in capsys.readouterr().out


def test_fewer_gpus_than_ranks_are_refused_before_a_rank_starts(cache, monkeypatch, capsys):
    assert run(monkeypatch, "--nproc", "4", measure=None) == 1
    assert told(capsys) == "fd_fusion: nothing was stored: tune needs a GPU for each rank, and finds 2 for 4 ranks"
    assert not table_path().exists()


def test_nothing_measured_is_a_failure(cache, monkeypatch):
    assert run(monkeypatch, measure=lambda *_: [{**RESULT, "times": {}}]) == 1


def told(capsys):
    """The one sentence on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_cache_folder_that_cannot_be_written(cache, monkeypatch, capsys):
    (cache / "fd_fusion").write_text("a file in the place of the folder")
    assert run(monkeypatch, measure=None) == 1, "it shows before anything is measured"
    assert f"cannot be kept in {cache / 'fd_fusion'}" in told(capsys)


def test_another_tune_at_work(cache, monkeypatch, capsys):
    with table_lock(table_path()):
        assert run(monkeypatch, measure=None) == 1
    assert told(capsys) == "fd_fusion: another tune is running: wait for it, or end it"


def test_ranks_that_cannot_be_started_are_not_told_as_a_table_that_cannot_be_kept(cache, monkeypatch, capsys):
    def measure(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")  # of fork

    assert run(monkeypatch, measure=measure) == 1
    assert "the ranks could not be started: [Errno 11] Resource temporarily unavailable" in told(capsys)


BAD = ("--rows a", "--rows 0", "--nproc 1", "--nproc 9", "--hidden-size 0", "--hidden-size 100", "--dtype int8")
BAD += ("--rounds 0", "--workspace-mb 0", "--timeout-s -1")


@pytest.mark.parametrize("args", BAD)
def test_bad_arguments(cache, monkeypatch, args):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *args.split(), measure=None)
    assert caught.value.code == 2


DYING = """
import os, signal, sys
from fd_fusion.cli.tune import rank as tune_rank
from fd_fusion.cli.processes.ranks import rank_main
time, count = tune_rank._time, iter(range(9))
def dying(*args):
    if sys.argv[2] == "1" and next(count) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return time(*args)
tune_rank._time = dying
sys.exit(rank_main(tune_rank.run))
"""


def test_a_rank_that_dies_in_the_middle(cache, monkeypatch, capsys, tmp_path):
    (script := tmp_path / "dying.py").write_text(DYING)
    monkeypatch.setattr(ranks, "_command", lambda module, folder, rank: [sys.executable, script, folder, str(rank)])
    monkeypatch.setattr(tune, "_framework", lambda: {"device": "cpu", "arch": None, "gpus": 0})
    monkeypatch.setattr(tune, "progress_line", lambda text: contextlib.nullcontext(shown.append))
    before, shown = left(), []
    assert tune.main(["--hidden-size", "64", "--rows", "1", "--rounds", "1"]) == 1
    assert (shown[0], shown[-1]) == ("measuring on 2 ranks, 0 of 5", "measuring on 2 ranks, 1 of 5")
    assert capsys.readouterr().err.startswith("fd_fusion: nothing was stored: rank 1 died of SIGKILL")
    assert none_left(before) and not table_path().exists()


def test_the_whole_command_under_the_interpreter(cache):
    """On three ranks, where a residual may stay with its owners."""
    options = ["--nproc", "3", "--hidden-size", "64", "--rows", "1", "--json"]
    argv = [sys.executable, "-W", "ignore", "-m", "fd_fusion", "tune", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*argv, "--rounds", "1"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["mode"] == "cpu" and outcome["stored"] is None
    assert set(outcome["times"]) == {"one_shot", "two_shot", "staying", "unfused"}
    assert "GPU" in outcome["skipped"]["flashinfer"] and not table_path().exists()
    assert outcome["rival"] == "a pull of this package and its norm, in the place of a host's own all-reduce"


def test_without_a_home_tune_says_so(monkeypatch, capsys):
    """It was a traceback."""
    monkeypatch.setattr(tune, "table_path", lambda: None)
    monkeypatch.setattr(tune, "tune", lambda args, show: (_ for _ in ()).throw(OSError(2, "this user has none")))
    assert tune.main(["--nproc", "2", "--hidden-size", "4096"]) == 1
    assert "a home folder (this user has none): set XDG_CACHE_HOME" in capsys.readouterr().err
