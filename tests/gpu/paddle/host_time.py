"""Rank script: where the host time of an eager `finish` goes under Paddle; the GPU keeps up, so nothing waits for it.

    host_time.py host_time --device gpu [--hidden H]
    host_time.py                                         # in one process on a CPU: the launch does nothing

Each line is a part by itself; the last lines say what is Paddle's and Triton's own, and what is left.
"""

import sys
import timeit

from runtime import Call, calls, opened, paddle, take_gpu

from tests.binding.host_time import op_with


def host_time(group, options):
    op, case = opened(group, options, rows=1)
    op.freeze()
    call = Call(op, case, group)
    call.run()
    launch = op._launches[case.weight_dtype, False, False]
    raw = paddle._C._cuda_getCurrentRawStream
    stream, device = raw(paddle.cuda.current_device()), paddle.cuda.current_device()
    names = dict(zip(launch.__code__.co_freevars, (cell.cell_contents for cell in launch.__closure__)))
    run, loaded, tail = names["run"], names["loaded"], names["tail"]
    launches = {
        "the current stream": lambda args: raw(device),
        "prepared launch": lambda args: launch(op._plan.split, *args),
        "bare launch, the stream known": lambda args: run(op._plan.split, 1, 1, stream, *loaded, *args, *tail),
    }
    report(op, call.tensors, launches, lambda part: calls.host_us(part, paddle.device.synchronize))
    args, inside, run.launch = addresses(op, call.tensors), run.launch, _nothing
    only = calls.host_us(lambda: launch(op._plan.split, *args), paddle.device.synchronize)
    run.launch = inside
    print(f"host time, prepared launch, Triton's C function does nothing: {only:.2f} us", flush=True)
    op.check()
    op.close()


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
    outputs = op._empty_pair(tensors[0])
    return *(t.data_ptr() for t in (*tensors, *outputs)), *op._own, 1, op._group.rank, 0, 1e-5, 0.0


def report(op, tensors, launches, measure):
    x, residual, weight = tensors
    known = [Known(tensor) for tensor in tensors]
    args, ops, dtype, place = addresses(op, tensors), paddle._C_ops, x.dtype, x.place
    silent = dict.fromkeys(op._launches_for(weight), _nothing)
    parts = {
        "finish": lambda: op.finish(x, residual, weight, 1e-5, 0.0),
        "finish, dtypes interned": lambda: op.finish(*known, 1e-5, 0.0),
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
        "two outputs as the product makes them": lambda: op._empty_pair(x),
        "two _C_ops.empty_like": lambda: (ops.empty_like(x, dtype, place), ops.empty_like(x, dtype, place)),
        "two paddle.empty_like": lambda: (paddle.empty_like(x), paddle.empty_like(x)),
        "_launch, its launch does nothing": lambda: op._launch(_nothing, *args[:5], 1, 1e-5, 0.0),
        **{name: lambda part=part: part(args) for name, part in launches.items()},
    }
    for _ in range(2):  # the second time is the one to read
        found = {name: measure(part) for name, part in parts.items()}
        kernels, op._of_weights = op._of_weights, [(known_dtype, silent) for known_dtype, _ in op._of_weights]
        found["finish, dtypes interned, its launch does nothing"] = measure(parts["finish, dtypes interned"])
        op._of_weights = kernels
        for name, us in found.items():
            print(f"host time, {name}: {us:.2f} us", flush=True)
    own = found["two _C_ops.empty_like"] + found["bare launch, the stream known"]
    comparing = found["finish"] - found["finish, dtypes interned"]
    print(f"host time, of it two outputs and a bare launch: {own:.2f} us, comparing dtypes: {comparing:.2f} us")
    print(f"host time, what is left: {found['finish'] - own - comparing:.2f} us", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_gpu()
        calls.host_time = host_time
        calls.main()
    else:
        on_a_cpu()
