"""What every benchmark on a GPU needs: CUDA graphs on torch tensors, events, the copy rate, and where it ran."""

from __future__ import annotations

import datetime
import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Device, versions, commit and date of a measurement. FD_FUSION_COMMIT names the commit where git cannot."""
    import torch
    import triton

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "driver": driver.partition("\n")[0]},
        "commit": os.environ.get("FD_FUSION_COMMIT") or _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def graph_of(before: Callable | None, call: Callable | None, buffers: list) -> Any:
    """A CUDA graph of `before` and `call` on each of the buffers in turn; either may be None."""
    import torch

    def all_of_it(some: list) -> None:
        for buffer in some:
            if before is not None:
                before(buffer)
            if call is not None:
                call(buffer)

    all_of_it(buffers[:2])  # compile and load first
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_it(buffers)
    return graph


def event_us(work: Callable) -> float:
    """Device time of `work`."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def copy_gbps() -> float:
    """A copy of 256 MiB, ten in a graph; bytes read and written."""
    import torch

    source = torch.randn(128 << 20, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    graph = graph_of(None, lambda _: target.copy_(source), [None] * 10)
    graph.replay()
    return 10 * 2 * source.numel() * 2 / statistics.median(event_us(graph.replay) for _ in range(7)) / 1e3


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
