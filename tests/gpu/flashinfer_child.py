"""FlashInfer's real kernel through the backend's own calls, on torch tensors. Run by test_flashinfer.py.

usage: flashinfer_child.py virtual:N two_shot:N ...       N virtual ranks in this process, on N streams
       flashinfer_child.py hang                           one of two, which waits for the other in vain
       flashinfer_child.py process [versus]               a rank of tests.support.ranks, over CUDA IPC; beside triton

Prints one line of JSON for each case; any miss is an exception.
"""

import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch

from fd_fusion.backends.flashinfer import backend as flashinfer
from fd_fusion.backends.flashinfer import loader
from fd_fusion.backends.flashinfer import op as flashinfer_op
from fd_fusion.backends.flashinfer.calls import block_threads, compiled_call, rules
from fd_fusion.backends.flashinfer.op import FlashInferOp
from fd_fusion.backends.flashinfer.watchdog import ControlReader
from fd_fusion.backends.flashinfer.workspace import Layout, fill
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group, working
from fd_fusion.frameworks.tensors import tensor
from tests.support.flashinfer_spec import spec

EPS = 1e-6
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


def inputs(size, rows, hidden, dtype, seed):
    """(partials of all ranks, residual, weight): random, with -0.0 and subnormals of both signs strewn in."""
    torch.manual_seed(seed)
    x = torch.randn(size, rows, hidden, device="cuda").to(dtype)
    tiny = SMALLEST[dtype] * torch.tensor([-0.0, -1.0, 1.0, -3.0, 100.0, -100.0], device="cuda", dtype=torch.float64)
    x[:, :, : len(tiny)] = tiny.to(dtype)
    x[0, :, 64:96] = -0.0  # alone, beside numbers of the other ranks
    x[:, -1, ::2] = -0.0  # half a row of the sum is zero
    residual = torch.randn(rows, hidden, device="cuda").to(dtype)
    residual[:, :4] = 0
    return x, residual, (0.5 + torch.rand(hidden, device="cuda")).to(dtype)


def truth_and_bound(x, residual, weight, offset):
    """Both outputs in fp64, and how far three roundings may take the kernel from them.

    u is the unit roundoff of the dtype, s = a + residual, a the sum. The sum is rounded once (u |a|), the residual
    stream once more (u |s| and what the first left), and the norm sees those: an error d of s moves s/rms by
    d/rms, and by |s|/rms times the relative error of rms, which is at most ||d||/||s||. A last rounding gives u |y|.
    fp32 arithmetic adds a few 2^-24, and flushes its own subnormals to zero (fast math).
    """
    u, fp32 = UNIT[x.dtype], 2.0**-24
    floor = max(SMALLEST[x.dtype], (len(x) + 1) * 2.0**-126)
    x, residual, weight = x.double(), residual.double(), weight.double() + offset
    a, s = x.sum(0), x.sum(0) + residual
    rms = (s.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    y = s / rms * weight
    d = (
        u * a.abs()
        + u * (s.abs() + u * a.abs())
        + (len(x) + 1) * fp32 * (x.abs().sum(0) + residual.abs())
        + 2 * floor
    )
    of_rms = d.pow(2).mean(-1, keepdim=True).sqrt() / rms
    e = weight.abs() / rms * d * (1 + of_rms) + y.abs() * of_rms * (1 + of_rms)
    e = e + u * (y.abs() + e) + 32 * fp32 * y.abs() + floor
    return (y, e), (s, d)


def compare(outputs, x, residual, weight, offset):
    """Both outputs of every rank within the bound, and the same bits on all ranks. Returns the worst error/bound."""
    worst = []
    for which, (truth, bound) in enumerate(truth_and_bound(x, residual, weight, offset)):
        first = outputs[0][which]
        for rank, pair in enumerate(outputs):
            as_bits = (pair[which].view(torch.uint8), first.view(torch.uint8))
            assert torch.equal(*as_bits), f"rank {rank} differs from rank 0 in output {which}"
        worst.append(((first.double() - truth).abs() / bound).max().item())
    assert max(worst) <= 1.0, f"error/bound {worst}"
    return worst


def report(**what):
    print(
        json.dumps({name: [round(v, 3) for v in one] if isinstance(one, list) else one for name, one in what.items()})
    )


def virtual_ranks(version, entry, size, hidden, dtype, rows, timeout_s=30.0):
    """A `FlashInferOp` for each of N ranks of this process, over memory laid out and filled as `open` does it."""
    provider, name = CudaIpc(), str(dtype).removeprefix("torch.")
    layout = Layout(size, rows, hidden, dtype.itemsize)
    addresses = tuple(provider.allocate(layout.nbytes)[0] for _ in range(size))
    ops = []
    for rank in range(size):
        provider.fill(addresses[rank], layout.nbytes)
        memory = SimpleNamespace(addresses=addresses, own=addresses[rank], provider=provider)
        fill(layout, memory)
        table = tensor(torch, np.array(layout.pointers(memory)), "int64", "gpu")
        known = spec(rank=rank, size=size, hidden_size=hidden, dtype=name, timeout_s=timeout_s)
        group = Group("virtual", rank, size, tuple(range(size)), None)
        read = ControlReader(addresses[rank] + layout.control)

        def release(*, wait, address=addresses[rank]):
            provider.free(address)
            return True

        call = compiled_call(entry, version, size, rank, hidden, table)
        ops.append(FlashInferOp(known, group, version, call, rows, layout.nbytes, read, release))
    provider.synchronize()
    return ops


def fill_allocator(ops, streams, hidden, dtype):
    """Let the allocator of each stream have what the calls take, before anybody waits for a peer."""
    for one, stream in zip(ops, streams):
        with torch.cuda.stream(stream):
            kept = [torch.empty(one.limit, hidden, dtype=dtype, device="cuda") for _ in range(6)]
            del kept
    torch.cuda.synchronize()


def run_calls(ops, streams, steps):
    """Every rank's calls on its own stream, interleaved; outputs by step and rank."""
    main = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(main)
    outputs = []
    for x, residual, weight, offset in steps:
        outputs.append([])
        for rank, (one, stream) in enumerate(zip(ops, streams)):
            with torch.cuda.stream(stream):
                outputs[-1].append(one.finish(x[rank], residual, weight, EPS, offset))
    for stream in streams:
        main.wait_stream(stream)
    return outputs


def check_steps(ops, streams, steps, rounds=3):
    """The calls eagerly, then as one graph replayed: right each time, and the same bits each time."""
    outputs = run_calls(ops, streams, steps)
    torch.cuda.synchronize()
    worst = [compare(out, *step) for out, step in zip(outputs, steps)]
    kept = [pair[0].clone() for out in outputs for pair in out[:1]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_calls(ops, streams, steps)
    for _ in range(rounds):
        graph.replay()
        torch.cuda.synchronize()
        for out, step, eager in zip(captured, steps, kept):
            compare(out, *step)
            assert torch.equal(out[0][0].view(torch.uint8), eager.view(torch.uint8)), "a replay gave other bits"
    return [max(one[which] for one in worst) for which in (0, 1)]


def close_all(ops):
    """Together, since each waits to see its kernel idle."""
    with ThreadPoolExecutor(len(ops)) as pool:
        list(pool.map(FlashInferOp.close, ops))
    assert not any(one._watchdog._threads[0].is_alive() for one in ops), "a call was taken for running"


def virtual(size, version, entry):
    streams = [torch.cuda.Stream() for _ in range(size)]
    rule = rules(version)
    most = {2: 8, 4: 4, 8: 4}[size]
    for hidden, dtype in (
        (4096, torch.bfloat16),
        (4096, torch.float16),
        (2880, torch.bfloat16),
        (4608, torch.bfloat16),
    ):
        if rule.whole_warps and block_threads(hidden, dtype.itemsize) % 32:
            refusal = flashinfer._version_refusal(spec(hidden_size=hidden, size=size), version)
            report(case="virtual", N=size, H=hidden, refused=str(refusal))
            continue
        ops = virtual_ranks(version, entry, size, hidden, dtype, most)
        fill_allocator(ops, streams, hidden, dtype)
        rows = [1, most, 2, 3, 1, most, most - 1, 2]
        steps = []
        for index, count in enumerate(rows):
            x, residual, weight = inputs(size, count, hidden, dtype, index)
            if index == 3:
                residual = torch.zeros_like(residual)
            steps.append((x, residual, weight, float(index % 2) if rule.weight_bias else 0.0))
        worst = check_steps(ops, streams, steps)
        report(
            case="virtual", N=size, H=hidden, dtype=str(dtype), T=str(rows), norm_and_residual_error_of_bound=worst
        )
        close_all(ops)


def two_shot(size, version, entry):
    """Rows above N, with the threshold at nothing."""
    if not rules(version).two_shot:
        report(case="two_shot", N=size, refused="below 0.7.2")
        return
    flashinfer_op._ONE_SHOT_BYTES = dict.fromkeys(flashinfer_op._ONE_SHOT_BYTES, 0)
    streams, hidden, dtype = [torch.cuda.Stream() for _ in range(size)], 4096, torch.bfloat16
    ops = virtual_ranks(version, entry, size, hidden, dtype, 16)
    fill_allocator(ops, streams, hidden, dtype)
    rows = [size + 1, 1, 12, size + 2, 12, 2]
    steps = [(*inputs(size, count, hidden, dtype, index), 1.0) for index, count in enumerate(rows)]
    assert [ops[0].one_shot(count) for count in rows] == [False, True, False, False, False, True]
    report(case="two_shot", N=size, T=str(rows), norm_and_residual_error_of_bound=check_steps(ops, streams, steps))


def hang(version, entry):
    """Only rank 0 replays its graph; the watchdog must end this process, and nothing else may."""
    ops = virtual_ranks(version, entry, 2, 4096, torch.bfloat16, 4, timeout_s=2.0)
    streams = [torch.cuda.Stream() for _ in range(2)]
    fill_allocator(ops, streams, 4096, torch.bfloat16)
    step = (*inputs(2, 2, 4096, torch.bfloat16, 0), 0.0)
    run_calls(ops, streams, [step])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops[0].finish(step[0][0], step[1], step[2], EPS, 0.0)
    ops[0].freeze()
    print("replaying alone", flush=True)
    graph.replay()
    torch.cuda.synchronize()
    raise AssertionError("a call without its peer ended")


def process():
    """A rank of its own process: the whole backend, from the vote to the close."""
    from tests.support.ranks import this_group, this_rank

    torch.cuda.set_device(this_rank() % torch.cuda.device_count())
    torch.zeros(1, device="cuda")
    group, dtype = this_group("tp"), torch.bfloat16
    adds_bias = rules(loader.installed_version()).weight_bias
    for hidden in (4096, 4608):
        known = spec(rank=group.rank, size=group.size, hidden_size=hidden, max_token_num=64)
        if refusal := flashinfer.supports(known):
            report(case="process", rank=group.rank, H=hidden, refused=str(refusal))
            continue
        start = time.monotonic()
        with working(group):
            op = flashinfer.open(known, group)
        seconds = time.monotonic() - start
        rows, steps = [1, 64, 7, 33, 2, 64, 1, 5], []
        for index, count in enumerate(rows):
            x, residual, weight = inputs(group.size, count, hidden, dtype, index)
            steps.append((x, residual, weight, float(index % 2) if adds_bias else 0.0))
        op.freeze()
        own = [(step[0][group.rank], *step[1:3], EPS, step[3]) for step in steps]
        eager = [op.finish(*one) for one in own]
        torch.cuda.synchronize()
        worst = [compare([out], *step) for out, step in zip(eager, steps)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [op.finish(*one) for one in own]
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            for out, first in zip(captured, eager):
                assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(out, first))
        if hidden == 4096 and sys.argv[2:] == ["versus"]:
            versus_triton(known, group, own, eager, steps)
        digest = sum(int(out.view(torch.int16).long().sum()) for pair in eager for out in pair)
        digests = flashinfer.agree_or_raise(group, "digest", None, digest, 30.0)
        assert len(set(digests)) == 1, f"ranks differ: {digests}"
        op.check()
        op.close()
        worst = [max(one[which] for one in worst) for which in (0, 1)]
        report(case="process", rank=group.rank, N=group.size, H=hidden, T=str(rows), open_s=round(seconds, 1),
               stats=op.stats(), norm_and_residual_error_of_bound=worst)  # fmt: skip


def versus_triton(known, group, own, eager, steps):
    """Both backends on the same numbers: each within the bound of the truth, and so within two of each other."""
    from fd_fusion.backends import triton

    with working(group):  # few programs, so that those of both processes fit on one GPU
        op = triton.open(dataclasses.replace(known, workspace_bytes=1 << 20), group)
    worst = []
    for one, out, step in zip(own, eager, steps):
        ours = op.finish(*one)
        torch.cuda.synchronize()
        compare([ours], *step)
        for theirs, mine, (_, bound) in zip(out, ours, truth_and_bound(*step)):
            worst.append(((theirs.double() - mine.double()).abs() / bound).max().item())
    assert max(worst) <= 2.0, worst
    op.check()
    op.close()
    report(case="flashinfer and triton", difference_of_bound=max(worst))


def main():
    if sys.argv[1] == "process":
        return process()
    torch.zeros(1, device="cuda")
    version = loader.installed_version()
    entry = loader.load(version)
    report(version=version)
    if sys.argv[1] == "hang":
        return hang(version, entry)
    for case in sys.argv[1:]:
        name, _, size = case.partition(":")
        {"virtual": virtual, "two_shot": two_shot}[name](int(size), version, entry)


if __name__ == "__main__":
    main()
