"""`tune` on fewer GPUs than ranks: N virtual ranks in one process, without a link and without a rival."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from fd_fusion.cli.ranks import rank_main
from fd_fusion.comm.group import Group

_MOST_ROWS = 64  # of all ranks together: more programs do not run at once, and would wait for ever
_NODES = 96  # kernels in a graph


def run(job: dict[str, Any], group: Group) -> dict[str, Any]:
    """Returns what a rank of `tune_rank` does. The only process of `group` holds all virtual ranks."""
    import torch

    from fd_fusion.cli import virtual_ranks

    size, hidden, dtype = job["ranks"], job["hidden_size"], job["dtype"]
    times: dict[str, dict[int, float]] = {}
    library, why = _flashinfer()
    for rows in [t for t in job["rows"] if t * size <= _MOST_ROWS]:
        case = virtual_ranks.Case(size, rows, hidden, dtype)
        graphs = {}
        for column in ("one_shot", "two_shot", *(["flashinfer"] if library else [])):
            launch = _launch(column, case, library)
            virtual_ranks.capture(size, [launch]).replay()
            torch.cuda.synchronize()
            if not max(case.errors()) < 0.01:  # every rounding of a half is far below, every fault far above
                raise RuntimeError(f"{column} at T={rows}: wrong numbers, relative errors {case.errors()}")
            graphs[column] = virtual_ranks.capture(size, [launch] * (_NODES // size // 3))
        medians = virtual_ranks.interleaved_us(list(graphs.values()), _NODES // size // 3, job["rounds"])
        for column, time in zip(graphs, medians):
            times.setdefault(column, {})[rows] = time
    skipped = {"unfused": "NCCL refuses several ranks on one GPU", **({} if library else {"flashinfer": why})}
    return {"times": times, "skipped": skipped, "gpu": torch.cuda.get_device_name(), "framework": "torch"}


def _launch(column: str, case: Any, library: str | None) -> Callable[[int], Any]:
    from fd_fusion.cli import virtual_ranks
    from fd_fusion.kernels.plan import plan_for

    shape = case.size, case.rows, case.hidden_size, case.dtype
    if column == "flashinfer":
        return virtual_ranks.FlashInferRanks(library, *shape).prepare(case)
    plan = plan_for(case.size, case.hidden_size, case.dtype)
    ranks = virtual_ranks.VirtualRanks(plan, min(case.rows, _MOST_ROWS // case.size))
    return ranks.prepare(case, two_shot=column == "two_shot")


def _flashinfer() -> tuple[str | None, str]:
    """FlashInfer's compiled kernel, or why there is none."""
    from fd_fusion import runtime_flashinfer

    version = runtime_flashinfer.installed_version()
    path = version and runtime_flashinfer.compiled_module(version)
    if path and importlib.util.find_spec("tvm_ffi"):
        return str(path), ""
    return (
        None,
        "FlashInfer is not installed" if version is None else "its kernel is not compiled, or tvm_ffi is missing",
    )


if __name__ == "__main__":
    sys.exit(rank_main(run))
