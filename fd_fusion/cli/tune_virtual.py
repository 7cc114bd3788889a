"""`tune` on fewer GPUs than ranks: N virtual ranks in one process, without a link and without a rival."""

from __future__ import annotations

import sys
from typing import Any

from fd_fusion.cli.ranks import rank_main
from fd_fusion.comm.group import Group

_CALLS = 8
_LARGEST = 64  # rows; every program of every virtual rank must find room at once
_WHY = "NCCL refuses several ranks on one GPU"


def run(job: dict[str, Any], group: Group) -> dict[str, Any]:
    """Returns what a rank of `tune_rank` does."""
    import torch

    from fd_fusion.cli import virtual_ranks
    from fd_fusion.kernels import plan as plans

    size = job["ranks"]
    plan = plans.plan_for(size, job["hidden_size"], job["dtype"])
    room = torch.cuda.get_device_properties(0).multi_processor_count // (2 * size * plan.split)
    programs = plans.most_programs(plan, workspace_bytes=job["workspace_mb"] << 20, multiprocessors=room * plan.split)
    times: dict[str, dict[int, float]] = {"one_shot": {}, "two_shot": {}}
    for rows in [t for t in job["rows"] if t <= _LARGEST]:
        case = virtual_ranks.Case(size, rows, job["hidden_size"], job["dtype"])
        ranks = virtual_ranks.VirtualRanks(plan, programs)
        graphs = {}
        for column in times:
            launch = ranks.prepare(case, two_shot=column == "two_shot")
            virtual_ranks.capture(size, [launch]).replay()
            torch.cuda.synchronize()
            worst = max(case.errors())
            if any(ranks.failures()) or not worst <= 2.0**-6:
                raise RuntimeError(f"{column} at T={rows}: wrong numbers, relative error {worst:.1e}")
            graphs[column] = virtual_ranks.capture(size, [launch] * _CALLS)
        for column, time in zip(graphs, virtual_ranks.interleaved_us(list(graphs.values()), _CALLS)):
            times[column][rows] = time
    skipped = {"unfused": _WHY, "flashinfer": "see `python -m fd_fusion bench`"}
    return {"times": times, "skipped": skipped, "gpu": torch.cuda.get_device_name(), "framework": "torch"}


if __name__ == "__main__":
    sys.exit(rank_main(run))
