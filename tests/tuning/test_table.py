"""The table of limits: what is written is read back, and what cannot be trusted is left alone, with a reason."""

import json
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from fd_fusion.binding import backend_selection
from fd_fusion.comm.group import Group
from fd_fusion.config import FusionConfig
from fd_fusion.spec import OpSpec
from fd_fusion.tuning import table as tuning_table
from fd_fusion.tuning.limits import NEVER, limit_source, row_limit
from fd_fusion.tuning.table import Fingerprint, Limits, read_limits, store_limits, table_lock, table_path

KEY = Fingerprint("GPU X", 2, 4096, "bfloat16", {"fd_fusion": "0.1.0", "triton": "triton 3.6.0"})
LIMITS = Limits({"triton": 128, "flashinfer": 0}, ("triton",), 32, 512)


@pytest.fixture
def path(tmp_path):
    path = table_path({"XDG_CACHE_HOME": str(tmp_path / "cache")})
    with table_lock(path):
        store_limits(KEY, LIMITS, path)
    return path


def changed(**changes):
    return Fingerprint(**{**vars(KEY), **changes})


def test_what_is_stored_is_read_back_beside_other_entries(path):
    other = changed(hidden_size=5120)
    store_limits(other, Limits({"triton": 0}, ()), path)
    store_limits(other, Limits({"triton": 7}, ("triton",)), path)
    assert read_limits(KEY, path) == (LIMITS, None)
    assert read_limits(other, path)[0].rows == {"triton": 7}
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "changes",
    [{"gpu": "GPU Y"}, {"size": 4}, {"hidden_size": 4097}, {"dtype": "float16"}],
    ids=lambda c: next(iter(c)),
)
def test_another_machine_or_shape_is_not_measured(path, changes):
    assert read_limits(changed(**changes), path) == (None, None)


def test_other_versions_are_stale(path):
    limits, reason = read_limits(changed(versions={"fd_fusion": "0.2.0", "triton": "triton 3.6.0"}), path)
    assert limits is None and reason.code == "table_stale"
    assert "fd_fusion 0.1.0, triton 3.6.0" in str(reason) and "fd_fusion 0.2.0" in str(reason)


def test_without_a_home_there_is_no_table_and_no_error(monkeypatch):
    """Path.home() raised before the vote, for a user with neither HOME nor an entry in the password file."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning_table.Path, "home", no_home)
    assert table_path({}) is None and table_path({"XDG_CACHE_HOME": "relative"}) is None
    assert read_limits(KEY, None) == (None, None)
    assert table_path({"XDG_CACHE_HOME": "/there"}) is not None
    monkeypatch.setattr(tuning_table.Path, "home", lambda: tuning_table.Path("relative"))
    assert table_path({}) is None


@pytest.mark.parametrize("how", ["folder", "not utf-8", "versions", "parent is a file", "unreadable fields"])
def test_whatever_lies_where_the_table_should_be_is_a_reason(path, how):
    data = json.loads(path.read_text())
    if how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "not utf-8":
        path.write_bytes(b"\xff\xfe" + path.read_bytes())
    elif how == "parent is a file":
        path = path / "limits.json"
    else:
        data["entries"][0]["for"]["versions"] = "none" if how == "versions" else {"triton": 3}
        path.write_text(json.dumps(data))
    files = len(os.listdir("/proc/self/fd"))
    limits, reason = read_limits(KEY, path)
    assert limits is None and reason.code == "table_unusable", reason
    assert len(os.listdir("/proc/self/fd")) == files, "a file is left open"


def test_a_failure_on_the_way_to_the_table_does_not_part_the_ranks(monkeypatch):
    """The other ranks wait in the vote on the table."""

    def broken():
        raise RuntimeError("no such metadata")

    monkeypatch.setattr(backend_selection.tuning_table, "versions_here", broken)
    cuda = type("Cuda", (), {"get_device_name": staticmethod(lambda: "GPU X")})
    monkeypatch.setattr(backend_selection, "paddle_or_torch", lambda: type("Paddle", (), {"cuda": cuda}))
    limits, note = backend_selection._tuned(Group("g", 0, 1, (0,), None), SPEC)
    assert limits is None and note.code == "table_unusable" and "no such metadata" in str(note)


def entry(**limits):
    return {
        "for": {**vars(KEY)},
        "limits": {"rows": {"triton": 1}, "order": ["triton"], "two_shot_rows": None, "staying_rows": 0, **limits},
    }


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[" * 100_000,
        "[]",
        json.dumps({"schema": 99, "entries": []}),
        json.dumps({"schema": 2, "entries": [3]}),
        json.dumps({"schema": 2, "entries": [{"for": vars(KEY), "limits": 3}]}),
        json.dumps({"schema": 2, "entries": [entry(rows={"triton": -1})]}),
        json.dumps({"schema": 2, "entries": [entry(rows={"triton": 1 << 30})]}),
        json.dumps({"schema": 2, "entries": [entry(rows={"triton": True})]}),
        json.dumps({"schema": 2, "entries": [entry(rows={"../evil": 1}, order=["../evil"])]}),
        json.dumps({"schema": 2, "entries": [entry(order=["flashinfer"])]}),
        json.dumps({"schema": 2, "entries": [entry(two_shot_rows="many")]}),
        json.dumps({"schema": 2, "entries": [entry(staying_rows=-1)]}),
        " " * ((1 << 20) + 1),
    ],
    ids=range(14),
)
def test_a_wrong_table_is_left_alone_with_a_reason_and_written_anew(path, content):
    path.write_text(content)
    limits, reason = read_limits(KEY, path)
    assert limits is None and reason.code == "table_unusable" and str(path) in str(reason) and "\n" not in str(reason)
    store_limits(KEY, LIMITS, path)
    assert read_limits(KEY, path) == (LIMITS, None)


def test_a_table_that_others_may_write_is_not_believed(path):
    path.chmod(0o666)
    assert "others own it or may write to it" in str(read_limits(KEY, path)[1])


def test_a_link_is_not_followed(path, tmp_path):
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert read_limits(KEY, path)[1].code == "table_unusable"


def test_no_table_is_no_reason(tmp_path):
    assert read_limits(KEY, tmp_path / "none" / "limits.json") == (None, None)


def test_only_one_measures_and_a_killed_one_holds_nothing(path):
    code = (
        "import sys, os, time, pathlib; from fd_fusion.tuning.table import table_lock\n"
        "with table_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), table_lock(path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with table_lock(path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError), table_lock(tmp_path / "fd_fusion" / "limits.json"):
        pass


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table_path({}) == tmp_path / ".cache/fd_fusion/limits.json"
    assert table_path({"XDG_CACHE_HOME": "relative"}) == table_path({}), "a relative one is to be ignored"


SPEC = OpSpec(0, 2, 4096, "bfloat16", device="gpu", arch=90)


def test_the_order_of_limits():
    tuned = replace(SPEC, tuned_rows=77)
    assert row_limit(SPEC) == 2048 and limit_source(SPEC) == "built in"
    assert row_limit(tuned) == 77 and limit_source(tuned) == "tuning table"
    asked = replace(tuned, max_token_num=5)
    assert row_limit(asked) == 5 and limit_source(asked) == "max_token_num"
    assert row_limit(replace(tuned, deterministic=True)) is None
    staying = replace(tuned, tuned_staying_rows=300)
    assert [row_limit(one, stays=True) for one in (staying, tuned, replace(staying, max_token_num=5))] == [300, 77, 5]
    assert row_limit(staying) == 77 and row_limit(replace(SPEC, size=4, hidden_size=8192), stays=True) == 1024


class Store(dict):
    def set(self, key, value):
        self[key] = value

    def add(self, key, amount):
        self[key] = self.get(key, 0) + amount
        return self[key]


class Pair:
    hidden_size, dtype, weight_dtype, weight_offset, eps, fp8 = 4096, "bfloat16", "bfloat16", 0.0, 1e-6, None


def open_on_two(monkeypatch, tables, **config):
    """`select_backend` on two ranks, threads here, each with its own table; the backends only record their specs."""
    asked, read = [[], []], threading.local()
    monkeypatch.setattr(backend_selection.paddle_runtime, "device_of", lambda: ("gpu", 90))
    monkeypatch.setattr(backend_selection, "paddle_or_torch", lambda: _Framework)
    monkeypatch.setattr(tuning_table, "read_limits", lambda key, path: tables[read.rank])

    def try_it(name, spec, group, timeout_s):
        asked[group.rank].append((name, spec[0]))
        return object(), None

    monkeypatch.setattr(backend_selection, "_try", try_it)
    store, ended = Store(), [None, None]

    def rank(number):
        read.rank = number
        group = Group("g", number, 2, (0, 1), store)
        ended[number] = backend_selection.select_backend(
            group, [Pair], FusionConfig(timeout_s=5.0, **config), False, 1
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one[1] and str(one[1]) for one in ended[:1]] == [one[1] and str(one[1]) for one in ended[1:]]
    return ended[0], asked[0]


class _Framework:
    class cuda:
        get_device_name = staticmethod(lambda: "GPU X")


def test_bind_takes_order_and_limits_from_the_table(monkeypatch):
    limits = Limits({"triton": 100, "flashinfer": 300}, ("flashinfer", "triton"), 16, 400)
    (got, _, _), asked = open_on_two(monkeypatch, [(limits, None)] * 2)
    assert got.backend == "flashinfer" and got.limit_source == "tuning table" and got.note is None
    assert row_limit(asked[0][1]) == 300 and asked[0][1].two_shot_rows == 16
    assert asked[0][1].tuned_staying_rows == 400


def test_a_path_that_never_wins_is_named_so(monkeypatch):
    (got, _, _), asked = open_on_two(monkeypatch, [(Limits({"triton": 9}, ("triton",)), None)] * 2)
    assert got.backend == "triton" and asked[0][1].two_shot_rows == NEVER


@pytest.mark.parametrize("config", [{}, {"backend": "triton"}, {"strict": True}], ids=str)
def test_where_fusing_never_wins_the_pair_stays_stock(monkeypatch, config):
    (got, reason, ranks), asked = open_on_two(monkeypatch, [(Limits({"triton": 0}, ()), None)] * 2, **config)
    assert got is None and reason.code == "never_wins" and ranks == () and not asked


def test_an_explicit_limit_stands_above_the_table(monkeypatch):
    (got, _, _), asked = open_on_two(monkeypatch, [(Limits({"triton": 0}, ()), None)] * 2, max_token_num=8)
    assert got.limit_source == "max_token_num" and row_limit(asked[0][1]) == 8


def test_ranks_that_read_different_tables_use_none(monkeypatch):
    (got, _, _), asked = open_on_two(monkeypatch, [(LIMITS, None), (None, None)])
    assert got.note.code == "table_differs" and got.limit_source == "built in" and asked[0][1].tuned_rows is None
