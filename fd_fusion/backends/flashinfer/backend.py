"""FlashInfer's fused kernel as a backend: loaded lazily, in our workspace, or off with a reason.

It is not the default. Its sum is rounded before the residual is added, and its reduction tree changes with T, so a
row's bits depend on the other rows of the batch; and its wait has no end, so a missing rank ends the process.
"""

from __future__ import annotations

import os
import shutil
import sys
import time

import numpy as np

from fd_fusion.backends.flashinfer import loader
from fd_fusion.backends.flashinfer.calls import Call, Fixed, block_threads, compiled_call, python_call, rules
from fd_fusion.backends.flashinfer.op import ALIGNMENT, FlashInferOp
from fd_fusion.backends.flashinfer.watchdog import ControlReader
from fd_fusion.backends.flashinfer.workspace import Layout, open_memory, rows_that_fit
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import agree_or_raise, as_refusal, on_all_ranks
from fd_fusion.frameworks.tensors import tensor
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
    library, entry = _load_and_build(spec, group)
    fit = rows_that_fit(spec.workspace_bytes, spec.size, spec.hidden_size, DTYPE_BYTES[spec.dtype])
    rows = min(fit, row_limit(spec) or fit)
    layout = Layout(spec.size, rows, spec.hidden_size, DTYPE_BYTES[spec.dtype])
    provider = on_all_ranks(group, "flashinfer_device", CudaIpc, spec.timeout_s)
    memory = open_memory(group, layout, provider, timeout_s=spec.timeout_s)

    def make() -> FlashInferOp:
        table = tensor(library.framework, np.array(layout.pointers(memory)), "int64", "gpu")
        fixed = Fixed(spec.size, spec.rank, spec.hidden_size, rows, spec.dtype == "float32", table)
        if entry is None:
            call, adds_bias = python_call(library.function, fixed, library.version)
        else:
            call, adds_bias = compiled_call(entry, fixed, library.version)
        if spec.weight_offset and not adds_bias:  # by its version it adds one, by its signature it does not
            offset = spec.weight_offset
            raise FusionError(because("flashinfer_weight_offset", version=library.version, offset=offset))
        read = ControlReader(memory.own + layout.control)
        return FlashInferOp(spec, group, library, call, adds_bias, rows, layout.nbytes, read, memory.close)

    op, refusal = as_refusal(make)
    try:
        agree_or_raise(group, "flashinfer_made", refusal, None, spec.timeout_s)
    except FusionError:
        (op or memory).close()
        raise
    op.warm_up()
    return op


def _load_and_build(spec: OpSpec, group: Group) -> tuple[loader.FlashInfer, Call | None]:
    """Load on every rank; compile on the first one, then let the others take what it compiled."""

    def load() -> tuple[loader.FlashInfer, Call | None]:
        library = loader.load()
        if refusal := _version_refusal(spec, library.version):
            raise FusionError(refusal)
        return library, _build(library) if group.rank == 0 else None

    loaded, refusal = as_refusal(load)
    version, limit_s = loaded and loaded[0].version, max(spec.timeout_s, BUILD_TIMEOUT_S)
    versions = agree_or_raise(group, "flashinfer_built", refusal, version, limit_s)
    for rank, one in enumerate(versions):
        if one != versions[0]:
            raise FusionError(because("flashinfer_differs", rank=rank, got=one, need=versions[0]))
    library, entry = loaded
    return library, on_all_ranks(
        group, "flashinfer_loaded", lambda: entry if group.rank == 0 else _build(library), limit_s
    )


def _build(library: loader.FlashInfer) -> Call | None:
    """Compile and load the kernel, with a line on stderr where that takes minutes."""
    start, slow = time.monotonic(), loader.compiled_module(library.version) is None
    if slow:
        _say(f"compiling the kernel of FlashInfer {library.version}: some minutes, once on this machine")
    try:
        entry = library.build()
    except Exception as error:  # whatever a build can raise; it is voted on
        error = f"{type(error).__name__}: {error}"
        raise FusionError(because("flashinfer_build", version=library.version, error=error)) from None
    if slow:
        _say(f"the kernel of FlashInfer {library.version} is compiled, in {time.monotonic() - start:.0f} s")
    return entry


def _say(text: str) -> None:
    print(f"fd_fusion: {text}", file=sys.stderr, flush=True)
