"""Start a rank script as real processes, and judge it by its ranks' result files and its exit codes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fd_fusion.cli.processes.ranks import free_ports

ROOT = Path(__file__).parents[2]
OUT = "FD_FUSION_TEST_OUT"
PYTHON = [sys.executable, "-W", "ignore"]


def ranks(script: str, nproc: int, out: Path, *args: str, timeout_s: float = 240, env: dict | None = None) -> list:
    """Run tests/dist/`script` on `nproc` ranks, with the variables of Paddle's launcher and without that process.

    The launcher imports Paddle too, and sleeps around its ranks: some seconds a test. Returns what each rank
    recorded, in rank order. Fails unless every rank ends with 0 and records a result; then shows the end of all logs.
    """
    master, *ports = free_ports(1 + nproc)
    ends = [f"127.0.0.1:{port}" for port in ports]
    job = {
        "PADDLE_MASTER": f"127.0.0.1:{master}",
        "PADDLE_TRAINERS_NUM": str(nproc),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(ends),
    }
    of_ranks = [
        {**job, "PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": end, "PADDLE_LOCAL_RANK": str(rank)}
        for rank, end in enumerate(ends)
    ]
    command = [*PYTHON, str(ROOT / "tests/dist" / script), *args]
    return _run([(command, {**(env or {}), **one}) for one in of_ranks], script, nproc, out, timeout_s)


def launch(script: str, nproc: int, out: Path, *args: str, timeout_s: float = 240, env: dict | None = None) -> list:
    """The same under paddle.distributed.launch."""
    command = [*PYTHON, "-m", "paddle.distributed.launch", "--nproc_per_node", str(nproc)]
    command += ["--log_dir", str(out / "log"), str(ROOT / "tests/dist" / script), *args]
    return _run([(command, env or {})], script, nproc, out, timeout_s)


def spawn(script: str, nproc: int, out: Path, timeout_s: float = 240) -> list:
    """The same for a script that starts its `nproc` ranks itself."""
    return _run([([*PYTHON, str(ROOT / "tests/dist" / script)], {})], script, nproc, out, timeout_s)


def _run(commands: list[tuple[list[str], dict]], script: str, nproc: int, out: Path, timeout_s: float) -> list:
    """Run the commands until all have ended, one has failed, or time is up; then end their process groups."""
    full = {**os.environ, "PYTHONPATH": str(ROOT), OUT: str(out), "PADDLE_DISTRI_BACKEND": "gloo"}
    (out / "log").mkdir(exist_ok=True)
    processes, deadline = [], time.monotonic() + timeout_s
    try:
        for number, (command, env) in enumerate(commands):
            with open(out / "log" / f"process.{number}", "w") as log:
                how = {"stdout": log, "stderr": log, "start_new_session": True, "cwd": out}
                processes.append(subprocess.Popen(command, env={**full, **env}, **how))
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.returncode for process in processes):
                break
            time.sleep(0.02)
        codes = [process.returncode for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    files = [out / f"rank{rank}.json" for rank in range(nproc)]
    missing = [rank for rank, file in enumerate(files) if not file.exists()]
    assert not any(codes) and None not in codes and not missing, (
        f"{script}: exit codes {codes} (None: not done in {timeout_s} s), no result of ranks {missing}\n{tails(out)}"
    )
    return [json.loads(file.read_text()) for file in files]


def tails(out: Path, lines: int = 25) -> str:
    """The last lines of every log of a run."""
    logs = sorted((out / "log").glob("*.[0-9]*"))
    return "\n".join(
        f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in logs if log.exists()
    )
