"""FastDeploy's CUDA road on a CPU build of Paddle. No file of FastDeploy is changed.

Real: api server, engine, scheduler, queues, launcher, worker process, GpuWorker, GPUModelRunner, attention backend,
sampler, loaders, models, layers, collectives (gloo).
Stand-ins: the compiled ops (`ops`, by their formulas), and of the device what a CPU lacks (`device`).
"""

import os
import sys

from cpu_host import device
from cpu_host.finder import Finder

_OPS = "fastdeploy.model_executor.ops.gpu"


def install():
    """Hook the imports of this process: what is changed of a module is changed right behind its import."""
    sys.modules["pynvml"] = device.nvml()
    hooks = {
        "paddle.distributed.collective": device.make_one_mesh,
        "paddle.jit.sot.opcode_translator.executor.opcode_executor": device.trace_past_is_none,
        "fastdeploy.platforms": device.use_cuda_road,
        "fastdeploy.config": _pass_dtype_on,
        "fastdeploy.model_executor.forward_meta": _leave_unguarded,
        "fastdeploy.model_executor.layers.normalization": _without_triton,
        "fastdeploy.worker.gpu_worker": device.start_worker_on_cpu,
        "fastdeploy.model_executor.layers.attention.mla_attention_backend": _attend_by_formula,
        "fastdeploy.model_executor.models.glm4_moe": _hand_forward_meta_on,
        "fastdeploy.model_executor.layers.moe.triton_moe_kernels": _multiply_by_formula,
        "fastdeploy.model_executor.layers.moe.moe": _cut_along_the_axis_that_is_split,
        _OPS: _name_what_is_missing,
        f"{_OPS}.deep_gemm": _name_what_is_missing,
    }
    made = {f"{_OPS}.fastdeploy_ops": _fill_with_formulas, f"{_OPS}.deep_gemm": _multiply_in_fp8}
    sys.meta_path.insert(0, Finder(hooks, made))


def _fill_with_formulas(module):
    from cpu_host.ops import attention, experts, fp8, latent, requests, sampling

    for part in (attention, experts, fp8, latent, requests, sampling):
        module.__dict__.update({name: vars(part)[name] for name in part.OPS})


def _multiply_in_fp8(module):
    from cpu_host.ops.fp8 import fp8_gemm_nt

    module.fp8_gemm_nt = fp8_gemm_nt


def _multiply_by_formula(module):
    """The host's Triton kernel for experts in FP8, which wants a GPU."""
    from cpu_host.ops.fp8 import ExpertsProduct

    module.fused_moe_kernel_paddle = ExpertsProduct()


def _name_what_is_missing(module):
    """An op without a formula can be imported, and says so when it is called."""

    def missing(name):
        if name.startswith("__"):
            raise AttributeError(name)

        def op(*args, **kwargs):
            raise NotImplementedError(f"tests/serving has no formula for the compiled op {name}")

        return op

    module.__getattr__ = missing


def _pass_dtype_on(module):
    """The engine hands no dtype on to its ranks: give them their own argument before they parse it."""
    if sys.argv and sys.argv[0].endswith("worker_process.py") and "--dtype" not in sys.argv:
        sys.argv += ["--dtype", os.environ.get("SERVING_DTYPE", "float32")]


def _attend_by_formula(module):
    """Paddle's own flash attention, which is compiled for a GPU alone."""
    from cpu_host.ops.latent import flash_attn_unpadded

    module.flash_attn_unpadded = flash_attn_unpadded


def _hand_forward_meta_on(module):
    """Both trees call the norm of q and k without its second argument, so that `use_qk_norm` ends the stock server at
    its first request. The norm does not read it.
    """
    module.QKRMSNorm.forward.__defaults__ = (None, None)


def _leave_unguarded(module):
    """SOT guards each field of a dataclass, and the host's warm-up changes these two from step to step: the second
    step would be a second graph, which the host refuses. Its CUDA graphs alone read them.
    """
    for name in ("exist_prefill", "real_bsz"):
        del module.ForwardMeta.__dataclass_fields__[name]


def _cut_along_the_axis_that_is_split(module):
    """Both trees cut experts that are one tensor (GPT-OSS) along the last axis, whichever a rank holds a part of, so
    that two ranks of the stock server cannot load them. What is not split, a bias behind the sum, counts once.
    """

    def load(self, param, loaded_weight):
        whole, wanted = module.get_tensor(loaded_weight), param.shape
        split = [axis for axis, size in enumerate(wanted) if whole.shape[axis] != size]
        part = whole.split(self.tp_size, split[0])[self.tp_rank] if split else whole / self.tp_size
        param.set_value(part)

    module.FusedMoE._load_fused_experts_weight = load


def _without_triton(module):
    """The host's own branch for a machine without Triton: its Triton kernels want a GPU."""
    module._TRITON_AVAILABLE = False
