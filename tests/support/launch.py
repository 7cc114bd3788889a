"""Start a rank script with paddle.distributed.launch, and judge it by its ranks' result files and its exit code."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = "FD_FUSION_TEST_OUT"


def launch(script: str, nproc: int, out: Path, *args: str, timeout_s: float = 240, env: dict | None = None) -> list:
    """Run tests/dist/`script` on `nproc` ranks. Returns what each rank recorded, in rank order.

    Fails unless the launcher's exit code is 0 and every rank recorded a result; then shows the end of every log.
    Ends the whole process group when time is up, so no rank outlives the test.
    """
    command = [sys.executable, "-W", "ignore", "-m", "paddle.distributed.launch", "--nproc_per_node", str(nproc)]
    command += ["--log_dir", str(out / "log"), str(ROOT / "tests/dist" / script), *args]
    return _run(command, script, nproc, out, timeout_s, env)


def spawn(script: str, nproc: int, out: Path, timeout_s: float = 240) -> list:
    """The same for a script that starts its `nproc` ranks itself."""
    return _run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests/dist" / script)], script, nproc, out, timeout_s, {}
    )


def _run(command: list[str], script: str, nproc: int, out: Path, timeout_s: float, env: dict | None) -> list:
    full = {**os.environ, "PYTHONPATH": str(ROOT), OUT: str(out), "PADDLE_DISTRI_BACKEND": "gloo", **(env or {})}
    with open(out / "launcher.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=full, start_new_session=True, cwd=out)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout_s} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    files = [out / f"rank{rank}.json" for rank in range(nproc)]
    missing = [rank for rank, file in enumerate(files) if not file.exists()]
    assert code == 0 and not missing, f"{script}: exit code {code}, no result of ranks {missing}\n{tails(out)}"
    return [json.loads(file.read_text()) for file in files]


def tails(out: Path, lines: int = 25) -> str:
    """The last lines of every log of a run."""
    logs = [out / "launcher.log", *sorted((out / "log").glob("workerlog.*"))]
    return "\n".join(
        f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in logs if log.exists()
    )
