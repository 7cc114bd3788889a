"""Start the demo's ranks, watch them, and leave nothing behind: no process, no file.

The launcher gives every rank a session of its own, so ending the launcher's process group is not enough: each rank
writes its pid before anything else, and looks for the `stop` file right after. Whichever comes first, it ends. Where
this process is killed, the kernel ends the launcher with it, and the ranks with that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fd_fusion.cli.processes.tied import child_environment
from fd_fusion.comm.posix_shm import remove_left

_POLL_S = 0.02


class RunFailed(RuntimeError):
    """The ranks did not come to a result: one sentence that names the rank, and the end of its log."""


def launch(folder: Path, nproc: int, interpret: bool) -> subprocess.Popen:
    """Start `paddle.distributed.launch` in a session of its own. Everything it writes goes into `folder`."""
    env = {**child_environment(), "PADDLE_DISTRI_BACKEND": "gloo", "OMP_NUM_THREADS": "1"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"  # there is no GPU in this run
    command = [
        sys.executable,
        "-m",
        "fd_fusion.cli.processes.tied",
        sys.executable,
        "-W",
        "ignore",
    ]  # it ends with us
    command += ["-m", "paddle.distributed.launch", "--nproc_per_node", str(nproc)]
    command += ["--log_dir", str(folder / "log"), str(Path(__file__).with_name("rank.py")), str(folder)]
    with (folder / "launcher.log").open("wb") as log:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def watch(launcher: subprocess.Popen, folder: Path, nproc: int, limit_s: float, show: Callable[[int], None]) -> None:
    """Wait until every rank has written its result and ended. `show` gets the progress of the slowest rank.

    Raises: RunFailed: a rank died or failed, or none got on for `limit_s` seconds.
    """
    moved, last = time.monotonic(), -1
    while True:
        ended = launcher.poll() is not None
        left = [rank for rank in range(nproc) if not (folder / f"result.{rank}").exists()]
        _raise_if_failed(folder, left)
        if ended and (left or launcher.returncode):
            raise RunFailed(f"the launcher ended with code {launcher.returncode}{tail(folder / 'launcher.log')}")
        if ended:
            return
        done = [int(_read(folder / f"progress.{rank}") or 0) for rank in range(nproc)]
        show(min(done))
        if sum(done) != last or not (folder / "tokens.json").exists():  # until then they may be waiting for us
            moved, last = time.monotonic(), sum(done)
        elif time.monotonic() - moved > limit_s:
            stopped = [rank for rank in left if _state(int(_read(folder / f"pid.{rank}") or 0)) == "T"]
            rank = min(stopped or left, key=lambda rank: done[rank], default=0)
            how = "is stopped" if stopped else "is behind"
            raise RunFailed(f"no rank got on for {limit_s:g} s; rank {rank} {how}{_log_of(folder, rank)}")
        time.sleep(_POLL_S)


def _raise_if_failed(folder: Path, left: list[int]) -> None:
    """Name the rank that failed first. The others fail after it, with broken connections or ended by the launcher."""
    dead = [rank for rank in left if (pid := _read(folder / f"pid.{rank}")) and not _alive(int(pid))]
    told = [rank for rank in left if (folder / f"error.{rank}").exists()]
    silent = [rank for rank in dead if rank not in told and "Termination signal" not in tail(_log(folder, rank), 50)]
    if silent:
        raise RunFailed(f"rank {silent[0]} died{_log_of(folder, silent[0])}")
    if told:
        rank = min(told, key=lambda rank: (folder / f"error.{rank}").stat().st_mtime_ns)
        raise RunFailed(f"rank {rank} failed: {_read(folder / f'error.{rank}').removeprefix('fd_fusion: ')}")
    if dead:
        raise RunFailed(f"rank {dead[0]} was ended from outside{_log_of(folder, dead[0])}")


def stop(launcher: subprocess.Popen | None, folder: Path) -> None:
    """End the launcher and every rank, by their own ids. Safe when they have ended by themselves."""
    (folder / "stop").touch()
    if launcher is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    pids = [int(path.read_text()) for path in folder.glob("pid.*") if path.suffix != ".part"]
    for pid in filter(_alive, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < end:
        time.sleep(_POLL_S)
    remove_left((folder / "run.json").stat().st_mtime)


def read_results(folder: Path, nproc: int) -> list[dict]:
    return [json.loads((folder / f"result.{rank}").read_text()) for rank in range(nproc)]


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A dead main thread shows as Z while others still hold what the process has open, its locks too.
    return _state(pid) != "Z" or len(_threads(pid)) > 1


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _state(pid: int) -> str:
    """The letter of Linux: R, S, T (stopped), Z (ended) ...; empty where that cannot be had."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].strip()[:1]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _log(folder: Path, rank: int) -> Path:
    return folder / "log" / f"workerlog.{rank}"


def _log_of(folder: Path, rank: int) -> str:
    return tail(_log(folder, rank))


def tail(path: Path, lines: int = 8) -> str:
    """The last lines of a log, indented, behind a heading; says so when there are none."""
    text = [line for line in _read(path).splitlines() if line.strip()][-lines:]
    return "; its log ends with\n" + "\n".join(f"    {line}" for line in text) if text else "; its log is empty"
