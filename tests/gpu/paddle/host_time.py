"""Rank script: where the host time of an eager `finish` goes under Paddle; the GPU keeps up, so nothing waits for it.

    host_time.py host_time --device gpu [--hidden H]
    host_time.py                                         # in one process on a CPU: the launch does nothing

Each line is a part by itself; the last lines say what is Paddle's and Triton's own, and what is left. "In place" is
no way of the product: norm_out is written over the partial sum, or the sum over the residual too, to see what new
tensors cost.
"""

import itertools
import sys
import timeit
from types import SimpleNamespace

from runtime import Call, calls, opened, paddle, take_gpu

from fd_fusion.frameworks import triton_launch
from fd_fusion.spec import Fp8
from tests.binding.host_time import op_with

made_of, launcher = {}, triton_launch.launcher
STREAM_KNOWN = "the stream known"
FP8 = Fp8(by_column=True, keeps_norm=False)  # as FastDeploy's GEMM reads it


def recording(made, stream, like, tail):
    """What each launch was made of."""
    launch = launcher(made, stream, like, tail)
    made_of[launch] = made, like, tail
    return launch


def host_time(group, options):
    triton_launch.launcher = recording
    op, case = opened(group, options, rows=1)
    op.freeze()
    call = Call(op, case, group)
    call.run()
    raw, device = paddle._C._cuda_getCurrentRawStream, paddle.cuda.current_device()
    ways = ways_to_launch(op, case.weight_dtype, raw(device))
    parts = {"the current stream": lambda args: raw(device), **ways_as_parts(op, ways)}
    report(op, call.tensors, parts, _measure, {STREAM_KNOWN: ways[STREAM_KNOWN]})
    op.check()
    op.close()
    op, case = opened(group, options, rows=1, fp8=(FP8,))
    report_fp8(op, Call(op, case, group).tensors, _measure)
    op.check()
    op.close()


def _measure(part):
    return calls.host_us(part, paddle.device.synchronize)


def ways_to_launch(op, weight_dtype, stream):
    """Ways to launch the kernel of one-shot with a residual, by name: the product's own, and others."""
    launch = op._launches[weight_dtype, 0, False, False]
    made, like, tail = made_of[launch]
    inside, made.run.launch = made.run.launch, _nothing
    silent = launcher(made, lambda: stream, like, tail)
    made.run.launch = inside
    return {
        "prepared": launch,
        STREAM_KNOWN: launcher(made, lambda: stream, like, tail),
        "through Triton's Python": launcher(_slow(made), lambda: stream, like, tail),
        "Triton's C function does nothing": silent,
    }


def ways_as_parts(op, ways):
    return {f"bare launch, {name}": lambda args, way=way: way(op._plan.split, *args) for name, way in ways.items()}


def report_fp8(op, tensors, measure):
    """`finish_fp8`, codes and scales alone, with both sorts of tensors."""
    known, found = [Known(tensor) for tensor in tensors], {}
    for name, given in 2 * [("", tensors), (", dtypes interned", known)]:
        us = measure(lambda given=given: op.finish_fp8(*given, 1e-5, 0.0, FP8))
        print(f"host time, finish_fp8{name}: {us:.2f} us", flush=True)
        found[f"finish_fp8{name}"] = us
    return found


def _slow(made):
    """The same kernel, launched by Triton's Python."""
    return SimpleNamespace(
        run=lambda *given: made.run(*given), function=made.function, packed_metadata=made.packed_metadata
    )


def on_a_cpu():
    op = op_with(lambda constants: _nothing)
    wide = [paddle.empty([1, op._spec.hidden_size], dtype="bfloat16") for _ in range(2)]
    row = paddle.empty([op._spec.hidden_size], dtype="bfloat16")
    launches = ways_as_parts(op, {STREAM_KNOWN: _nothing})
    report(op, (*wide, row), launches, lambda part: min(timeit.repeat(part, number=300, repeat=200)) / 300 * 1e6)


def _nothing(*args):
    pass


class Known(paddle.base.core.eager.Tensor):
    """A tensor whose dtype is one object, as all are in Paddle 3.3; 2.6.2 makes one each time that it is asked."""

    dtype = paddle.bfloat16


def addresses(op, tensors):
    outputs = [op._new(tensors[0].shape, op._dtypes[0]) for _ in range(2)]
    return *(t.data_ptr() for t in (*tensors, *outputs)), *op._own, 1, 1, op._group.rank, 0, 1e-5, 0.0


def report(op, tensors, launches, measure, instead=None):
    """Measure and print all parts; returns them, by name.

    launches: more parts, which take the arguments of a launch. instead: launches in the place of `finish`'s own.
    """
    x, residual, weight = tensors
    known = [Known(tensor) for tensor in tensors]
    args, ops, dtype, place = addresses(op, tensors), paddle._C_ops, x.dtype, x.place
    cpu, one = paddle.CPUPlace(), [(op._plan.split, 0, 1, 1)]
    by_name = {"its launch does nothing": _nothing, STREAM_KNOWN: _nothing, **(instead or {})}
    new, shape = op._new, x.shape

    def interned():
        return op.finish(*known, 1e-5, 0.0)

    parts = {
        "finish": lambda: op.finish(x, residual, weight, 1e-5, 0.0),
        "finish, dtypes interned": interned,
        "x.shape": lambda: x.shape,
        "x.dtype": lambda: x.dtype,
        "x.place": lambda: x.place,
        "two shapes and two dtypes compared": lambda: (
            residual.shape != x.shape or (x.dtype, residual.dtype) != op._dtypes
        ),
        "the same, dtypes interned": lambda: (
            known[1].shape != known[0].shape or (known[0].dtype, known[1].dtype) != op._dtypes
        ),
        "launches of the weight": lambda: op._launches_for(weight),
        "the same, dtype interned": lambda: op._launches_for(known[2]),
        "five data_ptr()": lambda: (x.data_ptr(), x.data_ptr(), x.data_ptr(), x.data_ptr(), x.data_ptr()),
        "three is_contiguous()": lambda: x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous(),
        "two outputs as the product makes them": lambda: (new(shape, dtype), new(shape, dtype)),
        "two _C_ops.empty": lambda: (ops.empty(shape, dtype, place), ops.empty(shape, dtype, place)),
        "two _C_ops.empty on the CPU": lambda: (ops.empty(shape, dtype, cpu), ops.empty(shape, dtype, cpu)),
        "two _C_ops.empty_like": lambda: (ops.empty_like(x, dtype, place), ops.empty_like(x, dtype, place)),
        "two paddle.empty": lambda: (paddle.empty(shape, dtype), paddle.empty(shape, dtype)),
        "_launch, its launch does nothing": lambda: op._launch(_nothing, one, *args[:5], 1e-5, 0.0, None),
        **{name: lambda part=part: part(args) for name, part in launches.items()},
    }
    for _ in range(2):  # the second time is the one to read
        found = {name: measure(part) for name, part in parts.items()}
        for name, sums in {"norm_out in place": new, "both outputs in place": lambda *_: known[1]}.items():
            turns = itertools.cycle((sums, lambda *_: known[0]))  # the sum is made first
            op._new = lambda *what, turns=turns: next(turns)(*what)
            found[f"finish, dtypes interned, {name}"] = measure(interned)
        op._new = new
        kernels = op._of_weights
        for name, launch in by_name.items():
            op._of_weights = [(of, dict.fromkeys(launches, launch)) for of, launches in kernels]
            found[f"finish, {name}"] = measure(parts["finish"])
            found[f"finish, dtypes interned, {name}"] = measure(interned)
        op._of_weights = kernels
        for name, us in found.items():
            print(f"host time, {name}: {us:.2f} us", flush=True)
    own = found["two _C_ops.empty"] + found[f"bare launch, {STREAM_KNOWN}"]
    comparing = found["finish"] - found["finish, dtypes interned"]
    print(f"host time, of it two outputs and a bare launch: {own:.2f} us, comparing dtypes: {comparing:.2f} us")
    stream = found["finish, dtypes interned"] - found[f"finish, dtypes interned, {STREAM_KNOWN}"]
    print(f"host time, the stream asked for: {stream:.2f} us")
    left = found["what is left"] = found["finish"] - own - comparing - stream
    print(f"host time, what is left: {left:.2f} us", flush=True)
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_gpu()
        calls.host_time = host_time
        calls.main()
    else:
        on_a_cpu()
