"""Ranks as plain processes of this machine, for `doctor` and `tune`: start them, hear them, leave nothing behind.

No launcher and no port: the ranks vote through a folder of files, and tell their parent the same way. A rank ends
with its parent, whatever ends that one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fd_fusion.cli.processes.run_folder import run_folder
from fd_fusion.cli.processes.signals import held_back, undisturbed
from fd_fusion.cli.processes.tied import child_environment, end_with_parent
from fd_fusion.comm.folder_store import FolderStore, write_whole
from fd_fusion.comm.group import Group
from fd_fusion.comm.posix_shm import remove_left

_POLL_S = 0.02


class RanksFailed(RuntimeError):
    """The ranks came to no result: one sentence that names a rank. `log` is the end of what it wrote."""

    def __init__(self, sentence: str, log: str = ""):
        super().__init__(sentence)
        self.log = log


def run_ranks(
    module: str, size: int, job: dict[str, Any], *, timeout_s: float, env: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Run `main` of `fd_fusion.cli.<module>` on `size` ranks. Returns what each gave to `rank_main`, in rank order.

    Raises: RanksFailed: a rank died, failed, or was not done after `timeout_s`. No process and no file is left.
    """
    processes: list[subprocess.Popen] = []
    with run_folder() as folder:
        since = folder.stat().st_ctime
        try:
            (folder / "job.json").write_text(json.dumps({**job, "size": size}))
            for rank in range(size):
                with held_back():
                    processes.append(_start(module, folder, rank, env or {}))
            _watch(processes, folder, timeout_s)
            return [json.loads((folder / f"result.{rank}").read_text()) for rank in range(size)]
        finally:
            with undisturbed():
                for process in processes:
                    process.kill()  # does nothing to one that has ended
                for process in processes:
                    process.wait()
                remove_left(since)


def rank_main(run: Callable[[dict[str, Any], Group], dict[str, Any]]) -> int:
    """The rank's side: read the job, run it, tell the result or one sentence of error. Returns the exit code."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    end_with_parent()
    job = json.loads((folder / "job.json").read_text())
    group = Group("cli", rank, job["size"], tuple(range(job["size"])), FolderStore(folder / "store"))
    try:
        result = run(job, group)
    except Exception as error:  # told to the parent in one sentence; the trace stays in the log
        traceback.print_exc()
        text = str(error) or type(error).__name__
        write_whole(folder / f"error.{rank}", text.strip().splitlines()[0])
        return 1
    write_whole(folder / f"result.{rank}", json.dumps(result))
    return 0


def _start(module: str, folder: Path, rank: int, env: dict[str, str]) -> subprocess.Popen:
    with open(folder / f"log.{rank}", "wb") as log:
        full = {**child_environment(), "OMP_NUM_THREADS": "1", **env}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return subprocess.Popen(_command(module, folder, rank), env=full, cwd=folder, **pipes)


def _command(module: str, folder: Path, rank: int) -> list[Any]:
    return [sys.executable, "-W", "ignore", "-m", f"fd_fusion.cli.{module}", folder, str(rank)]


def _watch(processes: list[subprocess.Popen], folder: Path, timeout_s: float) -> None:
    """Wait for all to end well. A rank that died without a word is named before those that told an error."""
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        told = {r: p for r in range(len(codes)) if (p := folder / f"error.{r}").exists()}
        for rank, code in enumerate(codes):
            if code and rank not in told:
                raise RanksFailed(f"rank {rank} died {_cause(code)}", _tail(folder, rank))
        if told:
            rank = min(told, key=lambda r: told[r].stat().st_mtime_ns)
            text = told[rank].read_text().removeprefix("fd_fusion: ")
            raise RanksFailed(f"rank {rank} failed: {text}", _tail(folder, rank))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            left = [rank for rank, code in enumerate(codes) if code is None]  # one of them holds the others up
            who = f"rank {left[0]} was" if len(left) == 1 else f"ranks {', '.join(map(str, left))} were"
            raise RanksFailed(f"{who} not done within {timeout_s:g} s", _tail(folder, left[0]))
        time.sleep(_POLL_S)


def _cause(code: int) -> str:
    return f"of {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _tail(folder: Path, rank: int, lines: int = 8) -> str:
    text = (folder / f"log.{rank}").read_text(errors="replace")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
