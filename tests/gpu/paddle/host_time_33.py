"""The host time of an eager `finish` with Paddle 3.3's own tensors and the product's own launch, on one GPU:

    python3 tests/gpu/paddle/host_time_33.py        # after `make_pieces.py --cpu`, where no Paddle is installed

PyPI has Paddle 3.3 as a CPU build alone. Its tensors lie in host memory here: shapes, dtypes, addresses, contiguity
and `empty` are 3.3's. The launch is Triton's C function, as the product calls it, on a stream of a real GPU. The
kernel has the product's parameters, constants and options, and no body: addresses of host memory do no harm.

Not in these figures: the allocator of 3.3's GPU build, and its C function for the current stream, in whose place
another C function gives a number. The lines "borrowed" say where figures for both come from.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

if importlib.util.find_spec("paddle") is None:
    from run import unpack

    sys.path.append(str(unpack(ROOT / ".paddle_cpu")))  # behind this machine's own NumPy and Triton

import host_time
import paddle
from host_time import STREAM_KNOWN, calls

from fd_fusion.comm.cuda_driver import CudaDriver
from fd_fusion.frameworks import triton_launch
from tests.binding.host_time import H, op_with

LIBRARY, TIMES = "libcuda.so.1", 9
BORROWED = {
    "two outputs by the allocator of a GPU": "of host_time.py under 2.6.2 on the same machine the line "
    "`two _C_ops.empty` less the line `two _C_ops.empty on the CPU`",
    "the stream asked for": "one call of a C function more than here; under 2.6.2 it is Python, more than that",
}


class Gpu:
    """The first GPU, its context made current, and a stream of ours, without torch and without Paddle."""

    def __init__(self):
        library, device, context = ctypes.CDLL(LIBRARY), ctypes.c_int(), ctypes.c_void_p()
        name, parts = ctypes.create_string_buffer(100), [ctypes.c_int(), ctypes.c_int()]
        asked = [
            library.cuInit(0),
            library.cuDeviceGet(ctypes.byref(device), 0),
            library.cuDeviceGetName(name, len(name), device),
            *(library.cuDeviceGetAttribute(ctypes.byref(one), 75 + n, device) for n, one in enumerate(parts)),
            library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
            library.cuCtxSetCurrent(context),
        ]
        assert not any(asked), f"errors of the driver: {asked}"
        self.name, self.capability = name.value.decode(), tuple(one.value for one in parts)
        self._driver, self._stream = CudaDriver(), ctypes.c_void_p()
        self._driver.call("cuStreamCreate", ctypes.byref(self._stream), 1)  # CU_STREAM_NON_BLOCKING
        self.stream = self._stream.value

    def synchronize(self):
        self._driver.call("cuStreamSynchronize", self._stream)

    def triton_driver(self):
        return triton_launch.make_driver(
            lambda: 0, lambda number: None, lambda number=None: self.capability, lambda number: self.stream
        )


def without_body(module, name):
    """The product's kernel with nothing in it."""
    kernel = _load_kernel(module, name)
    kernel._unsafe_update_src(kernel.src[: kernel.src.index("):")] + "):\n    return\n")
    return kernel


_load_kernel, _prepare = triton_launch.load_kernel, triton_launch.prepare


def opened(gpu, fp8=()):
    """The product's op, with its launches made by the product for a kernel without a body, and its three tensors."""
    stand_ins = {
        "_paddle_driver": gpu.triton_driver,
        "launcher": host_time.recording,
        "load_kernel": without_body,
        "prepare": _prepare,
        "uses_pdl": lambda: gpu.capability >= (9, 0),
    }
    with (
        mock.patch.object(paddle.cuda, "current_device", lambda: 0),
        mock.patch.object(paddle._C, "_cuda_getCurrentRawStream", {0: gpu.stream}.__getitem__),
    ):
        op = op_with(None, fp8=fp8, **stand_ins)
    return op, [paddle.empty(shape, dtype="bfloat16") for shape in ([1, H], [1, H], [H])]


def main():
    paddle.set_grad_enabled(False)
    paddle.set_device("cpu")
    gpu = Gpu()

    def measure(part):
        """The median of several medians; the GPU keeps up."""
        return sorted(calls.host_us(part, gpu.synchronize) for _ in range(TIMES))[TIMES // 2]

    op, tensors = opened(gpu)
    ways = host_time.ways_to_launch(op, "bfloat16", gpu.stream)
    of_finish = {f"launch: {name}": way for name, way in ways.items() if name not in ("prepared", STREAM_KNOWN)}
    of_finish[STREAM_KNOWN] = ways[STREAM_KNOWN]
    found = host_time.report(op, tensors, host_time.ways_as_parts(op, ways), measure, of_finish)
    op, tensors = opened(gpu, (host_time.FP8,))
    found |= host_time.report_fp8(op, tensors, measure)
    for name, source in BORROWED.items():
        print(f"borrowed, {name}: {source}")
    about = {"paddle": paddle.__version__, "triton": importlib.metadata.version("triton"), "gpu": gpu.name}
    print(json.dumps({**about, "microseconds": {name: round(us, 2) for name, us in found.items()}}), flush=True)


if __name__ == "__main__":
    main()
