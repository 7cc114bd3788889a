"""`tune` on fewer GPUs than ranks: N virtual ranks in one process, without a link and without a rival."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fd_fusion.cli.doctor.child import spec_for
from fd_fusion.cli.processes.ranks import rank_main
from fd_fusion.comm.group import Group

MOST_ROWS = 64  # of all ranks together: more programs do not run at once, and would wait for ever
_NODES = 96  # kernels in a graph


def run(job: dict[str, Any], group: Group) -> dict[str, Any]:
    """Returns what a rank of `tune_rank` does. The only process of `group` holds all virtual ranks."""
    import torch

    from fd_fusion.cli.bench import virtual_ranks

    size, hidden, dtype = job["ranks"], job["hidden_size"], job["dtype"]
    times: dict[str, dict[int, float]] = {}
    skipped = {"unfused": "NCCL refuses several ranks on one GPU"}
    library, why = _flashinfer(job, *torch.cuda.get_device_capability())
    if library is None:
        skipped["flashinfer"] = why
    for rows in job["rows"]:
        case = virtual_ranks.Case(size, rows, hidden, dtype)
        graphs = {}
        for column in ["one_shot", "two_shot"] + ["flashinfer"] * ("flashinfer" not in skipped):
            try:
                launch = _checked(column, case, library)
            except Exception as error:  # told in the report; ours must be right
                if column != "flashinfer":
                    raise
                skipped[column] = f"T={rows}: {type(error).__name__}: {error}".splitlines()[0]
                times.pop(column, None)
                continue
            graphs[column] = virtual_ranks.capture(size, [launch] * (_NODES // size // 3))
        medians = virtual_ranks.interleaved_us(list(graphs.values()), _NODES // size // 3, job["rounds"])
        for column, time in zip(graphs, medians):
            times.setdefault(column, {})[rows] = time
    return {"times": times, "skipped": skipped, "gpu": torch.cuda.get_device_name(), "framework": "torch"}


def _checked(column: str, case: Any, library: str | None) -> Callable[[int], Any]:
    """What launches the kernel, once its numbers were found right."""
    import torch

    from fd_fusion.cli.bench import virtual_ranks

    launch = _launch(column, case, library)
    virtual_ranks.capture(case.size, [launch]).replay()
    torch.cuda.synchronize()
    if not max(case.errors()) < 0.01:  # every rounding of a half is far below, every fault far above
        raise RuntimeError(f"{column} at T={case.rows}: wrong numbers, relative errors {case.errors()}")
    return launch


def _launch(column: str, case: Any, library: str | None) -> Callable[[int], Any]:
    from fd_fusion.cli.bench import virtual_ranks
    from fd_fusion.kernels.all_reduce.plan import plan_for

    shape = case.size, case.rows, case.hidden_size, case.dtype
    if column == "flashinfer":
        return virtual_ranks.FlashInferRanks(library, *shape).prepare(case)
    plan = plan_for(case.size, case.hidden_size, case.dtype)
    ranks = virtual_ranks.VirtualRanks(plan, min(case.rows, MOST_ROWS // case.size), case.rows)
    return ranks.prepare(case, two_shot=column == "two_shot")


def _flashinfer(job: dict[str, Any], major: int, minor: int) -> tuple[str | None, str]:
    """FlashInfer's compiled kernel, or why it is not measured."""
    from fd_fusion.backends.flashinfer import backend as flashinfer
    from fd_fusion.backends.flashinfer import loader as runtime_flashinfer
    from fd_fusion.backends.flashinfer.releases import rules

    asked = {"dtype": job["dtype"], "weight_dtypes": (), "hidden_size": job["hidden_size"]}
    refusal = flashinfer.supports(replace(spec_for(job["ranks"], "gpu", 10 * major + minor), **asked))
    if refusal is not None:
        return None, str(refusal)
    version = runtime_flashinfer.installed_version()
    path = runtime_flashinfer.compiled_module(version)
    if path is None or importlib.util.find_spec("tvm_ffi") is None:
        return None, "its kernel is not compiled, or tvm_ffi is missing"
    if rules(version).c_args != 23:  # what virtual_ranks.FlashInferRanks calls
        return None, f"the kernel of FlashInfer {version} takes other arguments: tune on a GPU for each rank"
    return str(path), ""


if __name__ == "__main__":
    sys.exit(rank_main(run))
