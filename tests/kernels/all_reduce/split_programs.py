"""Rows that are split over C programs, by the interpreter: a process for each *program* of each rank.

The interpreter runs the programs of a launch one after another, so the first would wait for its neighbours for ever.
Here each process sees the whole grid and runs one program of it. Run by test_split.py:
`python split_programs.py FOLDER`; FOLDER holds cases.json, and the outputs of each rank go to FOLDER/RANK.npz.
"""

import dataclasses
import json
import mmap
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
from triton.runtime import interpreter

from fd_fusion.frameworks import triton_launch
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce.error_page import ERROR_PAGE_BYTES
from tests.kernels.all_reduce.kernel_rank import Fp8, fill, inputs, plan_of


class SharedRank:
    """A rank's memory for one case, inputs and outputs too, where all its programs find it."""

    def __init__(self, case, plan, rank, addresses):
        self.page = shared(ERROR_PAGE_BYTES).view(np.int64)
        limit = int(case.get("limit_s", 30) * 1e9)
        words = plans.state_memory_words(
            plan, case["slots"], limit=limit, error_page=self.page.ctypes.data, addresses=addresses
        )
        self.state_memory = shared(8 * len(words)).view(np.int64)
        self.state_memory[:] = words
        self.state_memory[plans.COUNTER] = case.get("launches", 0) * plans.COUNTER_STEP
        self.calls, self.fp8 = [], [Fp8(case, rows) for rows in case["rows"]] if case.get("fp8") else []
        for call in self.fp8:
            call.codes, call.scales = like(call.codes, call.codes), like(call.scales, call.scales)
        for step in range(len(case["rows"])):
            x, residual, weight = inputs(case, rank, step)
            tensors = [like(x, x), like(x, residual), like(weight, weight), like(x), like(x)]
            self.calls.append(tensors)


def shared(nbytes):
    """Zeros that forked processes share, at the start of a page."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def like(tensor, values=None):
    made = shared(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
    made[:] = 0x1234 if values is None else values
    return made


def run_program(kernels, case, plan, member, rank, pid, own_slots):
    """All calls of one program. A launch begins when all programs of the one before are done, as on a stream."""
    builder = interpreter.interpreter_builder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    for step, rows in enumerate(case["rows"]):
        if case.get("absent") == [rank, step]:
            return
        member.barrier.wait(60)
        at_once, two_shot = (case["programs"], case["programs"]), case["two_shot"][step]
        ((programs, _, _, rounds),) = plans.launches(plan, case["slots"], at_once, rows, two_shot)
        if pid >= programs or case.get("absent_program") == [rank, step, pid]:
            continue
        builder.set_grid_dim = lambda *_, programs=programs: set_dim(programs, 1, 1)
        builder.set_grid_idx = lambda *_: set_idx(pid, 0, 0)
        constants = plans.constants(
            plan,
            weight_dtype=case["weight_dtype"],
            has_residual=True,
            two_shot=two_shot,
            rounds=rounds > 1,
            fp8=case.get("fp8"),
        )
        addresses = [tensor.ctypes.data for tensor in (*member.calls[step], member.state_memory)]
        numbers = rows, rounds, rank, step, 1e-5, case.get("weight_offset", 0.0)
        fp8 = member.fp8[step].arguments(0) if member.fp8 else ()
        kernels[bool(fp8)][(1,)](*addresses, own_slots, *numbers, *fp8, **constants)


def start(kernels, case, forks):
    """Start every program of a case. Returns (processes, ranks)."""
    plan = dataclasses.replace(plan_of(case), split=case["split"], two_shot_slices=case.get("slices", 1))
    nbytes = plans.symmetric_bytes(plan, case["slots"])
    region = shared(case["size"] * nbytes)
    fill(case, region)
    addresses = [region.ctypes.data + rank * nbytes for rank in range(case["size"])]
    ranks = [SharedRank(case, plan, rank, addresses) for rank in range(case["size"])]
    processes, count = [], case["programs"] * case["split"]
    for rank, member in enumerate(ranks):
        member.barrier = forks.Barrier(count)  # kept: its memory would go to the next one
        for pid in range(count):
            args = (kernels, case, plan, member, rank, pid, addresses[rank])
            processes.append(forks.Process(target=run_program, args=args))
            processes[-1].start()
    return processes, ranks


def wait(processes):
    """One that fails would leave the others waiting."""
    try:
        while any(process.exitcode is None for process in processes):
            time.sleep(0.01)
            assert all(process.exitcode in (None, 0) for process in processes), processes
    finally:
        for process in processes:
            process.kill()


def main(folder):
    kernel = triton_launch.load_kernel("all_reduce.kernel", "all_reduce_rms_norm")
    fp8, forks = triton_launch.load_kernel("all_reduce.kernel_fp8", "all_reduce_rms_norm_fp8"), get_context("fork")
    results = {}
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        processes, ranks = start((kernel, fp8), case, forks)
        wait(processes)
        for rank, member in enumerate(ranks):
            mine = results.setdefault(rank, {})
            mine[f"{number}.page"] = member.page
            for step, (*_, norm, residual) in enumerate(member.calls):
                mine[f"{number}.{step}.norm"], mine[f"{number}.{step}.residual"] = norm, residual
                if member.fp8:
                    mine |= {f"{number}.{step}.{key}": value for key, value in member.fp8[step].outputs().items()}
    for rank, mine in results.items():
        np.savez(folder / f"{rank}.npz", **mine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
