"""What FastDeploy asks of a CUDA device, answered on a CPU: NVML, the platform, events, memory, collectives."""

import os
import types
from pathlib import Path

_GIB = 1 << 30


def nvml():
    """The `pynvml` of a machine with as many GPUs as CUDA_VISIBLE_DEVICES names, of 4 GiB, 3 of them free."""
    module = types.ModuleType("pynvml")
    info = types.SimpleNamespace(total=4 * _GIB, used=_GIB, free=3 * _GIB)
    module.nvmlInit = module.nvmlShutdown = lambda *args: None
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetMemoryInfo = lambda handle: info
    module.nvmlDeviceGetCount = lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    return module


def use_cuda_road(platforms):
    """The platform says CUDA, so worker, runner and layers are the ones of a GPU."""

    class OnCpu(platforms.CUDAPlatform):
        def is_cuda(self):
            return True

        def is_cuda_alike(self):
            return True

        def is_cpu(self):
            return False

        @classmethod
        def available(cls):
            return True

    platforms._current_platform = OnCpu()
    import paddle

    _replace_cuda(paddle)
    _replace_collectives(paddle)
    _quantise(paddle)
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        paddle.incubate.nn.functional.fused_rms_norm = _rms_norm
    if os.environ.get("SERVING_DTYPE") == "bfloat16":
        _compute_halves(paddle)


def start_worker_on_cpu(module):
    """The host's own `init_device`, told that there is a device."""
    import paddle

    stock = module.GpuWorker.init_device

    def init_device(self):
        before = paddle.device.is_compiled_with_cuda, paddle.device.set_device
        paddle.device.is_compiled_with_cuda, paddle.device.set_device = lambda: True, lambda device: None
        try:
            stock(self)
        finally:
            paddle.device.is_compiled_with_cuda, paddle.device.set_device = before

    module.GpuWorker.init_device = init_device


class _Event:
    """On a CPU every op has ended when its call returns."""

    def record(self, *args):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


def _replace_cuda(paddle):
    cuda = paddle.device.cuda
    cuda.create_event, cuda.Event = (lambda *args, **kwargs: _Event()), _Event
    nothing, zero = (lambda *args, **kwargs: None), (lambda *args, **kwargs: 0)
    for name in ("synchronize", "reset_max_memory_reserved", "reset_max_memory_allocated", "empty_cache"):
        setattr(cuda, name, nothing)
    for name in ("max_memory_reserved", "max_memory_allocated", "memory_reserved", "memory_allocated"):
        setattr(cuda, name, zero)
    paddle.device.empty_cache = paddle.device.synchronize = nothing
    major = int(os.environ.get("SERVING_CAPABILITY", 8))
    facts = types.SimpleNamespace(name="CPU", major=major, minor=0, total_memory=4 * _GIB, multi_processor_count=8)
    cuda.get_device_properties = paddle.device.get_device_properties = lambda *args, **kwargs: facts
    paddle.Tensor.pin_memory = paddle.Tensor.cuda = lambda self, *args, **kwargs: self


def _replace_collectives(paddle):
    """Three ops that run on the stream of the computation, which gloo has not: by the same collectives of gloo."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    from cpu_host.ops.sampling import top_p_sampling

    @paddle.static.register_op(
        name="cpu_host_all_reduce",
        infer_meta=lambda tensor, group: paddle.static.MetaTensor(shape=tensor.shape, dtype=tensor.dtype),
        input_names=["tensor"],
        output_names=["out"],
    )
    def reduced(tensor, group):
        out = tensor.astype("float32") if _is_half(tensor) else tensor.clone()
        paddle.distributed.all_reduce(out, group=group)
        return out.astype(tensor.dtype)

    def all_reduce(tensor, op=None, group=None, **kwargs):
        return reduced(tensor, group)

    def concat(tensor, group=None, **kwargs):
        parts, wide = [], tensor.astype("float32") if _is_half(tensor) else tensor
        paddle.distributed.all_gather(parts, wide.contiguous(), group=group)
        return paddle.concat(parts, -1).astype(tensor.dtype)

    mp_ops._mp_allreduce, mp_ops._c_concat = all_reduce, concat
    mp_ops._c_identity = lambda tensor, *args, **kwargs: tensor
    paddle.tensor.top_p_sampling = top_p_sampling  # compiled for a GPU alone


def _is_half(tensor):
    return str(getattr(tensor, "dtype", "")) == "paddle.bfloat16"


def _quantise(paddle):
    from cpu_host.ops.fp8 import fp8_quant_blockwise

    paddle.incubate.nn.functional.fp8_quant_blockwise = fp8_quant_blockwise  # compiled for a GPU alone


def _rms_norm(x, norm_weight, norm_bias, epsilon, begin_norm_axis=1, bias=None, residual=None, **quant):
    """Paddle's `fused_rms_norm` by its formula: the CPU kernel of 3.3.1 uses AVX-512 wherever it runs, and a process
    ends by SIGILL where the processor has none.

    Returns: x + residual, normed over the last axis, and that sum.
    """
    assert norm_bias is None and bias is None and begin_norm_axis in (-1, x.ndim - 1) and quant["quant_scale"] <= 0
    total = x if residual is None else x + residual
    return total * (total.square().mean(-1, keepdim=True) + epsilon).rsqrt() * norm_weight, total


def _compute_halves(paddle):
    """What Paddle's CPU build lacks for bfloat16: in float32, and rounded."""
    from paddle.distributed.fleet.layers.mpu import mp_ops

    def wide(x):
        return x.astype("float32") if _is_half(x) else x

    def replace(owner, name):
        stock = getattr(owner, name)

        def op(*args, **kwargs):
            if not any(map(_is_half, (*args, *kwargs.values()))):
                return stock(*args, **kwargs)
            out = stock(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})
            if isinstance(out, tuple):  # the norm's has parts that are left empty
                return tuple(part.astype("bfloat16") if part._is_initialized() else part for part in out)
            return out.astype("bfloat16")

        setattr(owner, name, op)

    fused, functional = paddle.incubate.nn.functional, paddle.nn.functional
    names = (paddle.Tensor, "__add__"), (paddle, "matmul"), (functional, "linear"), (functional, "swiglu")
    for owner, name in (*names, (mp_ops, "_c_lookup_table"), (fused, "swiglu"), (fused, "fused_rms_norm")):
        replace(owner, name)


def make_one_mesh(module):
    """Groups of all ranks share the first one's connections. Paddle's gloo makes that one always; of four ranks it
    seldom makes a second: its pairs wait for ever, or are refused (gloo's connectFullMesh).
    """
    stock, made = module._new_process_group_impl, []

    def make(backend, store, rank, world_size, *args, **kwargs):
        if world_size == 2 or world_size != int(os.environ["PADDLE_TRAINERS_NUM"]):
            return stock(backend, store, rank, world_size, *args, **kwargs)
        if not made:
            made.append(stock(backend, store, rank, world_size, *args, **kwargs))
        return made[0]

    module._new_process_group_impl = make


def trace_past_is_none(module):
    """`if tensor is None` breaks no graph, as under Python 3.10. From 3.11 on, Paddle 3.3.1's SOT breaks there, and
    cannot trace the stock host's RMSNorm. (Mended in Paddle's pull request 77009.)
    """
    stock, module.if_break_graph_decorator = module.if_break_graph_decorator, lambda jump: jump
    for word, test in (("NONE", module.operator_is_none), ("NOT_NONE", module.operator_is_not_none)):
        jump = module.pop_jump_if_op_wrapper([test])
        for name in (f"POP_JUMP_IF_{word}", f"POP_JUMP_FORWARD_IF_{word}", f"POP_JUMP_BACKWARD_IF_{word}"):
            setattr(module.OpcodeExecutorBase, name, jump)
    module.if_break_graph_decorator = stock
