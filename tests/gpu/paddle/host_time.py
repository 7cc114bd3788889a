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
    launch = op._launches[case.weight_dtype, 0, False]
    made, like, tail = made_of[launch]
    raw = paddle._C._cuda_getCurrentRawStream
    stream, device = raw(paddle.cuda.current_device()), paddle.cuda.current_device()
    inside, made.run.launch = made.run.launch, _nothing
    silent = launcher(made, lambda: stream, like, tail)
    made.run.launch = inside
    bare = launcher(made, lambda: stream, like, tail)
    by_triton = launcher(_slow(made), lambda: stream, like, tail)
    launches = {
        "the current stream": lambda args: raw(device),
        "prepared launch": lambda args: launch(op._plan.split, *args),
        "bare launch, the stream known": lambda args: bare(op._plan.split, *args),
        "bare launch through Triton's Python": lambda args: by_triton(op._plan.split, *args),
        "bare launch, Triton's C function does nothing": lambda args: silent(op._plan.split, *args),
    }
    report(op, call.tensors, launches, lambda part: calls.host_us(part, paddle.device.synchronize), bare)
    op.check()
    op.close()
    _fp8(group, options)


def _fp8(group, options):
    form = Fp8(by_column=True, keeps_norm=False)  # as FastDeploy's GEMM reads it
    op, case = opened(group, options, rows=1, fp8=(form,))
    x, residual, weight = Call(op, case, group).tensors
    known = [Known(tensor) for tensor in (x, residual, weight)]
    for name, given in 2 * [("", (x, residual, weight)), (", dtypes interned", known)]:
        us = calls.host_us(lambda given=given: op.finish_fp8(*given, 1e-5, 0.0, form), paddle.device.synchronize)
        print(f"host time, finish_fp8{name}: {us:.2f} us", flush=True)
    op.check()
    op.close()


def _slow(made):
    """The same kernel, launched by Triton's Python."""
    return SimpleNamespace(
        run=lambda *given: made.run(*given), function=made.function, packed_metadata=made.packed_metadata
    )


def on_a_cpu():
    op = op_with(lambda constants: _nothing)
    wide = [paddle.empty([1, op._spec.hidden_size], dtype="bfloat16") for _ in range(2)]
    row = paddle.empty([op._spec.hidden_size], dtype="bfloat16")
    launches = {"bare launch, the stream known": lambda args: _nothing(1, *args)}
    report(op, (*wide, row), launches, lambda part: min(timeit.repeat(part, number=300, repeat=200)) / 300 * 1e6)


def _nothing(*args):
    pass


class Known(paddle.base.core.eager.Tensor):
    """A tensor whose dtype is one object, as all are in Paddle 3.3; 2.6.2 makes one each time that it is asked."""

    dtype = paddle.bfloat16


def addresses(op, tensors):
    outputs = [op._new(tensors[0].shape, op._dtypes[0]) for _ in range(2)]
    return *(t.data_ptr() for t in (*tensors, *outputs)), *op._own, 1, 1, op._group.rank, 0, 1e-5, 0.0


def report(op, tensors, launches, measure, bare=_nothing):
    x, residual, weight = tensors
    known = [Known(tensor) for tensor in tensors]
    args, ops, dtype, place = addresses(op, tensors), paddle._C_ops, x.dtype, x.place
    by_name = {"its launch does nothing": _nothing, "the stream known": bare}
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
        "two _C_ops.empty_like": lambda: (ops.empty_like(x, dtype, place), ops.empty_like(x, dtype, place)),
        "two paddle.empty": lambda: (paddle.empty(shape, dtype), paddle.empty(shape, dtype)),
        "_launch, its launch does nothing": lambda: op._launch(_nothing, 0, *args[:5], 1, 1e-5, 0.0, None),
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
            found[f"finish, dtypes interned, {name}"] = measure(interned)
        op._of_weights = kernels
        for name, us in found.items():
            print(f"host time, {name}: {us:.2f} us", flush=True)
    own = found["two _C_ops.empty"] + found["bare launch, the stream known"]
    comparing = found["finish"] - found["finish, dtypes interned"]
    print(f"host time, of it two outputs and a bare launch: {own:.2f} us, comparing dtypes: {comparing:.2f} us")
    stream = found["finish, dtypes interned"] - found["finish, dtypes interned, the stream known"]
    print(f"host time, the stream asked for: {stream:.2f} us")
    print(f"host time, what is left: {found['finish'] - own - comparing - stream:.2f} us", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_gpu()
        calls.host_time = host_time
        calls.main()
    else:
        on_a_cpu()
