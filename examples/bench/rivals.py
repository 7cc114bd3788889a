"""All-reduce + residual + RMSNorm by everything that users have, on torch tensors, one process a GPU.

Each rival has `buffer(rows)`, where a GEMM writes its partial sums, so that nobody pays for a copy that a model would
not make; and `call(x, residual, weight)`, which returns (norm, residual) and may work in place. `x` is that buffer.
NVLink multicast stays off: set TORCH_SYMM_MEM_DISABLE_MULTICAST=1 and NCCL_NVLS_ENABLE=0 before the start.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fd_fusion.cli.tune.pull import NORM_WARPS, Pull
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import as_refusal
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.spec import OpSpec


def join(group: Group, folder: Path) -> None:
    """Open torch's process group: NCCL on GPUs, gloo on a CPU."""
    options: dict[str, Any] = {"rank": group.rank, "world_size": group.size}
    options |= {"store": dist.FileStore(str(folder / "torch"), group.size)}
    options |= {"timeout": datetime.timedelta(seconds=60)}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        options["device_id"] = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl" if on_gpu else "gloo", **options)
    dist.all_reduce(torch.ones(1, device="cuda" if on_gpu else "cpu"))


class Norm:
    """The norm behind every all-reduce that is not fused, with as many warps as are fastest at this T."""

    def __init__(self, pull: Pull):
        self._pull, self._warps = pull, {}

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        self._pull.norm(x, residual, weight, self._warps.get(x.shape[0], 8))

    def tune(self, rows: int) -> None:
        """Choose the warps for this number of rows, by graph replay."""
        if rows in self._warps or not torch.cuda.is_available():
            return
        x = torch.randn(rows, self._pull.spec.hidden_size, device="cuda").bfloat16()
        residual, weight = x.clone(), torch.ones_like(x[0])
        times = {}
        for warps in NORM_WARPS:
            replay = captured(lambda w=warps: self._pull.norm(x, residual, weight, w), 20)
            times[warps] = min(event_us(replay) for _ in range(5))
        self._warps[rows] = min(times, key=times.get)


class Rival:
    """What does not reduce in a buffer of its own takes any."""

    def buffer(self, rows: int) -> torch.Tensor:
        return self._plain[:rows]

    def last(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Any, Any]:
        """The call behind a model's last layer, whose residual no other call of this kind reads."""
        return self.call(x, residual, weight)

    def close(self) -> None:
        """Nothing is held."""


class NoReduction(Rival):
    """The norm alone: wrong numbers, and the bound for whatever reduces."""

    def __init__(self, plain: torch.Tensor, norm: Norm):
        self._plain, self._norm = plain, norm

    def call(self, x, residual, weight):
        self._norm(x, residual, weight)
        return x, residual


class AllReduce(NoReduction):
    """torch.distributed's all-reduce (NCCL on GPUs), then the norm."""

    def call(self, x, residual, weight):
        dist.all_reduce(x)
        return super().call(x, residual, weight)


class Fused(Rival):
    """This package's op, as `bind` opens it; a residual stays with its owners where the op can leave it."""

    def __init__(self, op: Any, plain: torch.Tensor, eps: float):
        self.op, self._plain, self._eps = op, plain, eps

    def call(self, x, residual, weight):
        return self.op.finish(x, residual, weight, self._eps, 0.0, self.op.may_stay)

    def last(self, x, residual, weight):
        return self.op.finish(x, residual, weight, self._eps, 0.0)


class PullThenNorm(Rival):
    """The pull, whose rows lie in memory that is registered with all ranks, then the norm."""

    def __init__(self, pull: Pull, rows: int, norm: Norm):
        self._pull, self._norm = pull, norm
        shape = rows, pull.spec.hidden_size
        dtype = getattr(torch, pull.spec.dtype)
        self._rows = view(pull.rows, shape, dtype, pull.spec.device)
        self._sum = torch.empty(shape, dtype=dtype, device=self._rows.device)

    def buffer(self, rows):
        return self._rows[:rows]

    def call(self, x, residual, weight):
        summed = self._sum[: x.shape[0]]
        self._pull.reduce(summed)
        self._norm(summed, residual, weight)
        return summed, residual


class TorchSymmetric(Rival):
    """torch's one- or two-shot all-reduce on its symmetric memory, without multicast, then the norm."""

    def __init__(self, two_shot: bool, rows: int, hidden: int, norm: Norm):
        symmetric = importlib.import_module("torch.distributed._symmetric_memory")
        self._group, self._norm, self._two_shot = dist.group.WORLD.group_name, norm, two_shot
        device = torch.device("cuda", torch.cuda.current_device())
        self._rows = symmetric.empty(rows, hidden, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(self._rows, self._group)

    def buffer(self, rows):
        return self._rows[:rows]

    def call(self, x, residual, weight):
        ops = torch.ops.symm_mem
        reduce = ops.two_shot_all_reduce_ if self._two_shot else ops.one_shot_all_reduce
        summed = reduce(x, "sum", self._group)
        self._norm(summed, residual, weight)
        return summed, residual


def open_rivals(
    group: Group, spec: OpSpec, rows: int, pull: Pull, norm: Norm, without: list[str]
) -> dict[str, Rival]:
    """Collective: every way of reducing that is not fused, once tried. One that fails on any rank is left out on all,
    and `without` gets why. torch's process group must be open for torch's own."""
    device = "cuda" if spec.device == "gpu" else "cpu"
    plain = torch.empty(rows, spec.hidden_size, dtype=getattr(torch, spec.dtype), device=device)
    makers: dict[str, Any] = {"pull + norm": lambda: PullThenNorm(pull, rows, norm)}
    if dist.is_initialized():
        makers["nccl + norm" if spec.device == "gpu" else "gloo + norm"] = lambda: AllReduce(plain, norm)
        if spec.device == "gpu":
            shape = rows, spec.hidden_size
            makers["symm one-shot + norm"] = lambda: TorchSymmetric(False, *shape, norm)
            makers["symm two-shot + norm"] = lambda: TorchSymmetric(True, *shape, norm)
    found = {}
    for name, make in makers.items():
        rival, refusal = as_refusal(lambda make=make: _tried(make()))
        verdict = agree(group, f"rival {name}", Vote(refusal), timeout_s=90)
        if verdict.ok:
            found[name] = rival
        else:
            without.append(f"{name}: {verdict.reason}")
    return found


def _tried(rival: Rival) -> Rival:
    x = rival.buffer(1).fill_(1)
    rival.call(x, torch.ones_like(x), torch.ones_like(x[0]))
    if x.is_cuda:
        torch.cuda.synchronize()
    return rival


def view(address: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor over memory that is not torch's, which must outlive it."""
    if device == "cpu":
        count = shape[0] * shape[1]
        memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
    numbers = {2: ("<i2", torch.int16), 4: ("<i4", torch.int32)}[dtype.itemsize]
    described = {"shape": shape, "typestr": numbers[0], "data": (address, False), "version": 2}
    holder = type("Memory", (), {"__cuda_array_interface__": described})()
    return torch.as_tensor(holder, device="cuda").view(dtype)


def captured(call: Callable[[], Any], calls: int = 1) -> Callable[[], None]:
    """Capture a CUDA graph of some calls, one after another. Returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # NCCL has threads
        kept = [call() for _ in range(calls)]

    def replay(_kept: Any = kept) -> None:  # the graph writes into these outputs
        graph.replay()

    return replay


def event_us(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
