"""Signs of life: a silent rank is named, a slow or suspended one is not."""

import ctypes
import signal
import subprocess
import sys
import time

import pytest

from fd_fusion.comm import sentinel, watcher
from fd_fusion.comm.presence import Presence
from tests.support.ranks import run_ranks

LIMIT_S = 6.0


class Ranks:
    """Three ranks in this process, over one memory and one clock."""

    def __init__(self):
        self.now = 100.0
        counts = [ctypes.c_int64() for _ in range(3)]
        self.all = [Presence(counts, rank, (4, 5, 6)) for rank in range(3)]
        self._listen = [one.silence_check(LIMIT_S, lambda: self.now) for one in self.all]

    def run(self, seconds, ranks, step_s=0.01):
        """Let these ranks look every `step_s`. Returns what they said, by rank."""
        said = {}
        for _ in range(round(seconds / step_s)):
            self.now += step_s
            for rank in ranks:
                self.all[rank].beat()
                if reason := self._listen[rank]():
                    said.setdefault(rank, reason)
        return said


def test_a_silent_rank_is_named_by_all_others_and_in_time():
    ranks = Ranks()
    assert not ranks.run(60, [0, 1, 2])
    assert not ranks.run(LIMIT_S - 0.1, [0, 2])
    said = ranks.run(0.2, [0, 2])
    assert set(said) == {0, 2} and all(
        "rank 5 has given no sign of life for 6 s" in str(one) for one in said.values()
    )


def test_a_rank_that_comes_back_in_time_is_not_named():
    ranks = Ranks()
    for _ in range(5):
        assert not ranks.run(LIMIT_S / 2, [0, 2])
        assert not ranks.run(0.1, [0, 1, 2])


def test_a_suspended_machine_is_nobody_s_silence():
    """All stop for an hour, and go on one after the other, within the limit."""
    ranks = Ranks()
    ranks.run(1, [0, 1, 2])
    ranks.now += 3600
    assert not ranks.run(LIMIT_S - 1, [2])
    assert not ranks.run(60, [0, 1, 2])


def test_a_starved_rank_is_not_named_and_names_nobody():
    """Under load a rank looks once in two seconds."""
    ranks = Ranks()
    for _ in range(100):
        assert not ranks.run(2, [0, 2])
        assert not ranks.run(0.01, [1])


def test_who_left_is_not_missing():
    ranks = Ranks()
    ranks.run(1, [0, 1, 2])
    ranks.all[1].leave()
    assert not ranks.run(60, [0, 1, 2]), "nor does it come back"


END = """
import sys, threading
from fd_fusion.comm import watcher
watcher.end_process_on_error({grace})
watcher.watch("page", lambda: "rank 1 is missing", lambda error: print("told", error, flush=True))
threading.Event().wait({wait})
print("alive", flush=True)
"""


@pytest.mark.parametrize("grace, wait, status", [("0.2", 30, watcher.EXIT_STATUS), ("20", 0.5, 0), ("None", 0.5, 0)])
def test_an_error_ends_the_process_behind_the_grace_and_only_where_it_was_asked_for(grace, wait, status):
    code = END.format(grace=grace, wait=wait)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert ended.returncode == status and ended.stdout.startswith("told rank 1 is missing"), ended
    assert ("alive" in ended.stdout) == (status == 0)
    assert ("fd_fusion: rank 1 is missing; this process ends" in ended.stderr) == (status != 0)


def test_a_stopped_process_is_named_to_one_that_holds_the_lock_of_python():
    """And one that goes on in time is not."""
    first, second = run_ranks("presence.py", 2, timeout_s=60)
    assert first.status == -signal.SIGKILL and "rank 1 has given no sign of life for 2 s" in first.text, first.text
    assert "came back" in first.text and "log: ERROR" in first.text and second.status == -signal.SIGKILL


def test_a_kernel_s_error_ends_a_process_that_holds_the_lock_of_python():
    first, second = run_ranks("presence.py", 2, "hangs", timeout_s=60)
    assert first.status == second.status == -signal.SIGKILL
    assert "a fused call ran out of time: op 62, row 0, launch 63, missing rank 1" in first.text, first.text


@pytest.mark.parametrize(
    "number, running", [(signal.SIGSTOP, False), (signal.SIGCONT, True), (signal.SIGKILL, False)]
)
def test_what_runs(number, running):
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert sentinel.is_running(process.pid)
        process.send_signal(number)
        assert any(sentinel.is_running(process.pid) == running or time.sleep(0.01) for _ in range(200))
    finally:
        process.kill()
        process.wait()
    assert not sentinel.is_running(process.pid)
