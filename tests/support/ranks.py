"""Ranks as plain processes: the test's side (`run_ranks`) and the rank script's side (`this_group`)."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_RANK, _SIZE, _STORE = "FD_TEST_RANK", "FD_TEST_SIZE", "FD_TEST_STORE"


@dataclass
class Ended:
    """How a rank ended: its exit status (negative for a signal) and everything that it printed."""

    status: int
    text: str


def run_ranks(script, size, *args, timeout_s=60, env=None):
    """Run `tests/dist/<script>` as `size` processes over a store of their own. Returns `Ended` by rank.

    Whatever is still running after `timeout_s` is killed, and its status is then -9.
    """
    with tempfile.TemporaryDirectory(prefix="fd_fusion_test_") as folder:
        outputs = [open(f"{folder}/out.{rank}", "w+") for rank in range(size)]  # noqa: SIM115
        ranks = []
        for rank in range(size):
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            own = {_RANK: str(rank), _SIZE: str(size), _STORE: f"{folder}/store", "PYTHONPATH": path}
            command = [sys.executable, "-W", "ignore", str(ROOT / "tests/dist" / script), *map(str, args)]
            ranks.append(
                subprocess.Popen(
                    command,
                    stdout=outputs[rank],
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **own, **(env or {})},
                )
            )
        deadline = time.monotonic() + timeout_s
        for process in ranks:
            try:
                process.wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        ended = []
        for process, output in zip(ranks, outputs):
            output.seek(0)
            ended.append(Ended(process.returncode, output.read()))
            output.close()
        return ended


def this_group(name="test", ranks=None):
    """The group of this script: of `run_ranks`, or of paddle.distributed.launch. `ranks`: a sub-group."""
    from fd_fusion.cli.ranks import FolderStore
    from fd_fusion.comm.group import Group

    if _RANK in os.environ:
        rank, size, store = int(os.environ[_RANK]), int(os.environ[_SIZE]), FolderStore(Path(os.environ[_STORE]))
    else:
        rank, size, store = _launched()
    ranks = tuple(range(size)) if ranks is None else tuple(ranks)
    return Group(name, ranks.index(rank), len(ranks), ranks, store)


def this_rank():
    return int(os.environ.get(_RANK, os.environ.get("PADDLE_TRAINER_ID", "0")))


def _launched():
    os.environ.setdefault("PADDLE_DISTRI_BACKEND", "gloo")
    import paddle.distributed as dist

    from fd_fusion import runtime

    dist.init_parallel_env()
    return dist.get_rank(), dist.get_world_size(), runtime.tcp_store()
