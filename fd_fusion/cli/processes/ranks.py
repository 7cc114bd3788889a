"""Start ranks as processes of this machine, for `doctor`, `tune` and `demo`, and name the one that fails.

No launcher: the ranks vote through a folder of files, and write progress, error and result there. The kernel ends a
rank with its parent, whatever ends that one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fd_fusion.cli.processes.run_folder import run_folder
from fd_fusion.cli.processes.signals import held_back, undisturbed
from fd_fusion.cli.processes.tied import child_environment, end_with_parent
from fd_fusion.comm.folder_store import FolderStore, write_whole
from fd_fusion.comm.group import Group
from fd_fusion.comm.posix_shm import remove_left

_POLL_S = 0.02


class RanksFailed(RuntimeError):
    """The ranks came to no result: one sentence that names a rank. `log` is the end of that rank's log."""

    def __init__(self, sentence: str, log: str = ""):
        super().__init__(sentence)
        self.log = log

    def with_log(self) -> str:
        lines = [f"    {line}" for line in self.log.splitlines()]
        return "\n".join([f"{self}; its log ends with", *lines]) if lines else str(self)


def run_ranks(
    module: str,
    size: int,
    job: dict[str, Any],
    *,
    timeout_s: float,
    env: dict[str, str] | None = None,
    watch: Callable[[int], object] = lambda done: None,
) -> list[dict[str, Any]]:
    """Run `main` of `fd_fusion.cli.<module>` on `size` ranks. Returns what each gave to `rank_main`, in rank order.

    `watch` is called again and again with the number of steps that every rank has done.
    Raises: RanksFailed: a rank died, failed, or none made a step for `timeout_s`. No process and no file is left.
    """
    processes: list[subprocess.Popen] = []
    with run_folder() as folder:
        since = folder.stat().st_ctime
        try:
            (folder / "job.json").write_text(json.dumps({**job, "size": size}))
            for rank in range(size):
                with held_back():
                    processes.append(_start(module, folder, rank, env or {}))
            _wait(processes, folder, timeout_s, watch)
            return [json.loads((folder / f"result.{rank}").read_text()) for rank in range(size)]
        finally:
            with undisturbed():
                for process in processes:
                    process.kill()  # does nothing to one that has ended
                for process in processes:
                    process.wait()
                remove_left(since)


def rank_main(run: Callable[[dict[str, Any], Group], dict[str, Any]]) -> NoReturn:
    """Read this rank's job, run it, write the result or one sentence of error, and end this process.

    At once: a framework that takes its process group apart while another rank is gone may abort.
    """
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    end_with_parent()
    job = json.loads((folder / "job.json").read_text())
    group = Group("cli", rank, job["size"], tuple(range(job["size"])), FolderStore(folder / "store"))
    code = 0
    try:
        write_whole(folder / f"result.{rank}", json.dumps(run(job, group)))
    except Exception as error:  # the parent reads one sentence; the trace stays in the log
        traceback.print_exc()
        text = str(error).strip() if isinstance(error, (ValueError, RuntimeError)) else ""
        write_whole(folder / f"error.{rank}", (text or repr(error)).splitlines()[0])
        code = 1
    sys.stdout.flush()
    os._exit(code)


class Progress:
    """The number of steps that this rank has done, in a file that the parent reads."""

    def __init__(self) -> None:
        self._path, self._done = Path(sys.argv[1], f"progress.{sys.argv[2]}"), 0

    def step(self, to: int | None = None) -> None:
        """Count one step, or set the number of steps."""
        self._done = self._done + 1 if to is None else to
        write_whole(self._path, str(self._done))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def join_paddle(rank: int, size: int, ports: list[int], backend: str) -> None:
    """Set what Paddle's launcher would set for this rank, and open Paddle's process group. `ports`: 1 + size."""
    import paddle.distributed as dist

    ends = [f"127.0.0.1:{port}" for port in ports[1 : 1 + size]]
    os.environ.update(
        PADDLE_TRAINER_ID=str(rank),
        PADDLE_TRAINERS_NUM=str(size),
        PADDLE_TRAINER_ENDPOINTS=",".join(ends),
        PADDLE_CURRENT_ENDPOINT=ends[rank],
        PADDLE_MASTER=f"127.0.0.1:{ports[0]}",
        PADDLE_DISTRI_BACKEND=backend,
        FLAGS_selected_gpus=str(rank),
    )
    dist.init_parallel_env()


def _start(module: str, folder: Path, rank: int, env: dict[str, str]) -> subprocess.Popen:
    with open(folder / f"log.{rank}", "wb") as log:
        full = {**child_environment(), "OMP_NUM_THREADS": "1", **env}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return subprocess.Popen(_command(module, folder, rank), env=full, cwd=folder, **pipes)


def _command(module: str, folder: Path, rank: int) -> list[Any]:
    return [sys.executable, "-W", "ignore", "-m", f"fd_fusion.cli.{module}", folder, str(rank)]


def _wait(processes: list[subprocess.Popen], folder: Path, timeout_s: float, watch: Callable[[int], object]) -> None:
    """Wait for all to end well. A rank that died without an error is named before those that wrote one."""
    ranks, moved, last = range(len(processes)), time.monotonic(), [0] * len(processes)
    while True:
        codes = [process.poll() for process in processes]
        errors = {r: path for r in ranks if (path := folder / f"error.{r}").exists()}
        for rank, code in enumerate(codes):
            if code and rank not in errors:
                raise RanksFailed(f"rank {rank} died {_cause(code)}", _tail(folder, rank))
        if errors:
            rank = min(errors, key=lambda r: errors[r].stat().st_mtime_ns)
            text = errors[rank].read_text().removeprefix("fd_fusion: ")
            raise RanksFailed(f"rank {rank} failed: {text}", _tail(folder, rank))
        if all(code == 0 for code in codes):
            return
        done = [int(path.read_text()) if (path := folder / f"progress.{r}").exists() else 0 for r in ranks]
        watch(min(done))
        if done != last:
            moved, last = time.monotonic(), done
        if time.monotonic() - moved > timeout_s:
            raise _no_progress(processes, done, timeout_s, folder)
        time.sleep(_POLL_S)


def _no_progress(processes: list[subprocess.Popen], done: list[int], timeout_s: float, folder: Path) -> RanksFailed:
    """Name the ranks that are stopped, or those that are furthest behind: they hold the others up."""
    running = [rank for rank, process in enumerate(processes) if process.returncode is None]
    stopped = [rank for rank in running if _is_stopped(processes[rank])]
    named = stopped or [rank for rank in running if done[rank] == min(done[r] for r in running)]
    who = f"rank {named[0]} was" if len(named) == 1 else f"ranks {', '.join(map(str, named))} were"
    how = "stopped" if stopped else "not done"
    return RanksFailed(f"{who} {how}: no rank made a step for {timeout_s:g} s", _tail(folder, named[0]))


def _is_stopped(process: subprocess.Popen) -> bool:
    """Return whether a signal stopped the process, as SIGSTOP does. The process's end stays for `poll` to read."""
    with contextlib.suppress(ChildProcessError):  # it has ended meanwhile
        return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def _cause(code: int) -> str:
    return f"of {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _tail(folder: Path, rank: int, lines: int = 8) -> str:
    text = (folder / f"log.{rank}").read_text(errors="replace")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
