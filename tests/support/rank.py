"""What a rank script needs: start, and record what this rank found."""

import atexit
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

warnings.filterwarnings("ignore")
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
os.environ.setdefault("PADDLE_DISTRI_BACKEND", "gloo")

import paddle
import paddle.distributed as dist


def start() -> tuple[int, int]:
    """Join the job. Returns (rank, number of ranks)."""
    dist.init_parallel_env()
    paddle.set_grad_enabled(False)
    return dist.get_rank(), dist.get_world_size()


def record(**data) -> None:
    """Say that this rank came to its end, and what it saw. Without a parent it is printed."""
    out = os.environ.get("FD_FUSION_TEST_OUT")
    text = json.dumps(data)
    if out is None:
        print(text, flush=True)
        return
    path = Path(out) / f"rank{dist.get_rank()}.json"
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def end(**data) -> NoReturn:
    """Record, run all exit handlers, and leave without the interpreter's own end.

    Three times in some hundred runs of two scripts rank 0 ended by SIGSEGV behind its record; no debugger saw it.
    Rank 0 alone still has a thread there, in C++, that serves Paddle's store (LibUVMasterDaemon). Whatever fails
    before this call ends the script with an error as ever.
    """
    record(**data)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def rank_values(shape, rank: int, seed: int = 0, dtype: str = "float32"):
    """Random numbers that differ by rank and are known on every rank: call it with each rank's number."""
    import numpy as np

    values = np.random.default_rng([seed, rank]).standard_normal(shape).astype("float32")
    return paddle.to_tensor(values).astype(dtype)
