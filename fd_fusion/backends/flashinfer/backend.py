"""FlashInfer's fused kernel as a backend: loaded lazily, in our workspace, or off with a reason.

It is not the default. Its sum is rounded before the residual is added, and its reduction tree changes with T, so a
row's bits depend on the other rows of the batch; and its wait has no end, so a missing rank ends the process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import numpy as np

from fd_fusion.backends.flashinfer import loader
from fd_fusion.backends.flashinfer.calls import block_threads, compiled_call, rules
from fd_fusion.backends.flashinfer.op import ALIGNMENT, FlashInferOp
from fd_fusion.backends.flashinfer.watchdog import ControlReader
from fd_fusion.backends.flashinfer.workspace import Layout, open_memory, rows_that_fit
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import agree_or_raise, as_refusal, on_all_ranks
from fd_fusion.frameworks.tensors import paddle_or_torch, tensor
from fd_fusion.reasons import FusionError, Reason, because
from fd_fusion.reference import DTYPE_BYTES
from fd_fusion.spec import OpSpec
from fd_fusion.tuning.limits import row_limit

SIZES = (2, 4, 8, 16)
BUILD_TIMEOUT_S = 120.0  # a silent rank; one that shows progress is waited for ten times as long


def supports(spec: OpSpec) -> Reason | None:
    """Return why this backend cannot serve `spec`, or None. Local and cheap: FlashInfer is not imported.

    Whether the ranks reach each other's memory shows in `open`, which gives that reason on all ranks.
    """
    if spec.device != "gpu" or spec.arch is None:
        return because("flashinfer_no_gpu")
    if spec.deterministic:
        return because("deterministic", backend="flashinfer")
    if spec.size not in SIZES:
        return because("world_size", got=spec.size, allowed=", ".join(map(str, SIZES)))
    if spec.dtype not in DTYPE_BYTES:
        return because("dtype", got=spec.dtype, allowed=", ".join(DTYPE_BYTES))
    if other := next((dtype for dtype in spec.weight_dtypes if dtype != spec.dtype), None):
        return because("flashinfer_weight_dtype", need=spec.dtype, got=other)
    need = ALIGNMENT // DTYPE_BYTES[spec.dtype]
    if spec.hidden_size % need:
        return because("hidden_size", got=spec.hidden_size, need=f"a multiple of {need}")
    version = loader.installed_version()
    if version is None:
        return because("flashinfer_missing")
    if refusal := _version_refusal(spec, version):
        return refusal
    shape = spec.size, spec.hidden_size, DTYPE_BYTES[spec.dtype]
    if not rows_that_fit(spec.workspace_bytes, *shape):
        need = Layout(spec.size, 1, *shape[1:]).nbytes + 256
        return because("workspace_small", need=need, got=spec.workspace_bytes)
    return _compiler_refusal(version)


def _version_refusal(spec: OpSpec, version: str) -> Reason | None:
    rule, threads = rules(version), block_threads(spec.hidden_size, DTYPE_BYTES[spec.dtype])
    if spec.arch // 10 not in rule.arch_majors:
        allowed = ", ".join(f"sm_{major}x" for major in rule.arch_majors)
        return because("flashinfer_arch", version=version, arch=spec.arch, allowed=allowed)
    if threads > 1024:
        return because("hidden_size", got=spec.hidden_size, need="one whose row fits into 1024 threads a block")
    if rule.whole_warps and threads % 32:
        return because("flashinfer_partial_warp", version=version, hidden_size=spec.hidden_size, threads=threads)
    if spec.weight_offset and not rule.weight_bias:
        return because("flashinfer_weight_offset", version=version, offset=spec.weight_offset)
    return None


def _compiler_refusal(version: str) -> Reason | None:
    """Return what is missing to compile the kernel, unless it was compiled before."""
    if loader.compiled_module(version):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if not (shutil.which("nvcc") or os.access(f"{home}/bin/nvcc", os.X_OK)):
        return because("flashinfer_no_compiler", version=version, tool="nvcc")
    if not shutil.which("ninja"):
        return because("flashinfer_no_compiler", version=version, tool="ninja")
    return None


def open(spec: OpSpec, group: Group) -> FlashInferOp:
    """Collective: load and build, allocate and exchange, call once. Raises FusionError on all ranks alike."""
    version, entry = _load(spec, group)
    fit = rows_that_fit(spec.workspace_bytes, spec.size, spec.hidden_size, DTYPE_BYTES[spec.dtype])
    rows = min(fit, row_limit(spec) or fit)
    layout = Layout(spec.size, rows, spec.hidden_size, DTYPE_BYTES[spec.dtype])
    provider = on_all_ranks(group, "flashinfer_device", CudaIpc, spec.timeout_s)
    memory = open_memory(group, layout, provider, timeout_s=spec.timeout_s)

    def make() -> FlashInferOp:
        table = tensor(paddle_or_torch(), np.array(layout.pointers(memory)), "int64", "gpu")
        call = compiled_call(entry, version, spec.size, spec.rank, spec.hidden_size, table)
        read = ControlReader(memory.own + layout.control)
        return FlashInferOp(spec, group, version, call, rows, layout.nbytes, read, memory.close)

    op, refusal = as_refusal(make)
    try:
        agree_or_raise(group, "flashinfer_made", refusal, None, spec.timeout_s)
    except FusionError:
        (op or memory).close()
        raise
    op.warm_up()
    return op


def _load(spec: OpSpec, group: Group) -> tuple[str, Callable[..., None]]:
    """Load on every rank, on the first one before the others, which take what it compiled: (version, entry)."""
    version, limit_s = loader.installed_version(), max(spec.timeout_s, BUILD_TIMEOUT_S)

    def load_first() -> Callable[..., None] | None:
        if refusal := because("flashinfer_missing") if version is None else _version_refusal(spec, version):
            raise FusionError(refusal)
        return loader.load(version) if group.rank == 0 else None

    entry, refusal = as_refusal(load_first)
    versions = agree_or_raise(group, "flashinfer_built", refusal, version, limit_s)
    for rank, one in enumerate(versions):
        if one != versions[0]:
            raise FusionError(because("flashinfer_differs", rank=rank, got=one, need=versions[0]))
    return version, on_all_ranks(group, "flashinfer_loaded", lambda: entry or loader.load(version), limit_s)
