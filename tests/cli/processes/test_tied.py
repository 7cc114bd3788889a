"""What is started ends with whoever started it, and what a killed run leaves is removed by the next."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

from fd_fusion.cli.processes import ranks, run_folder, tied

ROOT = Path(__file__).parents[3]
STARTS = """
import subprocess, sys
from fd_fusion.cli.processes.tied import child_environment
command = [sys.executable, "-m", "fd_fusion.cli.processes.tied", sys.executable, "-c", sys.argv[1]]
child = subprocess.Popen(command, env=child_environment())
child.wait()
"""
WAITS = "import os, time; print(os.getpid(), os.environ['FD_FUSION_PARENT'], flush=True); time.sleep(60)"
OWNS = """
import time
from fd_fusion.cli.processes.run_folder import run_folder
with run_folder("x_") as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def start(code, *args, **variables):
    argv = [sys.executable, "-c", code, *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True)


def test_a_child_ends_with_its_parent():
    parent = start(STARTS, WAITS)
    child, told = parent.stdout.readline().split()
    assert told == child, "what the command starts may be tied to it"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_parent_that_was_gone_before():
    argv = [sys.executable, "-m", "fd_fusion.cli.processes.tied", sys.executable, "-c", "print(1)"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for parent, code, out in ((os.getpid(), 0, "1\n"), (os.getppid(), 1, "")):
        run = subprocess.run(argv, env={**env, tied.PARENT: str(parent)}, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (code, out), run.stderr


def test_a_child_is_no_part_of_a_job_around_it():
    around = {
        "PADDLE_NNODES": "2",
        "PADDLE_TRAINER_ID": "1",
        "MASTER_ADDR": "x",
        "POD_IP": "x",
        "FLAGS_use_mkldnn": "1",
    }
    env = tied.child_environment({**around, "PATH": "/bin", "PYTHONPATH": "/p"})
    assert env == {
        "FLAGS_use_mkldnn": "1",
        "PATH": "/bin",
        "PYTHONPATH": f"{ROOT}{os.pathsep}/p",
        tied.PARENT: str(os.getpid()),
    }


def test_the_next_run_removes_the_folder_of_a_killed_one(tmp_path, monkeypatch):
    killed, living = (start(OWNS, TMPDIR=str(tmp_path)) for _ in range(2))
    try:
        first, second = (Path(one.stdout.readline().strip()) for one in (killed, living))
        killed.kill()
        killed.wait()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (tmp_path / "fd_fusion_of_somebody").mkdir()
        with run_folder.run_folder() as folder:
            assert folder.is_dir() and second.is_dir() and not first.exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["fd_fusion_of_somebody", second.name])
    finally:
        for one in (killed, living):
            one.send_signal(signal.SIGKILL)
            one.wait()


def test_a_full_disk_is_told_before_a_rank_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=4096))
    monkeypatch.setattr(ranks, "_start", None)
    with pytest.raises(OSError, match="no room for a run; set TMPDIR"):
        ranks.run_ranks("doctor.rank", 2, {}, timeout_s=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_a_block_that_fails_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyError), run_folder.run_folder():
        raise KeyError
    assert not list(tmp_path.iterdir())
