"""One rank of the demo: the decoder stock, bound, and unbound."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from fd_fusion.cli.processes.ranks import Progress, join_paddle, rank_main
from fd_fusion.comm.group import Group


def count_steps(decode_steps: int, quantised: bool) -> int:
    """Count the steps of progress of a rank: start, load, runs of 1 + decode_steps forwards, bind."""
    return 3 + (3 if quantised else 2) * (1 + decode_steps)


def run(job: dict[str, Any], group: Group) -> dict[str, Any]:
    """Return the logits and times of the runs, bind's report, and whether the weights stayed the same."""
    from fd_fusion.frameworks.paddle_runtime import require_paddle
    from fd_fusion.frameworks.tensors import devices

    paddle = require_paddle()
    import paddle.distributed as dist

    from fd_fusion.cli.demo.checkpoint import Checkpoint
    from fd_fusion.cli.demo.model import load_model

    progress, on_gpu = Progress(), job["device"] == "gpu"
    if on_gpu and (count := devices(paddle)[2]) < group.size:
        raise ValueError(f"--device gpu: Paddle sees {count} GPUs, and each of {group.size} ranks needs its own")
    paddle.set_device(f"gpu:{group.rank}" if on_gpu else "cpu")
    if group.size > 1:
        join_paddle(group.rank, group.size, job["ports"], "nccl" if on_gpu else "gloo")
    progress.step()
    model = load_model(Checkpoint(Path(job["checkpoint"]), job["quantised"]))
    progress.step()
    with paddle.no_grad():
        result = _compare_runs(model, job, progress)
    if group.size > 1:
        dist.barrier()  # the store lives on rank 0: no rank may leave while another one needs it
    return result


def _compare_runs(model: Any, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Run the decoder stock, bind it, run it bound, unbind it; compare its weights all along. A quantised one is run
    bound a second time, each norm quantised behind the kernel instead of in it."""
    import paddle

    from fd_fusion import FusionConfig, bind, check, unbind

    before, tokens, config = fingerprint(model), job["tokens"], FusionConfig.from_dict(job["config"])
    stock = decode(model, tokens, job["prompt_len"], progress)
    two_rows = paddle.to_tensor((tokens * 2)[:2])
    report = bind(model, config, example=lambda: model(two_rows, {}), source="demo")
    bound_weights = fingerprint(model)
    progress.step()
    counts = [line.calls.copy() for line in report.sites]
    bound = decode(model, tokens, job["prompt_len"], progress)
    check()
    data = report.to_dict()
    for site, line, count in zip(data["sites"], report.sites, counts):
        site["calls"] = dict(line.calls - count)
    runs = {"stock": stock, "bound": bound}
    if job["quantised"]:
        for line in report.sites:
            line.selected.op.fp8 = ()
        runs["apart"] = decode(model, tokens, job["prompt_len"], progress)
    unbind(model)
    return {
        "report": data,
        "weights": {"bound": bound_weights == before, "unbound": fingerprint(model) == before},
        **runs,
    }


def decode(model: Any, tokens: list[int], prompt_len: int, progress: Progress) -> dict[str, Any]:
    """Prefill, then step for each further token. Logits [1 + steps, vocabulary] as float32 in hex, times in ms."""
    import numpy as np
    import paddle

    cache, logits, times = {}, [], []
    for part in [tokens[:prompt_len], *([token] for token in tokens[prompt_len:])]:
        start = time.perf_counter()
        logits.append(model(paddle.to_tensor(part), cache)[-1].numpy())
        times.append(1e3 * (time.perf_counter() - start))
        progress.step()
    return {"logits": np.stack(logits).tobytes().hex(), "ms": times}


def fingerprint(model: Any) -> dict[str, list[Any]]:
    """Return identity, dtype, shape and a hash of the bits of every weight, by its key in the state dict."""
    return {
        key: [id(weight), str(weight.dtype), list(weight.shape), hashlib.sha256(weight.numpy().tobytes()).hexdigest()]
        for key, weight in model.state_dict().items()
    }


if __name__ == "__main__":
    rank_main(run)
