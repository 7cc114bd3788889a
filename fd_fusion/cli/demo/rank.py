"""What one rank of the demo runs: `rank.py RUN_DIR`, under paddle.distributed.launch.

It talks with the parent through files in RUN_DIR alone, each written whole: its pid, its progress, and at the end
its result or the sentence of its error. Both read `run.json` (what to do) and `tokens.json` (what to feed in).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fd_fusion.cli.processes.ranks import write_whole
from fd_fusion.cli.processes.tied import end_with_parent


def units(steps: int) -> int:
    """How many units of progress a rank reports: start, load, two runs of 1 + steps forwards, bind."""
    return 3 + 2 * (1 + steps)


class Progress:
    """The number of units done, in a file of this rank."""

    def __init__(self, folder: Path, rank: int):
        self._path, self._done = folder / f"progress.{rank}", 0

    def step(self) -> None:
        self._done += 1
        write_whole(self._path, str(self._done))


def main(folder: Path) -> int:
    end_with_parent()  # the launcher
    rank = int(os.environ.get("PADDLE_TRAINER_ID", "0"))
    write_whole(folder / f"pid.{rank}", str(os.getpid()))
    if (folder / "stop").exists():  # the parent ended the run before it could see our pid
        return 1
    try:
        _run(folder, rank)
    except Exception as error:  # told to the parent in one sentence; the trace stays in the log
        traceback.print_exc()
        text = str(error) if isinstance(error, (ValueError, RuntimeError)) else repr(error)
        write_whole(folder / f"error.{rank}", (text.strip().splitlines() or [repr(error)])[-1])
        return 1
    return 0


def _run(folder: Path, rank: int) -> None:
    from fd_fusion.frameworks.paddle_runtime import require_paddle

    paddle = require_paddle()
    import paddle.distributed as dist

    from fd_fusion.cli.demo.checkpoint import Checkpoint
    from fd_fusion.cli.demo.model import load_model

    job, progress = json.loads((folder / "run.json").read_text()), Progress(folder, rank)
    paddle.set_device("cpu")
    if job["nproc"] > 1:
        dist.init_parallel_env()
    progress.step()
    model = load_model(Checkpoint(Path(job["checkpoint"])))
    progress.step()
    with paddle.no_grad():
        result = _compare_runs(model, job, _wait_for_tokens(folder), progress)
    if job["nproc"] > 1:
        dist.barrier()  # the store lives on rank 0: no rank may leave while another one needs it
    write_whole(folder / f"result.{rank}", json.dumps(result))


def _wait_for_tokens(folder: Path) -> list[int]:
    path = folder / "tokens.json"
    while not path.exists():
        time.sleep(0.02)
    return json.loads(path.read_text())


def _compare_runs(model: Any, job: dict, tokens: list[int], progress: Progress) -> dict[str, Any]:
    """Stock run, bind, bound run, unbind; the weights are looked at all along."""
    from fd_fusion import FusionConfig, bind, check, unbind

    before = fingerprint(model)
    stock = decode(model, tokens, job["prompt_len"], progress)
    report = bind(
        model, FusionConfig.from_dict(job["config"]), example=lambda: two_rows(model, tokens), source="demo"
    )
    bound_weights = fingerprint(model)
    progress.step()
    counts = [line.calls.copy() for line in report.sites]
    bound = decode(model, tokens, job["prompt_len"], progress)
    check()
    told = report.to_dict()
    for site, line, count in zip(told["sites"], report.sites, counts):
        site["calls"] = dict(line.calls - count)
    unbind(model)
    return {
        "report": told,
        "weights": {"bound": bound_weights == before, "unbound": fingerprint(model) == before},
        "stock": stock,
        "bound": bound,
    }


def two_rows(model: Any, tokens: list[int]) -> tuple[Any, ...]:
    """A forward of two rows on a cache of its own: bind's proving pass."""
    import paddle

    from fd_fusion.cli.demo.model import KVCache

    return (model(paddle.to_tensor((tokens * 2)[:2]), KVCache(model.config.num_hidden_layers)),)


def decode(model: Any, tokens: list[int], prompt_len: int, progress: Progress) -> dict[str, Any]:
    """Prefill, then a step for each further token. Logits [1 + steps, vocabulary] as float32 in hex, times in ms."""
    import numpy as np
    import paddle

    from fd_fusion.cli.demo.model import KVCache

    cache, logits, times = KVCache(model.config.num_hidden_layers), [], []
    for part in [tokens[:prompt_len], *([token] for token in tokens[prompt_len:])]:
        start = time.perf_counter()
        logits.append(model(paddle.to_tensor(part), cache)[-1].numpy())
        times.append(1e3 * (time.perf_counter() - start))
        progress.step()
    return {"logits": np.stack(logits).tobytes().hex(), "ms": times}


def fingerprint(model: Any) -> dict[str, list[Any]]:
    """Identity, dtype, shape and a hash of the bits of every weight, by its key in the state dict."""
    return {
        key: [id(weight), str(weight.dtype), list(weight.shape), hashlib.sha256(weight.numpy().tobytes()).hexdigest()]
        for key, weight in model.state_dict().items()
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
