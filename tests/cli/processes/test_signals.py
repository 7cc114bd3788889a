"""What comes while a process is started does not leave it alone in the world."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fd_fusion.cli import serve
from fd_fusion.cli.demo import command as demo
from fd_fusion.cli.processes.signals import ending_well, held_back


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_arrives_after_the_block_and_once(number):
    came, done = [], []
    before = signal.signal(number, lambda got, _: came.append((got, list(done))))
    try:
        with held_back():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("started")
        assert came == [(number, ["started"])]
        signal.raise_signal(number)
        assert len(came) == 2, "the handler is back"
    finally:
        signal.signal(number, before)


def test_what_is_ignored_stays_ignored_by_the_child_too():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_back():
            code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        assert out == "True\n"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_it_ends_well(number, code):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        with pytest.raises(SystemExit) as left, ending_well():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert left.value.code == code


def test_under_nohup_a_terminal_that_closes_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_well():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


class Interrupted(subprocess.Popen):
    """Ctrl-C comes when the child exists and Popen has not returned: nobody has its id yet."""

    made: list[int] = []  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made.append(self.pid)
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interrupted(monkeypatch):
    Interrupted.made.clear()
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    return Interrupted.made


def ended(pid):
    """Whether nobody runs under this id. A child that was not waited for counts as running."""
    return not Path(f"/proc/{pid}").exists()


def test_a_rank_of_the_demo_is_ended(interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--hidden-size", "32", "--steps", "1"])
    assert len(interrupted) == 1 and ended(interrupted[0]) and not list(tmp_path.iterdir())


def test_serve_passes_it_on_to_the_server(interrupted, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve, "_plugin_names", lambda: [serve.PLUGIN])
    monkeypatch.setattr(serve, "SERVER", "timeit")  # of the standard library: runs until it is told to end
    kept = {number: signal.getsignal(number) for number in serve._PASSED_ON}
    try:
        assert serve.main(["-n", "1", "-r", "1", "import time; time.sleep(60)"]) in (130, 1)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert len(interrupted) == 1 and ended(interrupted[0])
