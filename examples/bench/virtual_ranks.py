"""N ranks of one process on one GPU: each with its own memory and stream, their calls in one CUDA graph.

What a rank would hold after the exchange of CUDA IPC handles is a table of addresses; here all are of this process.
The exchange runs through L2 instead of NVLink, so times are without the wire. The environment must hold
CUDA_MODULE_LOADING=EAGER and CUDA_DEVICE_MAX_CONNECTIONS=32: a module load, an allocation, or a stream that has to
wait for another while a rank already spins is a deadlock. Torch tensors; needs no Paddle.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch

from fd_fusion.frameworks.triton_launch import programs_at_once
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce.error_page import ERROR_PAGE_BYTES, read_error_page
from fd_fusion.kernels.all_reduce.kernel import all_reduce_rms_norm
from fd_fusion.reference import DTYPE_BYTES

EPS = 1e-6


class Case:
    """The tensors of one call on N ranks: x and both outputs for each rank, residual and weight for all."""

    def __init__(self, size: int, rows: int, hidden_size: int, dtype: str, seed: int = 0):
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(getattr(torch, dtype))

        self.size, self.rows, self.hidden_size, self.dtype, self.start = size, rows, hidden_size, dtype, 0
        self.x = [draw(rows, hidden_size) for _ in range(size)]
        self.residual, self.weight = draw(rows, hidden_size), draw(hidden_size)
        self.norm_out = [torch.full_like(x, 7.0) for x in self.x]
        self.residual_out = [torch.full_like(x, 7.0) for x in self.x]

    def part(self, start: int, stop: int) -> Case:
        """The same call on some of the rows, with outputs of its own."""
        part = copy.copy(self)
        part.start, part.rows = start, stop - start
        part.x, part.residual = [x[start:stop] for x in self.x], self.residual[start:stop]
        part.norm_out = [torch.full_like(x, 7.0) for x in part.x]
        part.residual_out = [torch.full_like(x, 7.0) for x in part.x]
        return part

    def errors(self) -> tuple[float, float]:
        """Relative errors of norm_out and residual_out against fp64; infinite for NaN or if ranks' bits differ."""
        total = sum(x.double() for x in self.x) + self.residual.double()
        norm = total * torch.rsqrt((total**2).mean(-1, keepdim=True) + EPS) * self.weight.double()
        errors = []
        for outputs, want in ((self.norm_out, norm), (self.residual_out, total)):
            bits = [out.view(torch.uint8) for out in outputs]
            same = all(torch.equal(bits[0], other) for other in bits[1:])
            error = ((outputs[0].double() - want).norm() / want.norm()).item()
            errors.append(error if same and error == error else float("inf"))
        return errors[0], errors[1]


def most_programs(plan: plans.Plan, multiprocessors: int) -> int:
    """How many programs of each rank, a row each, are sure to run at once on one GPU, on either path. They wait for
    each other: beside ranks that fill the GPU, the last one would never start."""
    constants = plans.constants(plan, weight_dtype=plan.dtype, has_residual=True, two_shot=True)
    at_once = programs_at_once(plan.num_warps, constants["maxnreg"]) * multiprocessors
    return max(1, at_once // (plan.size * plan.split))


class VirtualRanks:
    """The triton kernel's memory of N ranks, and its launch on one of them."""

    def __init__(self, plan: plans.Plan, programs: int, slots: int = 64, limit_ns: int = 5_000_000_000):
        plan = dataclasses.replace(plan, two_shot_rows=plan.two_shot_rows or 1)  # with places for its results
        most = most_programs(plan, torch.cuda.get_device_properties("cuda").multi_processor_count)
        self.plan, self.programs = plan, min(programs, most)
        self.slots = slots
        size = plans.symmetric_bytes(plan, self.slots)
        full = {"fill_value": plans.SLOT_FILL, "dtype": torch.uint8, "device": "cuda"}
        self.symmetric = [torch.full((size,), **full) for _ in range(plan.size)]
        for memory in self.symmetric:
            memory[: plans.CONTROL_BYTES] = 0
        words = ERROR_PAGE_BYTES // 8
        self.pages = [torch.zeros(words, dtype=torch.int64).pin_memory() for _ in range(plan.size)]
        addresses = [memory.data_ptr() for memory in self.symmetric]
        self.local = []
        for page in self.pages:
            mine = plans.state_memory_words(
                plan, self.slots, limit=limit_ns, error_page=page.data_ptr(), addresses=addresses
            )
            self.local.append(torch.tensor(mine, dtype=torch.int64, device="cuda"))

    def arguments(self, case: Case, rank: int, op: int = 0) -> tuple:
        tensors = (case.x[rank], case.residual, case.weight, case.norm_out[rank], case.residual_out[rank])
        addresses = [t.data_ptr() for t in (*tensors, self.local[rank], self.symmetric[rank])]
        return (*addresses, case.rows, 1, rank, op, EPS, 0.0)

    def prepare(self, case: Case, two_shot: bool = False) -> Callable[[int], Any]:
        """Compile and load what `case` needs. Returns a function that launches it on a rank."""
        constants = plans.constants(self.plan, weight_dtype=case.dtype, has_residual=True, two_shot=two_shot)
        assert case.rows <= self.slots
        grid = plans.grid(self.plan, self.programs, case.rows, two_shot)
        compiled = all_reduce_rms_norm.warmup(*self.arguments(case, 0), grid=grid, **constants)
        compiled._init_handles()
        launch = all_reduce_rms_norm[grid]
        return lambda rank: launch(*self.arguments(case, rank), **constants)

    def rows_done(self) -> list[int]:
        """How many rows each rank's kernel has finished, counted on the device."""
        return [mine[plans.ROWS].item() for mine in self.local]

    def failures(self) -> list:
        return [read_error_page(page.tolist()) for page in self.pages]


class FlashInferRanks:
    """FlashInfer's kernel on the same tensors, by its C entry (0.6.12 to 0.7.2), in a workspace made here."""

    def __init__(self, library: str, size: int, rows: int, hidden_size: int, dtype: str):
        self.entry = importlib.import_module("tvm_ffi").load_module(library).trtllm_allreduce_fusion
        width = DTYPE_BYTES[dtype]
        slot = size * rows * hidden_size * width
        integer = {2: torch.int16, 4: torch.int32}[width]
        minus_zero = {"fill_value": -(1 << (8 * width - 1)), "dtype": integer, "device": "cuda"}
        zero = {"dtype": torch.int32, "device": "cuda"}
        comm = [torch.zeros(slot // 2, **zero) for _ in range(size)]
        flags = [torch.zeros(size * 256, **zero) for _ in range(size)]
        lamport = [torch.full((3 * slot // width,), **minus_zero) for _ in range(size)]
        control = [torch.tensor([0, 0, 0, slot, 0], **zero) for _ in range(size)]
        shared = [t.data_ptr() for t in (*comm, *flags, *lamport)]
        self.keep = (comm, flags, lamport, control)
        self.pointers = [torch.tensor([*shared, c.data_ptr()], dtype=torch.int64, device="cuda") for c in control]

    def prepare(self, case: Case, two_shot: bool = False) -> Callable[[int], Any]:
        def launch(rank: int) -> None:
            self.entry(case.x[rank], case.size, rank, case.rows, case.hidden_size, self.pointers[rank],
                       False, not two_shot, True, True, 1, None, case.residual, case.residual_out[rank],
                       case.norm_out[rank], None, None, case.weight, EPS, None, None, None, 0.0)  # fmt: skip

        return launch


@functools.cache
def _streams() -> list[torch.cuda.Stream]:
    """One to capture on and one for each rank, made once: torch has 32 and hands them out in turn. A rank that got
    the capturing stream again would hold up all ranks behind it until the others had run out of time."""
    return [torch.cuda.Stream() for _ in range(1 + max(plans.SIZES))]


def capture(size: int, launches: list[Callable[[int], Any]], flush: torch.Tensor | None = None):
    """A CUDA graph of the launches, one after another on every rank. With `flush`, all ranks wait before each of
    them until that tensor has been written, which throws everything else out of L2."""
    root, *streams = _streams()[: 1 + size]
    graph = torch.cuda.CUDAGraph()
    graph.launches = launches  # they hold the memory whose addresses are in the graph
    with torch.cuda.graph(graph, stream=root):
        for batch in [launches] if flush is None else [[launch] for launch in launches]:
            if flush is not None:
                flush.add_(1)
            for rank, stream in enumerate(streams):
                stream.wait_stream(root)
                with torch.cuda.stream(stream):
                    for launch in batch:
                        launch(rank)
            for stream in streams:
                root.wait_stream(stream)
    return graph


def _time_us(graph, calls: int, replays: int) -> list[float]:
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return times


def interleaved_us(graphs: list, calls: int, rounds: int = 5) -> list[float]:
    """Median time of a call of each graph in microseconds, their replays taking turns."""
    for graph in graphs:
        _time_us(graph, calls, 2)
    times = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, mine in zip(graphs, times):
            mine += _time_us(graph, calls, 5)
    return [statistics.median(mine) for mine in times]
