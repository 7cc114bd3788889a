"""A workspace from open to close, in real processes and with no kernel: see tests/dist/workspace.py."""

import signal
import subprocess
import sys
import threading

import pytest

from fd_fusion.comm import watcher
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("what", ["life", "several", "fork", "left_open"])
def test_a_workspace(what):
    for rank in run_ranks("workspace.py", 2, what, timeout_s=90):
        assert rank.status == 0 and rank.text.endswith("end\n"), rank.text


@pytest.mark.parametrize("what", ["lost", "lost_in_reset"])
def test_a_lost_rank_is_named_by_reset(what):
    ended = run_ranks("workspace.py", 2, what, timeout_s=90)
    assert ended[0].status == 0 and ended[1].status == -signal.SIGKILL, ended[0].text


@pytest.mark.parametrize("attempt", [1, 2])
def test_the_watcher_tells_once_and_starts_again(attempt):
    heard, pages, pause = [], {"fine": None, "broken": None}, threading.Event()
    for name in pages:
        watcher.watch(name, lambda name=name: pages[name], lambda error, name=name: heard.append((name, error)))
    pages["broken"] = "late"
    assert any(heard or pause.wait(0.01) for _ in range(300))
    pause.wait(0.05)
    assert heard == [("broken", "late")]
    watcher.unwatch("fine")
    assert any(watcher._thread is None or pause.wait(0.01) for _ in range(300))


def test_no_thread_of_ours_is_left_when_the_interpreter_ends():
    code = """import atexit, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
from fd_fusion.comm import watcher
watcher.watch("key", lambda: None, print)
print(len(threading.enumerate()))"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["2", "['MainThread']"]
