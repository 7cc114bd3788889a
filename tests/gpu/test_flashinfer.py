"""The flashinfer backend on one GPU: virtual ranks in one process, and ranks as processes over CUDA IPC under MPS.

The releases to run come from FD_FUSION_TEST_FLASHINFER, folders to put on sys.path, separated by ":"; without it,
the installed one runs. Every group of cases is a child under a time limit, since a hang on a GPU has no other end.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fd_fusion.comm.watcher import EXIT_STATUS
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
RELEASES = [path and os.path.abspath(path) for path in os.environ.get("FD_FUSION_TEST_FLASHINFER", "").split(":")]
EAGER = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}


def _gpus():
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_gpus() == 0, reason="needs torch and a GPU"),
    pytest.mark.skipif(RELEASES == [""] and not importlib.util.find_spec("flashinfer"), reason="needs FlashInfer"),
]


def environment(release):
    path = ":".join(filter(None, (release, str(ROOT), os.environ.get("PYTHONPATH", ""))))
    own = {"FLASHINFER_WORKSPACE_BASE": release} if release else {}
    return {**os.environ, **EAGER, **own, "PYTHONPATH": path}


def child(release, *args, timeout_s=120):
    command = [
        "timeout",
        "-k",
        "2",
        str(timeout_s),
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "tests/gpu/flashinfer_child.py"),
    ]
    done = subprocess.run([*command, *map(str, args)], env=environment(release), capture_output=True, text=True)
    print(done.stdout)
    return done


@pytest.mark.parametrize("release", RELEASES)
def test_virtual_ranks(release):
    done = child(release, "virtual:2", "virtual:4", "virtual:8", "two_shot:2")
    assert done.returncode == 0, done.stderr


def test_a_replay_without_its_peer_ends_the_process():
    done = child(RELEASES[0], "hang", timeout_s=60)
    assert done.returncode == EXIT_STATUS, (done.returncode, done.stdout, done.stderr)
    assert "replaying alone" in done.stdout and "of group 'virtual', rank 0 of 2, has waited" in done.stderr


@pytest.fixture(scope="module")
def mps(tmp_path_factory):
    """NVIDIA MPS with folders of its own: without it processes on one GPU take turns of milliseconds."""
    if _gpus() > 1:
        yield {}
        return
    folder = tmp_path_factory.mktemp("mps")
    env = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
    if shutil.which("nvidia-cuda-mps-control") is None:
        yield {}
        return
    for path in env.values():
        os.mkdir(path)
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env={**os.environ, **env}, check=True, timeout=30)
    yield env
    subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True, env={**os.environ, **env}, timeout=30)


@pytest.mark.parametrize("release", RELEASES)
def test_processes_over_cuda_ipc(release, mps):
    versus = ["versus"] if release == RELEASES[0] else []  # compiling takes a while
    ended = run_ranks(
        "../gpu/flashinfer_child.py", 2, "process", *versus, timeout_s=90, env={**environment(release), **mps}
    )
    for rank in ended:
        print(rank.text)
    assert all(rank.status == 0 for rank in ended), [rank.text for rank in ended]
