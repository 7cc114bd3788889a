"""The triton backend as real processes over CUDA IPC: one a GPU, and four where there are only one or two GPUs.

Processes that share a GPU do so through MPS, with pipe and log folders of its own; a rank that is to be killed runs
without it, since killing a client of MPS ends the others too.
"""

import os
import re
import signal
import subprocess
import tempfile

import pytest

from tests.dist.compile_only import compile_all
from tests.support.ranks import run_ranks

torch = pytest.importorskip("torch", reason="needs torch on a GPU")
GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU")]
SIZES = [size for size in (2, 4, 8) if size <= max(GPUS, 4)]
UNSHARED = max(size for size in SIZES if size <= max(GPUS, 2))  # without MPS; two take turns on one GPU
TWO_SLICES = (4096, 8192)  # with four ranks a program of two-shot has two slices of a row
KINDS = [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32"), ("float16",) * 2]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Every kernel of this file, compiled at once: otherwise the ranks do little else."""
    kernels = [(size, 1024, *kind) for size in SIZES for kind in KINDS]
    kernels += [(size, hidden, "bfloat16", "bfloat16") for size in SIZES for hidden in (2048, 4096)]
    kernels += [(max(SIZES), hidden, "bfloat16", "bfloat16") for hidden in (2880, 7168)]
    kernels += [(4, hidden, *kind) for hidden in TWO_SLICES for kind in KINDS]
    compile_all(kernels)


def room(size):
    # Programs of all ranks of a GPU must run at once: a small workspace keeps them few.
    return "--workspace_mb", 1 if size > GPUS else 32


@pytest.fixture(scope="module")
def mps():
    """The environment in which several processes use one GPU at the same time."""
    if max(SIZES) <= GPUS:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="fd_fusion_mps_") as folder:
        env = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in env.values():
            os.mkdir(path)
        control = ["nvidia-cuda-mps-control"]
        subprocess.run([*control, "-d"], env={**os.environ, **env}, check=True, timeout=30)
        yield env
        subprocess.run(control, input="quit\n", text=True, env={**os.environ, **env}, timeout=60)


def agreed(script, size, *args, mps, timeout_s=120):
    env = mps if size > GPUS else {}
    ended = run_ranks(script, size, *args, "--device", "gpu", *room(size), env=env, timeout_s=timeout_s)
    text = "\n".join(rank.text for rank in ended)
    assert [rank.status for rank in ended] == [0] * size, text
    assert len({re.search("digest (.*)", rank.text)[1] for rank in ended}) == 1, text
    print(ended[0].text)


@pytest.mark.parametrize("size", SIZES)
def test_numbers_payloads_delays_and_several_workspaces(size, mps):
    what = ["numbers", "payload", "delayed", "together", "strange_inputs", "rounds"]
    rows = (1, 3, 0, 15, 17, 150 if size > GPUS else 600, 2)  # 600: two-shot
    agreed("triton_calls.py", size, *what, "--hidden", 1024, "--rows", *rows, mps=mps)


@pytest.mark.parametrize("hidden", TWO_SLICES)
def test_the_same_bits_by_programs_of_one_slice_and_of_two(hidden, mps):
    agreed("triton_calls.py", 4, "numbers", "--hidden", hidden, "--rows", 1, 3, 100, 2, mps=mps)


@pytest.mark.parametrize("hidden", [2880, 7168])
def test_other_hidden_sizes(hidden, mps):
    agreed("triton_calls.py", max(SIZES), "delayed", "--hidden", hidden, mps=mps)


def test_subgroups(mps):
    agreed("triton_calls.py", 4, "subgroups", "--hidden", 4096, mps=mps)


@pytest.mark.parametrize("size", SIZES)
def test_a_hundred_thousand_calls_by_replay(size, mps):
    agreed("replays.py", size, "replays", "--hidden", 4096, mps=mps)


def test_a_residual_that_stays_with_its_owners(mps):
    rows = ("--rows", 3, 46, 130, 7, "--two_shot_rows", 6, "--slots", 24, 64)  # 46 and 130 in 24 slots are rounds
    agreed("triton_calls.py", 4, "stays", "--hidden", 4096, *rows, mps=mps)
    agreed("replays.py", 4, "staying", "--hidden", 4096, "--calls", 30_000, mps=mps)


def test_dependent_launch_changes_no_bit(mps):
    agreed("replays.py", 2, "dependent_launch", "--hidden", 4096, "--calls", 10_000, mps=mps)


def test_paddle_s_driver_object_with_no_torch_to_import(mps):
    agreed("without_torch.py", 2, "without_torch", "--hidden", 1024, mps=mps)


def test_host_time(mps):
    agreed("replays.py", 2, "host_time", "--hidden", 4096, mps=mps)


@pytest.mark.parametrize("what", ["late", "early", "full_memory"])
def test_faults(what):
    agreed("faults.py", UNSHARED, what, "--hidden", 4096, mps={})


@pytest.mark.parametrize("when", ["before", "in", "after"])
def test_survivors_name_a_killed_rank(when):
    args = ("--device", "gpu", "--hidden", 4096, *room(2))
    *survivors, killed = run_ranks("faults.py", 2, f"killed_{when}", *args, timeout_s=90)
    assert killed.status == -signal.SIGKILL, killed.text
    for rank in survivors:
        assert rank.status == 0 and "missing rank 1" in rank.text, rank.text


def test_a_rank_that_exits_in_the_middle_of_a_step():
    args = ("--device", "gpu", "--hidden", 4096, *room(2))
    for rank in run_ranks("faults.py", 2, "exit_in_step", *args, timeout_s=90):
        assert rank.status == 0, rank.text
