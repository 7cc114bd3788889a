"""Rank script: where the host time of an eager `finish` goes under Paddle; the GPU keeps up, so nothing waits for it.

host_time.py host_time --device gpu [--hidden H]
"""

from runtime import Call, calls, opened, paddle, take_gpu


def host_time(group, options):
    op, case = opened(group, options, rows=1)
    op.freeze()
    call = Call(op, case, group)
    x, residual, weight = call.tensors
    out, other = call.run()
    addresses = [t.data_ptr() for t in (x, residual, weight, out, other)]
    launch = op._launches[case.weight_dtype, False, False]
    args = (*addresses, *op._own, 1, group.rank, 0, case.eps, 0.0)
    raw, device = paddle._C._cuda_getCurrentRawStream, paddle.cuda.current_device()
    stream = raw(device)
    dtype, place, shape, ops = x.dtype, x.place, x.shape, paddle._C_ops
    run, loaded = _inside(launch)
    programs = op._plan.split
    parts = {
        "finish": lambda: op.finish(x, residual, weight, case.eps, 0.0),
        "checks of finish: none fails": lambda: (
            x.shape,
            residual.shape == x.shape,
            op._is_of_dtype(residual),
            op._is_of_dtype(x),
        ),
        "launches of the weight": lambda: op._launches_for(weight),
        "two empty_like as the product makes them": lambda: (op._empty_like(x), op._empty_like(x)),
        "two _C_ops.empty_like, dtype and place known": lambda: (
            ops.empty_like(x, dtype, place),
            ops.empty_like(x, dtype, place),
        ),
        "two _C_ops.empty, all known": lambda: (ops.empty(shape, dtype, place), ops.empty(shape, dtype, place)),
        "one _C_ops.empty_like": lambda: ops.empty_like(x, dtype, place),
        "two paddle.empty_like": lambda: (paddle.empty_like(x), paddle.empty_like(x)),
        "x.shape": lambda: x.shape,
        "x.dtype": lambda: x.dtype,
        "x.dtype is, x.dtype == known": lambda: (x.dtype is dtype, x.dtype == dtype),
        "x.place": lambda: x.place,
        "x.is_contiguous()": lambda: x.is_contiguous(),
        "five data_ptr()": lambda: (
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            other.data_ptr(),
        ),
        "the current stream": lambda: raw(device),
        "prepared launch": lambda: launch(programs, *args),
        "bare launch, the stream known": lambda: run(programs, 1, 1, stream, *loaded[0], *args, *loaded[1]),
        "_launch of the op": lambda: op._launch(
            op._launches_for(weight), x, residual, weight, out, other, 1, case.eps, 0.0
        ),
    }
    for _ in range(2):  # the second time is the one to read
        for name, part in parts.items():
            print(f"host time, {name}: {calls.host_us(part, paddle.device.synchronize):.2f} us", flush=True)
    op.check()
    op.close()


def _inside(launch):
    """What a prepared launch calls: Triton's launcher, with the loaded kernel before and the constants behind."""
    names = dict(zip(launch.__code__.co_freevars, (cell.cell_contents for cell in launch.__closure__)))
    return names["run"], (names["loaded"], names["tail"])


if __name__ == "__main__":
    take_gpu()
    calls.host_time = host_time
    calls.main()
