"""Rank script: the triton backend under Paddle's own CUDA runtime. All of `triton_calls.py` and `faults.py`, and what
only Paddle's runtime can show: a function for each below.

    runtime.py WHAT ... --device gpu [--hidden H] [--calls N]
"""

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
sys.path[:0] = [ROOT, f"{ROOT}/tests/dist"]

import faults
import numpy as np
import paddle
import triton_calls as calls
from paddle.device.cuda.graphs import CUDAGraph

from fd_fusion.backends.qk_rms_norm import qk_rms_norm
from fd_fusion.cli.processes.ranks import join_paddle
from fd_fusion.comm.symmetric_memory import barrier
from fd_fusion.reasons import FusionTimeout
from tests.support import tensors
from tests.support.all_reduce_cases import Case, judge
from tests.support.ranks import this_rank


class Call:
    """The tensors of one call, and what it gave: judged by `right`, which compares bits with the first call's."""

    def __init__(self, op, case, group):
        self.op, self.case = op, case
        bits = case.partial(group.rank), *case.common()
        kinds = case.dtype, case.dtype, case.weight_dtype
        self.tensors = [tensors.tensor(one, kind, "gpu") for one, kind in zip(bits, kinds)]
        self.outputs = self.first = None

    def run(self):
        self.outputs = self.op.finish(*self.tensors, self.case.eps, self.case.weight_offset)
        return self.outputs

    def bits(self):
        paddle.device.synchronize()
        return [tensors.bits_of(out, self.case.dtype) for out in self.outputs]

    def right(self):
        bits = self.bits()
        assert judge(self.case, *bits) <= 1
        self.first = self.first or [one.tobytes() for one in bits]
        assert self.first == [one.tobytes() for one in bits], "other bits than the first call's"

    def nan_or_right(self):
        """What a call that ran out of time may have left: NaN, or what came before the other rank died."""
        bits = self.bits()
        for one, right in zip(bits, self.first):
            values = tensors.from_bits(one, self.case.dtype)
            assert (values != values).all() or one.tobytes() == right, "numbers that nobody sent"

    def spoil(self):
        """Write over the outputs, so that a replay that writes nothing is found."""
        paddle.device.synchronize()
        for out in self.outputs:  # 0xFFFF is a NaN
            nbytes = ctypes.c_size_t(out.element_size() * self.case.rows * self.case.hidden)
            assert ctypes.CDLL("libcuda.so.1").cuMemsetD8_v2(ctypes.c_uint64(out.data_ptr()), 0xFF, nbytes) == 0


_graphs = []


@contextlib.contextmanager
def captured(mode="thread_local"):
    """Capture a graph, and keep it: Paddle ends a process that destroys a graph during the next capture."""
    graph = CUDAGraph(mode=mode, place=paddle.CUDAPlace(paddle.cuda.current_device()))
    _graphs.append(graph)
    graph.capture_begin()
    try:
        yield graph
    finally:  # Paddle ends a process that drops a graph in the middle of a capture, and says nothing of the error
        graph.capture_end()


def graphed(op, case, group):
    """A call, and the graph of it."""
    call = Call(op, case, group)
    with captured() as graph:
        call.run()
    return call, graph


def opened(group, options, rows=64, **changes):
    case = Case(group.size, rows, options.hidden)
    op = calls.open_op(group, case, options, **changes)
    Call(op, case, group).run()
    return op, case


def graph_modes(group, options):
    """Captures in each mode while the watcher runs and another thread calls `check` without a pause."""
    op, case = opened(group, options)
    op.freeze()
    for mode in ("thread_local", "relaxed", "global"):
        ended, said = threading.Event(), []

        def checking(ended=ended, said=said):
            while not ended.is_set():
                op.check()
                said.append(1)

        thread = threading.Thread(target=checking)
        thread.start()
        try:
            call = Call(op, case, group)
            for _ in range(20):
                paddle.device.synchronize()
                with captured(mode) as graph:
                    first = call.run()
                    second = op.finish(call.tensors[0], first[1], *call.tensors[2:], case.eps, 0.0)
                    time.sleep(0.02)  # the watcher looks meanwhile
                call.spoil()
                for _ in range(10):
                    graph.replay()
                call.right()
                del second
        finally:
            ended.set()
            thread.join()
        op.check()
        print(f"{mode}: 20 captures, {len(said)} checks of another thread")
    op.close()


def growing_pools(group, options):
    """Replays while Paddle's allocator hands out, takes back and grows: the graph's own memory stays its own."""
    op, case = opened(group, options)
    op.freeze()
    call, graph = graphed(op, case, group)
    held, generator = [], np.random.default_rng(group.rank)
    for step in range(300):
        graph.replay()
        held.append(paddle.empty([int(generator.integers(1, 1 << 24))], dtype="float32"))
        if len(held) > 40:
            del held[:: int(generator.integers(2, 5))]
        if step % 50 == 0:
            call.right()
            op.check()
            call.spoil()
        if step % 100 == 99:
            paddle.device.synchronize()
            held.clear()
            gc.collect()
            paddle.device.cuda.empty_cache()
    graph.replay()
    call.right()
    op.check()
    print("reserved", paddle.device.cuda.max_memory_reserved() >> 20, "MiB")
    op.close()


def two_streams(group, options):
    """Eager calls and replays on two streams of Paddle in turn, each after the other by an event."""
    op, case = opened(group, options)
    op.freeze()
    streams = [paddle.device.cuda.Stream() for _ in range(2)]
    calls_of = [Call(op, case, group) for _ in streams]
    paddle.device.synchronize()
    for step in range(200):
        stream = streams[step % 2]
        stream.wait_stream(streams[1 - step % 2])
        with paddle.device.cuda.stream_guard(stream):
            calls_of[step % 2].run()
    for call in calls_of:
        call.right()
    op.check()
    print("streams", [hex(stream.cuda_stream) for stream in streams])
    op.close()


def graph_after_reset(group, options):
    """A timeout inside a replay: NaN and FusionTimeout, then a reset; the graph that was captured before it, and a
    new one, give the right bits."""
    op, case = opened(group, options)
    faults._patience(op, faults.SHORT_S)
    call, graph = graphed(op, case, group)
    graph.replay()
    call.right()
    assert barrier(group, "captured", 60)
    for generation in (1, 2):
        if not faults._faulty(group):
            start = time.monotonic()
            graph.replay()
            values = [tensors.from_bits(bits, case.dtype) for bits in call.bits()]
            assert all((one != one).all() for one in values), "finite numbers after a timeout"
            text = _must_raise(op)
            assert "missing rank" in text or "another rank" in text, text
            print(f"{time.monotonic() - start:.1f} s: {text}")
        assert barrier(group, f"given up {generation}", 60)
        _must_raise(op)
        op.reset()
        for _ in range(100):
            graph.replay()
        call.right()
        op.check()
        later, again = graphed(op, case, group)  # the outputs of the first graph stay the first call's
        later.spoil()
        again.replay()
        later.right()
        op.check()
    op.close()


def _must_raise(op):
    try:
        op.check()
    except FusionTimeout as error:
        return str(error)
    raise AssertionError("no FusionTimeout")


def _killed(group, options, when):
    """The last rank dies; the others' replays end, with the missing rank's name."""
    op, case = opened(group, options)
    faults._patience(op, faults.SHORT_S)
    call, graph = graphed(op, case, group)
    for _ in range(100):
        graph.replay()
    call.right()
    if faults._faulty(group):
        if when == "in":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
            while True:
                graph.replay()
                paddle.device.synchronize()
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    while time.monotonic() - start < 30:
        try:
            (call.run if when == "eager" else graph.replay)()
            paddle.device.synchronize()
            op.check()
        except FusionTimeout as error:
            print(f"{time.monotonic() - start:.1f} s: {error}")
            break
    else:
        raise AssertionError("no FusionTimeout")
    call.nan_or_right()
    start = time.monotonic()
    op.close()
    assert time.monotonic() - start < 20, "close waits for a dead rank"


def dies_eager(group, options):
    _killed(group, options, "eager")


def dies_in_replay(group, options):
    _killed(group, options, "in")


def dies_between_replays(group, options):
    _killed(group, options, "between")


def many_replays(group, options):
    """`--calls` calls by replay, each fed by the one before; the counters are read all along."""
    op, case = opened(group, options)
    op.freeze()
    call = Call(op, case, group)
    each = 20
    with captured() as graph:
        outputs = call.run()
        for _ in range(each - 1):
            outputs = op.finish(outputs[0], outputs[1], call.tensors[2], case.eps, 0.0)
    before, start = op.stats()["device"], time.monotonic()
    for number in range(options.calls // each):
        graph.replay()
        if number % 500 == 0:
            paddle.device.synchronize()
            op.check()
            calls.digest.update(tensors.bits_of(outputs[1], case.dtype).tobytes())
    paddle.device.synchronize()
    took = time.monotonic() - start
    op.check()
    call.right()
    count = options.calls // each * each
    after = op.stats()["device"]
    assert after["calls"] - before["calls"] == count and after["rows"] - before["rows"] == count * case.rows
    calls.digest.update(tensors.bits_of(outputs[0], case.dtype).tobytes())
    print(f"{count} calls by replay, T={case.rows} H={case.hidden}: {took / count * 1e6:.2f} us a call")
    op.close()


def little_memory(group, options):
    """Paddle's pool takes almost all memory first: the op opens in what is left, or all ranks refuse alike.

    Where the ranks share a GPU the first one takes it.
    """
    held, shared = [], paddle.device.cuda.device_count() < group.size
    assert barrier(group, "here", 60), "every rank has its context, which takes memory too"
    for size in () if shared and group.rank else (1 << 30, 1 << 26):
        with contextlib.suppress(Exception):  # Paddle says that its memory is exhausted
            while paddle.cuda.mem_get_info()[0] > size + (192 << 20):
                held.append(paddle.empty([size], dtype="uint8"))
    assert barrier(group, "taken", 60)
    print("left", paddle.cuda.mem_get_info()[0] >> 20, "MiB of", len(held), "blocks")
    op, case = opened(group, options)
    call = Call(op, case, group)
    for _ in range(20):
        call.run()
        call.right()
    op.check()
    op.close()
    del held


def nccl_in_turn(group, options):
    """All-reduces of Paddle's NCCL group, which is made after the op, and replays in turn."""
    op, case = opened(group, options)
    op.freeze()
    join_paddle(group.rank, group.size, [int(port) for port in os.environ["FD_PORTS"].split(",")], "nccl")
    summed = paddle.to_tensor(np.full((4, 8), 1.0, np.float32))
    paddle.distributed.all_reduce(summed)
    assert (summed.numpy() == group.size).all()
    call, graph = graphed(op, case, group)
    for step in range(500):
        graph.replay()
        paddle.distributed.all_reduce(summed)
        if step % 20 == 19:
            assert np.isfinite(summed.numpy()).all()
            summed = paddle.to_tensor(np.full((4, 8), 1.0, np.float32))
    call.right()
    op.check()
    op.close()
    paddle.distributed.barrier()


def qk_norm(group, options):
    """The q/k norm in place on rows that are strided: q and k are right, all else keeps its bits."""
    heads, kv_heads, dim, rows, eps = 8, 2, 128, 33, 1e-6
    width, used = (heads + 2 * kv_heads) * dim, (heads + kv_heads) * dim
    for dtype in ("float32", "bfloat16", "float16"):
        for left in (0, 16):
            generator = np.random.default_rng(left)
            bits = tensors.to_bits(generator.standard_normal((rows, left + width + 16)), dtype)
            weights = [tensors.to_bits(generator.standard_normal(dim), dtype) for _ in range(2)]
            scale = [tensors.tensor(one, dtype, "gpu") for one in weights]
            want = tensors.from_bits(bits, dtype)[:, left : left + used].reshape(rows, -1, dim).astype(np.float64)
            want = want / np.sqrt((want**2).mean(-1, keepdims=True) + eps)
            by_head = [weights[0]] * heads + [weights[1]] * kv_heads
            want *= np.stack([tensors.from_bits(one, dtype) for one in by_head])
            for graphed in (False, True):
                whole = tensors.tensor(bits, dtype, "gpu")
                qkv = whole[:, left : left + width]
                assert not qkv.is_contiguous() and qkv.data_ptr() == whole.data_ptr() + left * whole.element_size()
                paddle.device.synchronize()
                if graphed:
                    with captured() as graph:
                        qk_rms_norm(qkv, *scale, q_heads=heads, kv_heads=kv_heads, head_dim=dim, eps=eps)
                    graph.replay()
                else:
                    qk_rms_norm(qkv, *scale, q_heads=heads, kv_heads=kv_heads, head_dim=dim, eps=eps)
                paddle.device.synchronize()
                got = tensors.bits_of(whole, dtype)
                kept = np.r_[0:left, left + used : bits.shape[1]]
                assert (got[:, kept] == bits[:, kept]).all(), "something else was written"
                values = tensors.from_bits(got, dtype)[:, left : left + used].reshape(want.shape)
                close = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype] * np.abs(want) + 1e-6
                assert (np.abs(values - want) <= close).all(), (dtype, np.abs(values - want).max())
    print("q/k norm: three dtypes, strided, eager and by graph")


def leaves_open(group, options):
    """The process ends with an op open and a graph alive."""
    op, case = opened(group, options)
    op.freeze()
    call, graph = graphed(op, case, group)
    graph.replay()
    call.right()
    leaves_open.kept = op, call, graph


def take_gpu():
    """Give this rank its GPU, and make the context current."""
    paddle.set_grad_enabled(False)
    paddle.set_device(f"gpu:{this_rank() % paddle.device.cuda.device_count()}")
    paddle.empty([1])


if __name__ == "__main__":
    take_gpu()
    calls.CODES, calls.FP8_ROWS = "uint8", (1, 5, 3)  # Paddle 2.6.2: no FP8; a tensor of no rows has no address
    for module in (faults, sys.modules["__main__"]):
        found = {name: value for name, value in vars(module).items() if callable(value) and name[0] != "_"}
        calls.__dict__.update({name: value for name, value in found.items() if value.__module__ == module.__name__})
    calls.main()
