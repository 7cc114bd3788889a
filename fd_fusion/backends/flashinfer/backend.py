"""FlashInfer's fused kernel as a backend: loaded lazily, in our workspace, or off with a reason.

It is not the default. Its sum is rounded before the residual is added, and its reduction tree changes with T, so a
row's bits depend on the other rows of the batch; and its wait has no end, so a missing rank ends the process.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any

from fd_fusion.backends.flashinfer import loader as runtime_flashinfer
from fd_fusion.backends.flashinfer import unified as flashinfer_unified
from fd_fusion.backends.flashinfer.calls import Call, Fixed, compiled_call, python_call
from fd_fusion.backends.flashinfer.op import ALIGNMENT, ELEMENT_BYTES, Opened, device_table
from fd_fusion.backends.flashinfer.releases import block_threads, rules
from fd_fusion.backends.flashinfer.watchdog import ControlReader
from fd_fusion.backends.flashinfer.workspace import Layout, open_memory, rows_that_fit
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import attempt, settle
from fd_fusion.reasons import FusionError, Reason, because
from fd_fusion.tuning.limits import Facts, row_limit

SIZES = (2, 4, 8, 16)
BUILD_TIMEOUT_S = 120.0  # a silent rank; one that shows progress is waited for ten times as long


def supports(facts: Facts) -> Reason | None:
    """Why this backend cannot serve these facts, or None. Local and cheap: FlashInfer is not imported.

    Whether the ranks reach each other's memory shows in `open`, which gives that reason on all ranks.
    """
    if facts.device != "gpu" or facts.arch is None:
        return because("flashinfer_no_gpu")
    if facts.deterministic:
        return because("deterministic", backend="flashinfer")
    if facts.size not in SIZES:
        return because("world_size", got=facts.size, allowed=", ".join(map(str, SIZES)))
    if facts.dtype not in ELEMENT_BYTES:
        return because("dtype", got=facts.dtype, allowed=", ".join(ELEMENT_BYTES))
    if facts.weight_dtype != facts.dtype:
        return because("flashinfer_weight_dtype", need=facts.dtype, got=facts.weight_dtype)
    need = ALIGNMENT // ELEMENT_BYTES[facts.dtype]
    if facts.hidden_size % need:
        return because("hidden_size", got=facts.hidden_size, need=f"a multiple of {need}")
    version = runtime_flashinfer.installed_version()
    if version is None:
        return because("flashinfer_missing")
    return _version_refusal(facts, version) or _room_refusal(facts) or _compiler_refusal(version)


def _version_refusal(facts: Facts, version: str) -> Reason | None:
    rule, threads = rules(version), block_threads(facts.hidden_size, ELEMENT_BYTES[facts.dtype])
    if facts.arch // 10 not in rule.arch_majors:
        allowed = ", ".join(f"sm_{major}x" for major in rule.arch_majors)
        return because("flashinfer_arch", version=version, arch=facts.arch, allowed=allowed)
    if threads > 1024:
        return because("hidden_size", got=facts.hidden_size, need="one whose row fits into 1024 threads a block")
    if rule.whole_warps and threads % 32:
        return because("flashinfer_partial_warp", version=version, hidden_size=facts.hidden_size, threads=threads)
    if facts.weight_offset and not rule.weight_bias:
        return because("flashinfer_weight_offset", version=version, offset=facts.weight_offset)
    return None


def _room_refusal(facts: Facts) -> Reason | None:
    e = ELEMENT_BYTES[facts.dtype]
    if rows_that_fit(facts.workspace_bytes, facts.size, facts.hidden_size, e):
        return None
    need = Layout(facts.size, 1, facts.hidden_size, e).nbytes + 256
    return because("workspace_small", need=need, got=facts.workspace_bytes)


def _compiler_refusal(version: str) -> Reason | None:
    """FlashInfer compiles its kernel at first use, unless it was compiled before."""
    if runtime_flashinfer.compiled_module(version):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if not (shutil.which("nvcc") or os.access(f"{home}/bin/nvcc", os.X_OK)):
        return because("flashinfer_no_compiler", version=version, tool="nvcc")
    if not shutil.which("ninja"):
        return because("flashinfer_no_compiler", version=version, tool="ninja")
    return None


def open(facts: Facts, group: Group) -> Opened:
    """Collective: load and build, allocate and exchange, call once. Raises FusionError on all ranks alike."""
    library, entry = _load_and_build(facts, group)
    fit = rows_that_fit(facts.workspace_bytes, facts.size, facts.hidden_size, ELEMENT_BYTES[facts.dtype])
    rows = min(fit, row_limit(facts) or fit)
    if entry is None and library.function is None:
        return flashinfer_unified.open(facts, group, library, rows)
    return _open_own(facts, group, library, entry, rows)


def _load_and_build(facts: Facts, group: Group) -> tuple[runtime_flashinfer.FlashInfer, Call | None]:
    """Load on every rank; compile on the first one, then let the others take what it compiled."""

    def load() -> tuple[runtime_flashinfer.FlashInfer, Call | None]:
        library = runtime_flashinfer.load()
        if refusal := _version_refusal(facts, library.version):
            raise FusionError(refusal)
        return library, _build(library) if group.rank == 0 else None

    loaded, refusal = attempt(load)
    version = loaded and loaded[0].version
    versions = settle(group, "flashinfer_built", refusal, version, max(facts.timeout_s, BUILD_TIMEOUT_S))
    for rank, one in enumerate(versions):
        if one != versions[0]:
            raise FusionError(because("flashinfer_differs", rank=rank, got=one, need=versions[0]))
    library = loaded[0]
    entry, refusal = attempt(lambda: loaded[1] if group.rank == 0 else _build(library))
    settle(group, "flashinfer_loaded", refusal, None, max(facts.timeout_s, BUILD_TIMEOUT_S))
    return library, entry


def _build(library: runtime_flashinfer.FlashInfer) -> Call | None:
    """Compile and load the kernel, with a line that says so where it takes minutes."""
    start, slow = time.monotonic(), runtime_flashinfer.compiled_module(library.version) is None
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


def _open_own(facts: Facts, group: Group, library: Any, entry: Call | None, rows: int) -> Opened:
    """In our own workspace."""
    layout = Layout(facts.size, rows, facts.hidden_size, ELEMENT_BYTES[facts.dtype])
    maker, refusal = attempt(CudaIpc)
    settle(group, "flashinfer_device", refusal, None, facts.timeout_s)
    memory = open_memory(group, layout, maker, timeout_s=facts.timeout_s)

    def make() -> Opened:
        table = device_table(library.framework, layout.pointers(memory))
        fixed = Fixed(facts.size, facts.rank, facts.hidden_size, rows, facts.dtype == "float32", table)
        if entry is None:
            call, adds_bias = python_call(library.function, fixed, library.version)
        else:
            call, adds_bias = compiled_call(entry, fixed, library.version)
        if facts.weight_offset and not adds_bias:  # the version says so, the signature does not
            offset = facts.weight_offset
            raise FusionError(because("flashinfer_weight_offset", version=library.version, offset=offset))
        read = ControlReader(memory.own + layout.control)
        return Opened(facts, group, library, call, adds_bias, rows, layout.nbytes, read, memory.close)

    opened, refusal = attempt(make)
    try:
        settle(group, "flashinfer_made", refusal, None, facts.timeout_s)
    except FusionError:
        (opened or memory).close()
        raise
    opened.warm_up()
    return opened
