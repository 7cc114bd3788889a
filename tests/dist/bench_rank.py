"""Rank script: speed of the fused all-reduce on several GPUs, one process a GPU, on torch tensors.

Contenders are captured in CUDA graphs and replayed in turn; a figure is the median over the rounds of the slowest
rank's time for a call. Started by tests/gpu/bench_processes.py.

`--flashinfer FILE`: a compiled `trtllm_allreduce_fusion`; it runs in a workspace on our symmetric memory.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch
import triton
import triton.language as tl
from bench import rivals
from bench.flashinfer_entry import open_flashinfer

from fd_fusion.backends import triton as backend
from fd_fusion.backends.triton_setup import ONE_SHOT, TWO_SHOT
from fd_fusion.cli.tune.pull import Pull
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.comm.symmetric_memory import as_refusal, open_symmetric_memory
from fd_fusion.config import FusionConfig
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.spec import OpSpec
from tests.support import tensors
from tests.support.all_reduce_cases import Case, judge
from tests.support.ranks import this_group, this_rank

EPS = 1e-5
NEVER = 1 << 62


def spec_for(size, rank, hidden, workspace_mb):
    limits = {"max_token_num": 1 << 20, "workspace_bytes": workspace_mb << 20, "timeout_s": 20}
    major, minor = torch.cuda.get_device_capability()
    return OpSpec(rank, size, hidden, "bfloat16", eps=EPS, device="gpu", arch=10 * major + minor, **limits)


class Triton:
    """What `bind` would open, and where that has no two-shot, a second one that has it: the registers that two-shot
    takes would leave one-shot fewer rows in flight."""

    def __init__(self, spec, group):
        self.one_shot = self.two_shot = backend.open(spec, group)
        if plans.plan_for(spec.size, spec.hidden_size, spec.dtype).two_shot_rows is None:
            self.two_shot = backend.open(dataclasses.replace(spec, two_shot_rows=1), group)
        self.ops = list(dict.fromkeys((self.one_shot, self.two_shot)))
        for one in self.ops:
            one.freeze()

    def contenders(self, case, x, residual, weight):
        def one_shot():
            self.one_shot._two_shot_rows = NEVER
            return self.one_shot.finish(x, residual, weight, EPS, 0.0)

        def two_shot():
            self.two_shot._two_shot_rows = 1
            return self.two_shot.finish(x, residual, weight, EPS, 0.0)

        def stays():
            self.two_shot._two_shot_rows = 1
            return self.two_shot.finish(x, residual, weight, EPS, 0.0, True)[:1]  # its residual is NaN in most rows

        found = {"triton one-shot": one_shot, "triton two-shot": two_shot}
        return found | ({"triton two-shot, the residual stays": stays} if self.two_shot.may_stay else {})

    def in_flight(self, name):
        op, path = (self.one_shot, ONE_SHOT) if name == "triton one-shot" else (self.two_shot, TWO_SHOT)
        return op.at_once[path][0]

    def counted(self):
        """The rows that the kernels have finished, as the device counts them."""
        return sum(one.stats()["device"]["rows"] for one in self.ops)

    def check(self):
        for one in self.ops:
            one.check()

    def close(self):
        for one in self.ops:
            one.close()


class Rivals:
    """Everything else that users have, from examples/bench. Many work in place, so each call feeds the next one; the
    first call is the one that is compared with fp64."""

    def __init__(self, options, group, hidden, push):
        rows, spec = max(options.rows), spec_for(group.size, group.rank, hidden, options.workspace_mb)
        self.pull = Pull(spec, group, rows)
        self.norm = rivals.Norm(self.pull)
        without = []
        self.ways = rivals.open_rivals(group, spec, rows, self.pull, self.norm, without)
        plain = torch.empty(rows, hidden, dtype=torch.bfloat16, device="cuda")
        self.flashinfer = open_flashinfer(options.flashinfer, group, plain, push, EPS, without)
        print(*(f"without {why}" for why in without), sep="\n", flush=True)

    def contenders(self, case, x, residual, weight):
        self.norm.tune(case.rows)
        found, count = {}, case.rows
        for name, way in self.ways.items():
            found[name] = self._contender(way, x, residual, weight)
        out = torch.empty_like(x)
        found["pull alone"] = lambda: self.pull.reduce(out)
        if self.flashinfer and count <= self.flashinfer.one_shot_rows:
            found["flashinfer one-shot"] = self._contender(self.flashinfer, x, residual, weight, True)
        if self.flashinfer and count > case.size:
            found["flashinfer two-shot"] = self._contender(self.flashinfer, x, residual, weight, False)
        return found

    def _contender(self, way, x, residual, weight, *more):
        mine, held = way.buffer(len(x)), residual.clone()
        mine.copy_(x)
        return lambda: way.call(mine, held, weight, *more)

    def close(self):
        for one in filter(None, (self.flashinfer, self.pull)):
            one.close()


@triton.jit
def push_rows(x, to, rows, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows of x at another rank, as the fused kernel does, and nothing else."""
    words, row = tl.arange(0, BLOCK), tl.program_id(0)
    while row < rows:
        at = row.to(tl.int64) * WORDS + words
        own = tl.load(tl.multiple_of(x, 16) + at, mask=words < WORDS)
        pointer = tl.multiple_of(to.to(tl.pointer_type(tl.uint32)), 16)
        tl.store(pointer + at, own, mask=words < WORDS, cache_modifier=".wt")
        row += tl.num_programs(0)


class Push:
    """The yardstick: the bytes of a one-shot call stored at the peers by programs of 128 threads, and nothing else."""

    def __init__(self, group, hidden, rows, push):
        self.group = group
        nbytes = (group.size - 1) * rows * hidden * 2
        self.memory = open_symmetric_memory(group, nbytes, CudaIpc(), push, timeout_s=30)

    def close(self):
        self.memory.close()

    def contenders(self, case, x, residual, weight):
        rank, size, words = self.group.rank, self.group.size, case.hidden // 2
        peers = [(rank + i) % size for i in range(1, size)]
        # A place for each source: nobody else stores there.
        targets = [self.memory.addresses[p] + (rank - p - 1) % size * case.rows * 4 * words for p in peers]
        x = x.view(torch.uint32) if hasattr(torch, "uint32") else x.view(torch.int32)

        def run(programs):
            for to in targets:
                push_rows[(programs,)](x, to, case.rows, WORDS=words, BLOCK=triton.next_power_of_2(words), num_warps=4)

        return {f"plain push, {p} programs": lambda p=p: run(p) for p in (32, 264) if p <= case.rows or p == 32}


def capture(call, calls):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # NCCL has threads
        for _ in range(calls):
            call()
    return graph


def measure(contenders, rounds, calls, rows, counted):
    """us a call of each contender in each round, on this rank. `counted`: the rows that our kernel has finished."""
    graphs = {name: capture(call, calls) for name, call in contenders.items()}
    times = {name: [] for name in graphs}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for name, graph in graphs.items():
        if counted is None:
            continue
        before = counted()
        graph.replay()
        torch.cuda.synchronize()
        ours = rows * calls if "triton" in name else 0
        assert counted() - before == ours, f"{name}: the device counted {counted() - before} rows, expected {ours}"
    for number in range(rounds + 1):
        for name, graph in graphs.items():
            graph.replay()  # brings the ranks together
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number:
                times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return times


def bytes_pushed(size, case, name):
    """What a rank sends for one call, in bytes, and its time at 400 GB/s."""
    row = case.rows * case.hidden * 2
    least = 2 * (size - 1) * row // size
    sent = {"the residual stays": least, "two-shot": (size - 1) * row * 3 // size}
    sent |= dict.fromkeys(("one-shot", "plain push", "pull"), (size - 1) * row)
    return next((count for kind, count in sent.items() if kind in name), least)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, nargs="+")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flashinfer")
    parser.add_argument("--nccl", action="store_true")
    parser.add_argument("--workspace_mb", type=int, default=FusionConfig.workspace_mb)
    parser.add_argument("--seconds", type=float, default=200)
    options = parser.parse_args()
    began = time.monotonic()
    torch.cuda.set_device(this_rank() % torch.cuda.device_count())
    torch.zeros(1, device="cuda")
    group = this_group()
    if options.nccl:
        _, refusal = as_refusal(lambda: rivals.join(group, Path(os.environ["FD_TEST_STORE"])))
        if not agree(group, "nccl", Vote(refusal), timeout_s=90).ok:
            print("without NCCL:", refusal, flush=True)
    rows_of = {}
    for hidden in options.hidden:
        libraries = [Triton(spec_for(group.size, group.rank, hidden, options.workspace_mb), group)]
        push = libraries[0].one_shot._push
        libraries.append(Push(group, hidden, max(options.rows), push))
        libraries.append(Rivals(options, group, hidden, push))
        for rows in options.rows:
            spent = agree(group, "time", Vote(data=time.monotonic() - began), timeout_s=60).data
            if max(spent) > options.seconds:
                break
            cell(group, libraries, Case(group.size, rows, hidden), options, rows_of)
        libraries[0].check()
        if group.rank == 0:
            print("RESULT", json.dumps(list(rows_of.values())), flush=True)
            print(f"H={hidden} done at {time.monotonic() - began:.0f} s", flush=True)
        torch.cuda.synchronize()
        libraries[0].close()
        for library in libraries[1:]:
            library.close()
    agree(group, "end", Vote(), timeout_s=30)
    os._exit(0)  # NCCL waits for graphs that it was captured in


def cell(group, libraries, case, options, found):
    """One (T, H): every contender is compared with fp64, and what is right on all ranks is timed in turn."""
    residual, weight = common(case)
    x = partial(case, group.rank)
    contenders = {}
    for library in libraries:
        contenders.update(library.contenders(case, x, residual, weight))
    truth, errors, far = exact(case, residual, weight), {}, {}
    for name, call in contenders.items():
        if not name.startswith("plain") and name != "pull alone":
            outputs = call()
            far[name] = [((out.double() - true).norm() / true.norm()).item() for out, true in zip(outputs, truth)]
            if len(outputs) == 2 and (case.rows in (1, 8) or (case.rows == 128 and case.hidden == 4096)):
                bits = [tensors.bits_of(out, "bfloat16") for out in outputs]
                errors[name] = judge_torch(case, residual, weight, bits)
    far = agree(group, "right", Vote(data=far), timeout_s=60).data
    for name in far[0]:
        if not all(error < 0.01 for rank in far for error in rank[name]):  # a rounding is far below, a fault far above
            print(f"not timed: {name} at {case} is wrong: {[rank[name] for rank in far]}", flush=True)
            del contenders[name]
    calls = 20 if case.rows <= 128 else 6
    times = measure(contenders, options.rounds, calls, case.rows, libraries[0].counted)
    everybody = agree(group, "times", Vote(data={"times": times, "errors": errors}), timeout_s=60).data
    for name in times:
        slowest = [max(rank["times"][name][i] for rank in everybody) for i in range(options.rounds)]
        found[(case.hidden, case.rows, name)] = {
            "N": case.size,
            "H": case.hidden,
            "T": case.rows,
            "name": name,
            "us": round(statistics.median(slowest), 3),
            "in_flight": libraries[0].in_flight(name) if "triton" in name else None,
            "min_us": round(min(slowest), 3),
            "max_us": round(max(slowest), 3),
            "bytes_pushed": bytes_pushed(case.size, case, name),
            "error_over_budget": max(rank["errors"][name] for rank in everybody) if name in errors else None,
        }


def partial(case, rank):
    generator = torch.Generator("cuda").manual_seed(1000 * case.rows + rank)
    return torch.randn(case.rows, case.hidden, device="cuda", generator=generator).to(torch.bfloat16)


def common(case):
    generator = torch.Generator("cuda").manual_seed(7)
    residual = torch.randn(case.rows, case.hidden, device="cuda", generator=generator).to(torch.bfloat16)
    weight = torch.randn(case.hidden, device="cuda", generator=generator).to(torch.bfloat16)
    return residual, weight


def exact(case, residual, weight):
    """(norm_out, residual_out) in fp64."""
    total = sum(partial(case, rank).double() for rank in range(case.size)) + residual.double()
    return total * torch.rsqrt((total**2).mean(-1, keepdim=True) + EPS) * weight.double(), total


def judge_torch(case, residual, weight, bits):
    """`judge` with the partial sums that were made on the GPU."""
    made = Case(case.size, case.rows, case.hidden)
    object.__setattr__(made, "partial", lambda rank: tensors.bits_of(partial(case, rank), "bfloat16"))
    common_bits = tensors.bits_of(residual, "bfloat16"), tensors.bits_of(weight, "bfloat16")
    object.__setattr__(made, "common", lambda: common_bits)
    return judge(made, *bits)


if __name__ == "__main__":
    main()
