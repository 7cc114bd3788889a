"""Rank script, GPU with torch: many CUDA-graph replays of calls with changing T, each fed by the one before.

    replays.py WHAT ... [--calls 100000]: replays, staying, host_time, dependent_launch

What a rank sends depends on what it received, so a word taken from another call makes the ranks' bits differ.
"""

import hashlib
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import triton_calls as calls

from fd_fusion.backends.triton_setup import ONE_SHOT
from fd_fusion.frameworks import triton_launch
from fd_fusion.kernels.all_reduce import plan as plans
from tests.support import tensors
from tests.support.all_reduce_cases import Case

_ROWS = (1, 8, 3, 16, 2, 5, 1, 33, 4, 1)


class Chain:
    """Steps of changing T over one state: x_{i+1} = norm_i * (rank + 1) / N, residual_{i+1} = residual_i / 2."""

    def __init__(self, group, case, op, options):
        self.group, self.case, self.op = group, case, op
        residual, weight = case.common()
        self.x = tensors.tensor(case.partial(group.rank), case.dtype, options.device)
        self.residual = tensors.tensor(residual, case.dtype, options.device)
        self.weight = tensors.tensor(weight, case.weight_dtype, options.device)

    def round(self):
        for T in _ROWS:
            norm, summed = self.op.finish(self.x[:T], self.residual[:T], self.weight, self.case.eps, 0.0)
            self.x[:T] = norm * ((self.group.rank + 1) / self.group.size)
            self.residual[:T] = summed * 0.5

    def digest(self):
        bits = tensors.bits_of(self.residual, self.case.dtype)
        assert abs(tensors.from_bits(bits, self.case.dtype)).max() < 1e3
        return hashlib.sha256(bits.tobytes()).hexdigest()


def replays(group, options):
    import torch

    case = Case(group.size, max(_ROWS), options.hidden)
    op = calls.open_op(group, case, options)
    eager = Chain(group, case, op, options)
    for _ in range(3):
        eager.round()
    graphed = Chain(group, case, op, options)
    torch.cuda.synchronize()
    op.freeze()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.round()
    rounds = options.calls // len(_ROWS)
    start = time.monotonic()
    for number in range(rounds):
        graph.replay()
        if number == 2:
            torch.cuda.synchronize()
            assert graphed.digest() == eager.digest(), "three replays differ from three eager rounds"
        if number % 500 == 0:
            torch.cuda.synchronize()
            op.check()
    torch.cuda.synchronize()
    op.check()
    us = (time.monotonic() - start) / (rounds * len(_ROWS)) * 1e6
    print(f"{rounds * len(_ROWS)} calls by replay, {us:.1f} us a call with the work between them")
    calls.digest.update(graphed.digest().encode())
    del graph
    op.close()


def staying(group, options):
    """Three calls one behind the other, whose residual stays with its owners from some T on, against the same with
    residuals that come back: by replay, with T on both sides of the start of two-shot."""
    import torch

    case, ends = Case(group.size, max(_ROWS), options.hidden), []
    for stays in (False, True):
        op = calls.open_op(group, case, options, two_shot_rows=5)
        chain = Chain(group, case, op, options)

        def step(op=op, chain=chain, stays=stays):
            for T in _ROWS:
                norm, summed = chain.x[:T], chain.residual[:T]
                for last in (False, False, True):
                    norm, summed = op.finish(norm, summed, chain.weight, case.eps, 0.0, stays and not last)
                    norm = norm * ((group.rank + 1) / group.size)
                chain.x[:T] = norm
                chain.residual[:T] = summed * 0.25

        step()
        torch.cuda.synchronize()
        op.freeze()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for number in range(options.calls // (3 * len(_ROWS))):
            graph.replay()
            if number % 500 == 0:
                torch.cuda.synchronize()
                op.check()
        torch.cuda.synchronize()
        op.check()
        ends.append(chain.digest())
        del graph
        op.close()
    assert ends[0] == ends[1], "a residual that stays changes the bits"
    calls.digest.update(ends[1].encode())


def dependent_launch(group, options):
    """A chain fused -> GEMM -> fused -> q/k norm, with T changing from graph to graph: programmatic dependent launch
    changes no bit. Each graph starts from what the one before has left."""
    import torch

    from fd_fusion.backends import qk_rms_norm as qk_norm

    case, ends = Case(group.size, 256, options.hidden), {}
    mixing = torch.randn(options.hidden, options.hidden, device="cuda", dtype=torch.bfloat16) * 0.01
    heads = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    for pdl in ("0", "1"):
        os.environ["FD_ENABLE_PDL"] = pdl
        qk_norm.launcher.cache_clear()
        op = calls.open_op(group, case, options)
        chain = Chain(group, case, op, options)

        def step(T, op=op, chain=chain):
            norm, summed = op.finish(chain.x[:T], chain.residual[:T], chain.weight, case.eps, 0.0)
            norm, summed = op.finish(norm @ mixing, summed, chain.weight, case.eps, 0.0)
            count = options.hidden // 256
            qk_norm.qk_rms_norm(norm, heads, heads, q_heads=count, kv_heads=count, head_dim=128, eps=case.eps)
            chain.x[:T] = norm * ((group.rank + 1) / group.size)
            chain.residual[:T] = summed * 0.5

        graphs = []
        for T in (1, 256, 3, 64, 8):
            step(T)
            torch.cuda.synchronize()
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                step(T)
        for number in range(options.calls):
            graphs[number % len(graphs)].replay()
            if number % 500 == 0:
                torch.cuda.synchronize()
                op.check()
        torch.cuda.synchronize()
        op.check()
        ends[pdl] = chain.digest()
        del graphs
        op.close()
    assert ends["0"] == ends["1"], "dependent launch changes the bits"
    calls.digest.update(ends["1"].encode())


def host_time(group, options):
    """Host time of a call, and of its parts; the GPU keeps up, so nothing waits for it."""
    import torch

    case = Case(group.size, 1, options.hidden)
    op = calls.open_op(group, case, options)
    residual, weight = (tensors.tensor(bits, case.dtype, options.device) for bits in case.common())
    x = tensors.tensor(case.partial(group.rank), case.dtype, options.device)
    out = torch.empty_like(x), torch.empty_like(x)
    addresses = [t.data_ptr() for t in (x, residual, weight, *out)]
    run = op._launches[case.weight_dtype, ONE_SHOT, False, False]
    kernel = triton_launch.load_kernel("all_reduce.kernel", "all_reduce_rms_norm")
    constants = plans.constants(op._plan, weight_dtype=case.dtype, has_residual=True, two_shot=False)
    args = (*addresses, *op._own, 1, 1, group.rank, 0, case.eps, 0.0)
    parts = {
        "finish": lambda: op.finish(x, residual, weight, case.eps, 0.0),
        "two empty_like": lambda: (torch.empty_like(x), torch.empty_like(x)),
        "prepared launch": lambda: run(op._plan.split, *args),
        "triton's own launch": lambda: kernel[(op._plan.split,)](*args, **constants),
    }
    for name, part in parts.items():
        print(f"host time, {name}: {calls.host_us(part, torch.cuda.synchronize):.2f} us")
    op.check()
    op.close()


if __name__ == "__main__":
    calls.replays, calls.host_time, calls.dependent_launch, calls.staying = (
        replays,
        host_time,
        dependent_launch,
        staying,
    )
    calls.main()
