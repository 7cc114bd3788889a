"""`python examples/bench all-reduce`: the fused all-reduce kernel against FlashInfer's, on one GPU.

N virtual ranks in one CUDA graph (`virtual_ranks.py`), bf16, each N in a child process with a limit on its time.
Every cell is checked against fp64 before it is timed, and ours by the rows that the device itself counted; then the
graphs of all kernels take turns, and the median of the replays counts. `us` is a call behind another one,
`flushed_us` a call behind a write that has emptied L2. The exchange runs through L2: `wire_us` says what a rank's
pushes would take at 400 GB/s a direction.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.all_reduce_report import draw, tables
from fd_fusion.cli.messages import to_json
from fd_fusion.cli.processes.run_folder import run_folder
from fd_fusion.cli.processes.signals import ending_well
from fd_fusion.cli.processes.tied import child_environment, end_with_parent

HIDDEN = (2880, 4096, 5120, 6144, 7168, 8192)
WIRE_GBPS = 400
MOST_ROWS = 64  # of all ranks together: more programs than that do not run at once, and would wait for ever
TWO_SHOT = ((4, 16, 4096), (4, 16, 8192), (8, 16, 4096), (8, 16, 8192))  # N, T, H
NODES = 96  # kernels in a graph; with 120 of them eight streams did not all start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default="2,4,8", help="numbers of ranks, comma separated")
    parser.add_argument("--rows", default="1,2,4,8,16", help="T, comma separated")
    parser.add_argument("--flashinfer", nargs="*", default=[], help="builds of FlashInfer's trtllm_comm.so")
    parser.add_argument("--output", type=Path, help="write the measured numbers to this JSON file")
    parser.add_argument("--render", type=Path, help="measure nothing: print the tables of this JSON file")
    parser.add_argument("--plot", type=Path, help="draw to this file")
    parser.add_argument("--limit_s", type=int, default=120, help="time for one N")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.child:
        end_with_parent()
        _measure(args)
        return 0
    with ending_well():
        result = json.loads(args.render.read_text()) if args.render else _by_children(args)
    if args.output:
        args.output.write_text(to_json(result, 1) + "\n")
    print(tables(result))
    if args.plot:
        draw(result, args.plot)
    return 1 if "failed" in result else 0


def _by_children(args: argparse.Namespace) -> dict[str, Any]:
    """Each N in a process of its own: a mistake in a spinning kernel is a hang."""
    env = {**child_environment(), "CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    libraries = "".join(f" {Path(library).name}" for library in args.flashinfer)
    command = f"python examples/bench all-reduce --sizes {args.sizes} --rows {args.rows}"
    result: dict[str, Any] = {"command": command + (f" --flashinfer{libraries}" if libraries else ""), "cells": []}
    for size in args.sizes.split(","):
        with run_folder() as folder, open(folder / "lines", "w+") as lines:
            child = [sys.executable, str(Path(__file__).parent), "all-reduce", "--child", size, "--rows", args.rows]
            child += ["--output", lines.name, "--flashinfer", *args.flashinfer]
            try:
                status = subprocess.run(child, env=env, timeout=args.limit_s).returncode
            except subprocess.TimeoutExpired:
                status = "killed: it ran out of time"
            if status:
                result.setdefault("failed", {})[size] = status
            for line in map(json.loads, lines):
                result |= line if "device" in line else {"cells": [*result["cells"], line]}
    return result


def pushed_bytes(size: int, rows: int, hidden_size: int, two_shot: bool, flashinfer: bool) -> int:
    """Bytes that a rank pushes to others in a call. Two-shot: to the owners and, from them, one or two rows."""
    row = hidden_size * 2
    if not two_shot:
        return (size - 1) * rows * row
    return (2 if flashinfer else 3) * (size - 1) * rows * row // size


def _measure(args: argparse.Namespace) -> None:
    """One N: append a line of JSON for each cell, so that what was measured outlives a kill."""
    from bench.timing import provenance

    rows = [int(rows) for rows in args.rows.split(",") if int(rows) * args.child <= MOST_ROWS]
    cells = [(rows, hidden, False) for rows in rows for hidden in HIDDEN]
    cells += [(rows, hidden, True) for size, rows, hidden in TWO_SHOT if size == args.child]
    with args.output.open("w") as lines:
        print(json.dumps(provenance()), file=lines, flush=True)
        for rows, hidden, both in cells:
            print(json.dumps(_cell(args.child, rows, hidden, both, args.flashinfer)), file=lines, flush=True)


def _cell(size: int, rows: int, hidden: int, both: bool, libraries: list[str]) -> dict[str, Any]:
    """Every kernel that can do this cell, one-shot, and with `both` two-shot too."""
    import torch

    from bench.virtual_ranks import Case, FlashInferRanks, VirtualRanks, capture, interleaved_us
    from fd_fusion.kernels.all_reduce.plan import plan_for

    plan = plan_for(size, hidden, "bfloat16")
    case = Case(size, rows, hidden, "bfloat16", seed=rows)
    launches, kernels = {}, {}
    for two_shot in (False, True) if both else (False,):
        made = {"triton": VirtualRanks(plan, min(rows, MOST_ROWS // size))}
        for library in libraries:
            if not (two_shot and "0_6" in library):  # its two-shot races
                made[f"flashinfer {Path(library).stem[12:]}"] = FlashInferRanks(
                    library, size, rows, hidden, "bfloat16"
                )
        for name, ranks in made.items():
            key = name + " two-shot" * two_shot
            bytes_ = pushed_bytes(size, rows, hidden, two_shot, name != "triton")
            kernels[key] = {"pushed_bytes": bytes_, "wire_us": round(bytes_ / WIRE_GBPS / 1e3, 3)}
            launch = ranks.prepare(case, two_shot)
            capture(size, [launch]).replay()
            torch.cuda.synchronize()
            kernels[key]["errors"] = [float(f"{error:.2e}") for error in case.errors()]
            ran = True
            if name == "triton":
                kernels[key]["device_rows"] = ranks.rows_done()
                ran = kernels[key]["device_rows"] == [rows] * size
            if ran and max(kernels[key]["errors"]) < 0.01:  # FlashInfer rounds the sum first; a wrong one is far off
                launches[key] = launch
    flush = torch.empty(16 << 20, dtype=torch.int32, device="cuda")
    calls = NODES // size // (2 if both else 1)
    times = interleaved_us([capture(size, [one] * calls) for one in launches.values()], calls)
    flushed = [lambda rank: None, *launches.values()]
    flushed_times = interleaved_us([capture(size, [one] * 4, flush) for one in flushed], 4)
    for key, us, flushed_us in zip(launches, times, flushed_times[1:]):
        kernels[key] |= {"us": round(us, 3), "flushed_us": round(flushed_us - flushed_times[0], 3)}
    cell = {"N": size, "T": rows, "H": hidden, "plan": [plan.split, plan.num_warps], "kernels": kernels}
    rivals = [
        got["us"] for key, got in kernels.items() if key.startswith("flash") and "us" in got and "two" not in key
    ]
    if rivals and not both and "triton" in launches:
        cell["ratio"] = round(kernels["triton"]["us"] / min(rivals), 3)
    return cell
