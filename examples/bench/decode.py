"""`python examples/bench decode`: a decode step of real shapes, on several GPUs, by every way of reducing.

Some layers of a decoder, as one rank of a tensor-parallel group has them, in one CUDA graph: weights are random, and
there are so many of them that none stays in L2. All ways take turns in one process, A B B A; the slowest rank counts;
a difference is that of two ways in the same round, and the median over the rounds has its 95 % interval beside it.
"ours again" is ours captured once more: its difference is what the measurement cannot tell apart. "no reduction" has
wrong numbers and is the bound. Every other way is compared with fp64 first. On a CPU all of it runs on a tiny
model under Triton's interpreter: a check of the machinery, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.decode_report import draw, tables
from fd_fusion.cli.messages import to_json
from fd_fusion.cli.processes.run_folder import run_folder
from fd_fusion.cli.processes.signals import ending_well
from fd_fusion.cli.processes.tied import child_environment, end_with_parent

CPU = {"models": "tiny", "rows": "1,2", "rounds": 1, "context": 16, "layers": 1}
INTERRUPTED = "interrupted"
GPU = {
    "models": "GLM-4.5-Air,Qwen3-32B,Qwen3-30B-A3B",
    "rows": "1,4,8,16,32,64,128",
    "rounds": 15,
    "context": 1024,
    "layers": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, help="tensor-parallel ranks (default: all GPUs; 2 on a CPU)")
    parser.add_argument("--models", help=f"names, or files of a config.json, comma separated ({GPU['models']})")
    parser.add_argument("--rows", help=f"sequences T, comma separated ({GPU['rows']})")
    parser.add_argument("--rounds", type=int, help=f"A B B A so many times ({GPU['rounds']})")
    parser.add_argument("--context", type=int, help=f"tokens that attention reads ({GPU['context']})")
    parser.add_argument("--layers", type=int, help="layers of the graph (default: six, and four times L2)")
    parser.add_argument("--fp8", action="store_true", help="an FP8 model (decode_fp8.py)")
    parser.add_argument("--flashinfer", type=Path, help="a compiled trtllm_allreduce_fusion.so")
    parser.add_argument("--qk-reference", type=Path, help="a file with qk_rmsnorm_fused, as in `bench qk-norm`")
    parser.add_argument("--output", type=Path, help="write the measured numbers to this JSON file")
    parser.add_argument("--render", type=Path, help="measure nothing: print the tables of this JSON file")
    parser.add_argument("--plot", type=Path, help="draw to this file")
    parser.add_argument("--seconds", type=float, default=240, help="begin no cell after so long (default: 240)")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache, measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # RANK,FOLDER


def run(args: argparse.Namespace) -> int:
    if args.child:
        return _child(args)
    try:  # before anything is measured
        if args.plot:
            importlib.import_module("matplotlib")
        if args.render:
            args.render.open().close()
        else:
            _fill_in(args)
            _check(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    with ending_well():
        result = json.loads(args.render.read_text()) if args.render else _by_children(args)
    if args.compile_only:
        return 1 if "failed" in result else 0
    if "device" in result:
        print(tables(result))
        if args.plot:
            draw(result, args.plot)
    if args.output:
        args.output.write_text(to_json(result, 1) + "\n")
    if "failed" in result:
        print(f"bench: {result['failed']}", file=sys.stderr)
    return 130 if result.get("failed") == INTERRUPTED else 1 if "failed" in result else 0


def _fill_in(args: argparse.Namespace) -> None:
    """Defaults of this machine."""
    import torch

    gpus = torch.cuda.device_count()
    args.ranks = args.ranks or gpus or 2
    for name, default in (GPU if gpus else CPU).items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _check(args: argparse.Namespace) -> None:
    """Raises: ValueError, OSError: what no rank could run, before any is started."""
    from bench.decode_model import check_split, shape_of

    if args.ranks < 2:
        raise ValueError(f"--ranks {args.ranks}: a step of one rank reduces nothing; give 2 or more, a GPU for each")
    if args.rounds < 1 or args.context < 1 or args.layers < 0:
        raise ValueError("--rounds and --context begin at 1, --layers at 0")
    if not all(part.isdecimal() and int(part) for part in args.rows.split(",")):
        raise ValueError(f"--rows {args.rows}: give numbers from 1, such as 1,8,64")
    for name in args.models.split(","):
        check_split(shape_of(name), args.ranks)
    if args.output:
        args.output.open("a").close()


def _by_children(args: argparse.Namespace) -> dict[str, Any]:
    """Each rank is a process of its own; or, to compile, each model is. What ends before its time ends all."""
    start, models = time.monotonic(), args.models.split(",")
    kept = ("models", "rows", "rounds", "context", "layers", "flashinfer", "qk_reference", "seconds", "ranks")
    given = {f"--{name.replace('_', '-')}": str(getattr(args, name)) for name in kept if getattr(args, name)}
    options = [part for option in given.items() for part in option] + ["--fp8"] * args.fp8
    written = [Path(part).name if "/" in part else part for part in options]  # no folder of this machine
    cuda = {"CUDA_MODULE_LOADING": "LAZY" if args.compile_only else "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    # NVLink multicast stays off: a program that dies while it uses it can take the GPUs out of service.
    cuda |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "OMP_NUM_THREADS": "1"}
    env = {**child_environment(), **cuda, **({} if _has_gpu() else {"TRITON_INTERPRET": "1"})}
    command = " ".join(["python examples/bench decode", *written])
    result: dict[str, Any] = {"command": command, "cells": [], "tokens": [], "without": []}
    with run_folder() as folder:
        children = []
        for number in range(len(models) if args.compile_only else args.ranks):
            mine = [*options, "--models", models[number]] if args.compile_only else options
            child = [sys.executable, "-W", "ignore", str(Path(__file__).parent), "decode", *mine]
            child += ["--child", f"{number},{folder}"] + ["--compile-only"] * args.compile_only
            children.append(subprocess.Popen(child, env=env))
        try:
            result |= _wait(children, start + args.seconds + 60)
        except KeyboardInterrupt:  # what was measured is printed
            result["failed"] = INTERRUPTED
        lines = folder / "lines"
        for line in map(json.loads, lines.read_text().splitlines() if lines.exists() else []):
            for key, value in line.items():
                mine = result.get(key)
                result[key] = [*mine, value] if isinstance(mine, list) else value
    result["tokens"] = {name: one for line in result["tokens"] for name, one in line.items()}
    return result


def _wait(children: list[subprocess.Popen], deadline: float) -> dict[str, Any]:
    try:
        while any(child.poll() is None for child in children):
            if failed := [rank for rank, child in enumerate(children) if child.poll()]:
                return {"failed": f"process {failed[0]} ended with {children[failed[0]].returncode}"}
            if time.monotonic() > deadline:
                return {"failed": "the ranks ran out of time and were ended"}
            time.sleep(0.05)
        failed = [rank for rank, child in enumerate(children) if child.returncode]
        return {"failed": f"process {failed[0]} ended with {children[failed[0]].returncode}"} if failed else {}
    finally:
        for child in children:
            child.kill()
            child.wait()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _child(args: argparse.Namespace) -> int:
    end_with_parent()
    from bench import decode_rank  # Triton decides at import whether it compiles or interprets

    number, _, folder = args.child.partition(",")
    if args.compile_only:
        decode_rank.compile_for(args)
    else:
        decode_rank.measure(args, int(number), Path(folder))
    sys.stdout.flush()
    os._exit(0)  # NCCL waits for graphs that it was captured in
