"""`python examples/bench qk-norm`: the QK norm on one GPU, on torch tensors, against a yardstick and a reference.

Everything is timed as the replay of a CUDA graph of one call a buffer, in three ways:
cold  the buffers together are 256 MiB or more, far beyond the L2 cache (512 buffers at most);
warm  8 buffers, where they fit in the L2 cache, as a projection leaves its output there;
gemm  each call right behind the bf16 GEMM that makes its input: time of the pair less that of the GEMM alone.
Bytes of a call: 2 T (q heads + kv heads) D 2, each element read and written once.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.qk_rms_norm_report import draw, tables
from bench.timing import copy_gbps, event_us, graph_of, load_file, provenance
from fd_fusion.cli.messages import to_json

D, EPS, HIDDEN = 128, 1e-6, 4096
L2_BYTES = 40 << 20  # buffers of fewer bytes together count as warm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", default="32/4,24/2,96/8,16/2,8/1", help="q/kv heads, comma separated")
    parser.add_argument("--most-rows", type=int, default=65536, help="T goes through the powers of two up to this")
    parser.add_argument(
        "--reference", type=Path, help="a Python file with qk_rmsnorm_fused(qkv, wq, wk, eps, q, kv, D)"
    )
    parser.add_argument("--output", type=Path, help="write the measured numbers to this JSON file")
    parser.add_argument("--render", type=Path, help="measure nothing: print the tables of this JSON file")
    parser.add_argument("--plot", type=Path, help="draw to this file")


def run(args: argparse.Namespace) -> int:
    result = json.loads(args.render.read_text()) if args.render else measure(args)
    if args.output:
        cells = ",\n  ".join(map(to_json, result["cells"]))  # a line each
        rest = to_json({name: value for name, value in result.items() if name != "cells"}, 1)
        args.output.write_text(f'{rest[:-2]},\n "cells": [\n  {cells}\n ]\n}}\n')
    print(tables(result))
    if args.plot:
        draw(result, args.plot)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure on the current GPU."""
    import torch

    from fd_fusion.backends.qk_rms_norm import qk_rms_norm
    from fd_fusion.frameworks.triton_launch import uses_pdl

    def ours(x, weights, q, kv):
        qk_rms_norm(x, *weights, q_heads=q, kv_heads=kv, head_dim=D, eps=EPS)

    kernels: dict[str, Callable] = {"us": ours, "no_pdl_us": _bare(False), "touch_us": _load_store(uses_pdl())}
    if args.reference:
        reference = load_file(args.reference).qk_rmsnorm_fused
        kernels["reference_us"] = lambda x, w, q, kv: reference(x, *w, EPS, q * D, kv * D, D)
    # Weights of 1 and -1: normalising a normalised row again and again changes nothing.
    weights = [(torch.randint(0, 2, (D,), device="cuda") * 2 - 1).bfloat16() for _ in range(2)]
    result = {
        **provenance(),
        "command": f"python examples/bench qk-norm --heads {args.heads} --most-rows {args.most_rows}"
        + (f" --reference {args.reference.name}" if args.reference else ""),
        "pdl": uses_pdl(),
        "copy_gbps": copy_gbps(),
        "cells": [],
    }
    heads = [tuple(map(int, pair.split("/"))) for pair in args.heads.split(",")]
    for q, kv in heads:
        for rows in (2**i for i in range(args.most_rows.bit_length())):
            result["cells"] += _cells(kernels, weights, rows, q, kv)
    result["host_us"] = _host_us(kernels, weights)
    return result


def _cells(kernels: dict[str, Callable], weights: list, rows: int, q: int, kv: int) -> list[dict[str, Any]]:
    """One cell for each way that makes sense at this T."""
    import torch

    width, cells = (q + 2 * kv) * D, []
    cold = max(4, min(512, -(-(256 << 20) // (rows * width * 2))))
    ways = {"cold": cold, "warm": 8, "gemm": 8}
    if 8 * rows * width * 2 > L2_BYTES:
        del ways["warm"]
    if rows > 512:
        del ways["gemm"]
    for way, count in ways.items():
        buffers = list(torch.randn(count, rows, width, device="cuda", dtype=torch.bfloat16).unbind())
        before, calls = None, buffers * max(1, 64 // count)
        if way == "gemm":
            x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
            projection = torch.randn(HIDDEN, width, device="cuda", dtype=torch.bfloat16)
            before = functools.partial(_project, x, projection)
        graphs = {}
        for name, kernel in kernels.items():
            graphs[name] = graph_of(before, lambda b, k=kernel: k(b, weights, q, kv), calls)
        if way == "gemm":
            graphs["gemm_us"] = graph_of(before, None, calls)
        else:
            part = rows * (q + kv) * D  # a copy of as many bytes, buffer to buffer
            half = count // 2  # far from the buffer written last, which would be read from the cache
            flat = [buffer.view(-1)[:part] for buffer in calls]
            pairs = list(zip(flat, flat[half:] + flat[:half]))
            graphs["same_copy_us"] = graph_of(None, lambda pair: pair[1].copy_(pair[0]), pairs)
        cell = _times(graphs, len(calls))
        if way == "gemm":
            alone = cell["gemm_us"]
            cell |= {name: round(cell[name] - alone, 3) for name in kernels}
        bytes_moved = 2 * rows * (q + kv) * D * 2
        cells.append({"way": way, "q": q, "kv": kv, "T": rows, "buffers": count, "bytes": bytes_moved, **cell})
    return cells


def _times(graphs: dict[str, Any], calls: int) -> dict[str, float]:
    """Median us a call of seven replays of each graph in turn; again, twice at most, where they disagree."""
    attempts = []
    for _ in range(3):
        times = {name: [] for name in graphs}
        for _ in range(7):
            for name, graph in graphs.items():
                graph.replay()
                times[name].append(event_us(graph.replay) / calls)
        attempts.append({name: round(statistics.median(values), 3) for name, values in times.items()})
        if all(max(values) < 1.15 * min(values) for values in times.values()):
            break
    return min(attempts, key=lambda attempt: sum(attempt.values()))


def _project(x: Any, projection: Any, buffer: Any) -> None:
    import torch

    torch.mm(x, projection, out=buffer)


def _load_store(pdl: bool) -> Callable:
    from bench.load_store import load_store_kernel
    from fd_fusion.kernels.qk_rms_norm import NUM_WARPS, tile

    heads = tile(D, 2)["HEADS"]
    options = {"num_warps": NUM_WARPS} | ({"launch_pdl": True} if pdl else {})

    def load_store(x, weights, q, kv):
        grid = (-(-x.shape[0] * (q + kv) // heads),)
        load_store_kernel[grid](x, x.shape[0], x.stride(0), q + kv, D, heads, pdl, **options)

    return load_store


def _bare(pdl: bool) -> Callable:
    """The kernel launched through Triton's own binder."""
    from fd_fusion.kernels.qk_rms_norm import NUM_WARPS, qk_rms_norm_kernel, tile

    constants = tile(D, 2) | {"EPS": EPS, "WEIGHT_OFFSET": 0.0, "D": D, "IN_PLACE": True, "ROUND_BY_HAND": False}
    constants |= {"PDL": pdl, "num_warps": NUM_WARPS, "enable_fp_fusion": False}
    constants |= {"launch_pdl": True} if pdl else {}

    def bare(x, weights, q, kv):
        grid = (-(-x.shape[0] * (q + kv) // constants["HEADS"]),)
        strides = x.stride(0), 0, 0
        qk_rms_norm_kernel[grid](x, x, x, *weights, x.shape[0], *strides, Q_HEADS=q, KV_HEADS=kv, **constants)

    return bare


def _host_us(kernels: dict[str, Callable], weights: list) -> dict[str, float]:
    """Host time of an eager call at T=1, 32/4, and of a bare launch of the same kernel through Triton.

    Everything goes through the driver class that Paddle uses, fed from torch.
    """
    import torch
    from triton.runtime.driver import driver

    from fd_fusion.backends import qk_rms_norm as qk_norm
    from fd_fusion.frameworks.triton_launch import make_driver, uses_pdl

    cuda = torch.cuda
    functions = cuda.current_device, cuda.set_device, cuda.get_device_capability, torch._C._cuda_getCurrentRawStream
    driver.set_active(make_driver(*functions))
    qk_norm.launcher.cache_clear()  # compiled and loaded once more, by that driver
    x = torch.randn(1, 40 * D, device="cuda", dtype=torch.bfloat16)
    calls = {"ours": kernels["us"], "bare_triton_launch": _bare(uses_pdl())}
    calls |= {"reference": kernels["reference_us"]} if "reference_us" in kernels else {}
    times = {name: [] for name in calls}
    for _ in range(30):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call(x, weights, 32, 4)
            times[name].append((time.perf_counter() - start) * 1e4)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}
