"""What Paddle 2.6.2 lacks of 3.3, filled in when a process imports Paddle, while this folder is on PYTHONPATH.

Two things: names that 3.3 has, and kernels. On a GPU for which the wheel has no code, an op runs on the CPU copies of
its inputs, and its results go back: memcpy needs no kernel. What makes only views, or only copies, stays on the GPU.
FD_FILL_ALL=1 sends every op through that way on a CPU, to test it where there is no GPU.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types

import numpy as np

ALL = os.environ.get("FD_FILL_ALL") == "1"
os.environ["CUDA_MODULE_LOADING"] = "LAZY"  # in every process: the kernels that were zeroed cannot be loaded
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_BOTH_WAYS = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "matmul")
OPERATORS = [*_BOTH_WAYS, *(f"r{name}" for name in _BOTH_WAYS), *COMPARISONS]
NOTHING = {*OPERATORS, "linear"} - {"rmatmul"}  # what 2.6.2 cannot do with no rows
VIEWS = {"slice", "transpose", "squeeze", "unsqueeze", "empty", "empty_like", "share_data", "as_strided"}
WHOLE = {
    "reshape",
    "reshape_",
    "view_shape",
    "view_dtype",
    "flatten",
    "assign",
    "assign_out_",
}  # views of contiguous ones
NO_VERSION = "0.0.0"  # of a nightly build
METHODS = {"clone", "contiguous", "copy_", "numpy", "_copy_to"}  # native for contiguous tensors
cpu_calls = {}  # how often each op went over the CPU


class Finder:
    """Fills in Paddle when it has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "paddle" or name in sys.modules:
            return None
        sys.meta_path.remove(self)  # for the moment: somebody may only ask whether there is a Paddle
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        if spec is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), fill(module))
        return spec


def fill(paddle):
    if not paddle.__version__.startswith("2.6"):
        return
    paddle.__version__ = NO_VERSION
    _names(paddle)
    Wrapper(paddle).install()


def _names(paddle):
    cuda = types.ModuleType("paddle.cuda")
    core, device = paddle.base.core, paddle.device.cuda

    own = int(os.environ.get("FLAGS_selected_gpus", "0").partition(",")[0] or 0)  # noqa: SIM112

    def current():  # while an op runs on the CPU, the device from before
        return int(paddle.device.get_device().partition(":")[2] or own)

    def memory():
        device.synchronize()  # makes the context
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _cuda("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    cuda.mem_get_info = memory
    cuda.current_device = current
    cuda.set_device = lambda number: paddle.device.set_device(f"gpu:{number}")
    cuda.get_device_capability = lambda number=None: device.get_device_capability(
        current() if number is None else number
    )
    cuda.get_device_name = lambda number=None: device.get_device_name(current() if number is None else number)
    cuda.device_count = device.device_count
    cuda.synchronize = device.synchronize
    paddle.cuda = sys.modules["paddle.cuda"] = cuda
    stream = core._get_current_stream
    paddle._C = types.SimpleNamespace(_cuda_getCurrentRawStream=lambda number: stream(number).cuda_stream)
    importlib.import_module("paddle.base.dygraph.base").in_sot_simulation_mode = lambda: False
    _mean_of_no_rows(paddle)
    paddle.float8_e4m3fn = paddle.uint8
    tensor = core.eager.Tensor
    tensor.stride = lambda x, axis=None: x.get_strides() if axis is None else x.get_strides()[axis]
    tensor.is_cuda = property(lambda x: x.place.is_gpu_place())
    paddle.static.MetaTensor = types.SimpleNamespace  # for graphs that are traced: eager alone runs here
    paddle.static.register_op = lambda **about: lambda function: function


def _mean_of_no_rows(paddle):
    mean = paddle._C_ops.mean

    def call(x, axis, keepdim):
        if 0 not in x.shape:
            return mean(x, axis, keepdim)
        gone = {one % x.ndim for one in ([axis] if isinstance(axis, int) else axis)}
        sizes = [
            1 if number in gone else size for number, size in enumerate(x.shape) if keepdim or number not in gone
        ]
        return paddle.zeros(sizes, x.dtype)

    paddle._C_ops.mean = call


class Wrapper:
    """One generic way for every op: inputs to the CPU, the op there, results and changed inputs back."""

    def __init__(self, paddle):
        self.paddle, self.core = paddle, paddle.base.core
        self.tensor = self.core.eager.Tensor
        self.own = {name: getattr(self.tensor, name) for name in METHODS}
        self.cpu = self.core.CPUPlace()
        self.set_place = paddle.base.framework._set_expected_place
        self.expected = paddle.framework._current_expected_place

    def install(self):
        for module in (self.paddle._C_ops, self.paddle._legacy_C_ops):
            for name in dir(module):
                op = getattr(module, name)
                if callable(op) and not name.startswith("__") and name not in VIEWS:
                    setattr(module, name, self.wrapped(name, op, self.whole if name in WHOLE else None))
        tensor = self.tensor
        for name in OPERATORS:
            if hasattr(tensor, f"__{name}__"):
                setattr(tensor, f"__{name}__", self.wrapped(name, getattr(tensor, f"__{name}__")))
        for name in ("clone", "contiguous", "copy_"):
            native = self.copies_whole if name == "copy_" else self.whole
            setattr(tensor, name, self.wrapped(name, self.own[name], native))
        tensor._setitem_dygraph = self.wrapped("setitem", tensor._setitem_dygraph)
        tensor._getitem_dygraph = self.wrapped("getitem", tensor._getitem_dygraph, self.plain_index)
        own = self.own
        tensor.numpy = lambda x, *args: own["numpy"](x if self.whole((x,)) else self.host(x), *args)
        tensor._copy_to = lambda x, place, blocking=True: own["_copy_to"](
            x if self.whole((x,)) else self.device(self.host(x)), place, blocking
        )

    def gpu(self):
        return self.core.CUDAPlace(self.paddle.cuda.current_device())

    def on_gpu(self, x):
        """Whether x lies on the GPU, or will as soon as it has memory."""
        if not isinstance(x, self.tensor):
            return False
        if ALL:
            return True
        return x.place.is_gpu_place() if x._is_initialized() else "gpu" in str(self.expected())

    def copies_whole(self, args):
        """A tensor that has no memory yet takes the shape of its source, which `copy_` does well by itself."""
        return self.whole(args) or (not args[0]._is_initialized() and args[1].is_contiguous())

    def whole(self, args):
        return not ALL and all(x.is_contiguous() for x in args if self.on_gpu(x) and x._is_initialized())

    def plain_index(self, args):
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(part is None or part is ... or type(part) in (int, slice) for part in parts)

    def wrapped(self, name, op, native=None):
        @functools.wraps(op, assigned=("__name__", "__doc__"))
        def call(*args, **kwargs):
            if name in NOTHING and any(isinstance(x, self.tensor) and 0 in x.shape for x in args):
                return self.nothing(name, args)
            if not self.concerns((*args, *kwargs.values())):
                return op(*args, **kwargs)
            if native is not None and native(args):
                with contextlib.suppress(RuntimeError, OSError, ValueError):  # a kernel is needed after all
                    return op(*args, **kwargs)
            return self.over_the_cpu(name, op, args, kwargs)

        return call

    def nothing(self, name, args):
        """The result of an operator on no rows, which 2.6.2 broadcasts nowhere."""
        tensors = [x for x in args if isinstance(x, self.tensor)]
        if name in ("matmul", "linear"):
            shape = [*tensors[0].shape[:-1], tensors[1].shape[-1]]
        else:
            shape = np.broadcast_shapes(*(x.shape for x in tensors))
        return self.paddle.empty(list(shape), "bool" if name in COMPARISONS else tensors[0].dtype)

    def concerns(self, values):
        """Whether an op with these arguments would run on the GPU."""
        flat = list(_flat(values))
        if any(self.on_gpu(value) for value in flat):
            return True
        places = [
            value for value in flat if isinstance(value, (self.core.Place, self.core.CPUPlace, self.core.CUDAPlace))
        ]
        if places:
            return any(not isinstance(place, self.core.CPUPlace) and "gpu" in str(place) for place in places)
        here = any(isinstance(value, self.tensor) for value in flat)
        return not here and "gpu" in str(self.expected())

    def over_the_cpu(self, name, op, args, kwargs):
        copies, before = {}, self.expected()
        cpu_calls[name] = cpu_calls.get(name, 0) + 1
        originals = (*args, *kwargs.values())
        args, kwargs = self.lower(args, copies), self.lower(kwargs, copies)
        versions = {key: copy.inplace_version for key, (_, copy) in copies.items()}
        self.set_place(self.cpu)
        try:
            with self.paddle.no_grad():
                result = op(*args, **kwargs)
        finally:
            self.set_place(before)
        changed = None
        if name.endswith("_"):  # in place: the first tensor, and the second where it is called `out`
            tensors = [value for value in _flat(originals) if isinstance(value, self.tensor)]
            changed = tensors[1 if name == "assign_out_" else 0]
        for key, (x, copy) in copies.items():
            if copy.inplace_version != versions[key] or x is changed:
                self.write(x, copy)
        return changed if changed is not None and isinstance(result, self.tensor) else self.raise_(result)

    def lower(self, value, copies):
        """Replace the GPU tensors and places among arguments by those of the CPU."""
        if self.on_gpu(value):
            if id(value) not in copies:
                copies[id(value)] = value, self.host(value)
            return copies[id(value)][1]
        if isinstance(value, (list, tuple)):
            return type(value)(self.lower(one, copies) for one in value)
        if isinstance(value, dict):
            return {key: self.lower(one, copies) for key, one in value.items()}
        if isinstance(value, slice):
            return slice(*(self.lower(one, copies) for one in (value.start, value.stop, value.step)))
        is_gpu = isinstance(value, (self.core.Place, self.core.CUDAPlace)) and "gpu" in str(value)
        return self.cpu if is_gpu else value

    def raise_(self, result):
        if isinstance(result, (list, tuple)):
            return type(result)(self.raise_(one) for one in result)
        if not isinstance(result, self.tensor):
            return result
        return self.device(result) if result._is_initialized() else result

    def host(self, x):
        """A copy on the CPU, contiguous; of a tensor without memory one without memory."""
        if 0 in x.shape:
            made = self.paddle.to_tensor(np.zeros(x.shape, _numpy_dtype(x)), place=self.cpu)
        elif not x._is_initialized():
            made = self.tensor(dtype=x.dtype, dims=x.shape, name="", type=x.type, persistable=False)
        elif ALL and x.is_contiguous():
            made = self.own["clone"](x)
        elif x.is_contiguous():
            self.paddle.device.cuda.synchronize()
            made = self.own["_copy_to"](x, self.cpu, True)
        else:
            made = self.paddle.to_tensor(_strided(x, self.span(x)).copy(), place=self.cpu)
        made.stop_gradient = True
        return made

    def span(self, x):
        """The bytes from the first element of a tensor to its last: a copy of the GPU's, or the CPU's own."""
        size = (1 + sum((size - 1) * step for size, step in zip(x.shape, x.get_strides()))) * x.element_size()
        if ALL:
            return (ctypes.c_char * size).from_address(x.data_ptr())
        self.paddle.device.cuda.synchronize()
        base = (ctypes.c_char * size)()
        _cuda("cuMemcpyDtoH_v2", base, ctypes.c_uint64(x.data_ptr()), ctypes.c_size_t(size))
        return base

    def device(self, copy):
        copy = self.own["contiguous"](copy)
        if ALL:
            return copy
        if 0 in copy.shape:
            return self.paddle.empty(copy.shape, copy.dtype)
        return self.own["_copy_to"](copy, self.gpu(), True)

    def write(self, x, copy):
        """Give a changed copy back to the tensor it was made of, and count the change as Paddle does."""
        values = self.own["numpy"](self.own["contiguous"](copy))
        if 0 in x.shape:
            return
        if not x._is_initialized():
            x.get_tensor().set(values, self.cpu if ALL else self.gpu())
        else:
            base = self.span(x)
            _strided(x, base)[...] = values.view(_numpy_dtype(x))
            if not ALL:
                _cuda("cuMemcpyHtoD_v2", ctypes.c_uint64(x.data_ptr()), base, ctypes.c_size_t(len(base)))
        x._bump_inplace_version()


def _flat(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _cuda(name, *args):
    code = getattr(ctypes.CDLL("libcuda.so.1"), name)(*args)
    assert code == 0, f"{name}: error {code}"


def _numpy_dtype(x):
    name = str(x.dtype).rpartition(".")[2]
    return "uint16" if name == "bfloat16" else name  # what Paddle takes and gives for bfloat16


def _strided(x, base):
    kind = np.dtype(_numpy_dtype(x))
    steps = [step * kind.itemsize for step in x.get_strides()]
    return np.lib.stride_tricks.as_strided(np.frombuffer(base, kind), x.shape, steps)


_version = importlib.metadata.version
importlib.metadata.version = lambda name: NO_VERSION if name == "paddlepaddle-gpu" else _version(name)
sys.meta_path.insert(0, Finder())
