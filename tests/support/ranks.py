"""Ranks as plain processes: the test's side (`run_ranks`) and the rank script's side (`this_group`)."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_RANK, _SIZE, _STORE, _SHM = "FD_TEST_RANK", "FD_TEST_SIZE", "FD_TEST_STORE", "FD_TEST_SHM"


@dataclass
class Ended:
    """How a rank ended: its exit status (negative for a signal) and everything that it printed."""

    status: int
    text: str


def run_ranks(script, size, *args, timeout_s=60, env=None, shm=None):
    """Run `tests/dist/<script>` as `size` processes over a store of their own. Returns `Ended` by rank.

    Whatever is still running after `timeout_s` is killed, and its status is then -9. Their segments of shared memory
    lie in a folder of this run, so that no other run sees them, and none may be left; or in `shm`, to look at.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fd_fusion_test_") as folder,
        tempfile.TemporaryDirectory(prefix="fd_fusion_test_", dir="/dev/shm") as own_shm,
    ):
        outputs = [open(f"{folder}/out.{rank}", "w+") for rank in range(size)]  # noqa: SIM115
        ranks = []
        for rank in range(size):
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            own = {
                _RANK: str(rank),
                _SIZE: str(size),
                _STORE: f"{folder}/store",
                "PYTHONPATH": path,
                _SHM: str(shm or own_shm),
            }
            command = [sys.executable, "-W", "ignore", str(ROOT / "tests/dist" / script), *map(str, args)]
            ranks.append(
                subprocess.Popen(
                    command,
                    stdout=outputs[rank],
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **own, **(env or {})},
                )
            )
        deadline, in_time = time.monotonic() + timeout_s, True
        for process in ranks:
            try:
                process.wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                in_time = False
                process.kill()
                process.wait()
        ended = []
        for process, output in zip(ranks, outputs):
            output.seek(0)
            ended.append(Ended(process.returncode, output.read()))
            output.close()
        assert not (in_time and os.listdir(own_shm)), f"left in shared memory; {ended}"
        return ended


def this_group(name="test", ranks=None):
    """The group of this script: of `run_ranks`, or of paddle.distributed.launch. `ranks`: a sub-group."""
    from fd_fusion.comm import posix_shm
    from fd_fusion.comm.folder_store import FolderStore
    from fd_fusion.comm.group import Group

    if _RANK in os.environ:
        posix_shm.FOLDER = Path(os.environ[_SHM])
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

    from fd_fusion.frameworks import paddle_runtime

    dist.init_parallel_env()
    return dist.get_rank(), dist.get_world_size(), paddle_runtime.tcp_store()
