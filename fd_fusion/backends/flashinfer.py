"""FlashInfer's fused kernel as a backend: loaded lazily, in our workspace, or off with a reason.

It is not the default. Its sum is rounded before the residual is added, and its reduction tree changes with T, so a
row's bits depend on the other rows of the batch; and its wait has no end, so a missing rank ends the process.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from fd_fusion import runtime_flashinfer
from fd_fusion.backends import flashinfer_unified
from fd_fusion.backends.flashinfer_call import Call, Fixed, Tensor, compiled_call, python_call
from fd_fusion.backends.flashinfer_versions import block_threads, rules
from fd_fusion.backends.flashinfer_watchdog import ControlReader, Watchdog
from fd_fusion.backends.flashinfer_workspace import Layout, open_memory, rows_that_fit
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import CLOSE_TIMEOUT_S, attempt, settle
from fd_fusion.reasons import FusionError, Reason, because
from fd_fusion.tuning import Facts, row_limit

SIZES = (2, 4, 8, 16)
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
BUILD_TIMEOUT_S = 120.0  # a silent rank; one that shows progress is waited for ten times as long
WARM_UP = 10  # the limit on waiting before freeze(), in timeouts
_ONE_SHOT_BYTES = {2: 512 << 20, 4: 64 << 20, 8: 42 << 20, 16: 42 << 20}  # 2*N*T*H*e up to which one-shot is taken
_ALIGNMENT = 16


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
    need = _ALIGNMENT // ELEMENT_BYTES[facts.dtype]
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
        return flashinfer_unified.open(facts, group, library, rows, Opened)
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


def device_table(framework: Any, addresses: list[int]) -> Tensor:
    """The addresses as an int64 tensor on the GPU."""
    if framework.__name__ == "paddle":
        return framework.to_tensor(addresses, dtype="int64")
    return framework.tensor(addresses, dtype=framework.int64, device="cuda")


class Opened:
    """FlashInfer's kernel over one workspace, for one group, hidden size and dtype."""

    def __init__(
        self,
        facts: Facts,
        group: Group,
        library: Any,
        call: Call,
        adds_bias: bool,
        rows: int,
        nbytes: int,
        read: Any,
        release: Callable[..., Any],
    ):
        self.limit, self.bytes = rows, nbytes
        self._facts, self._group, self._library = facts, group, library
        self._call, self._adds_bias, self._read, self._release = call, adds_bias, read, release
        self._two_shot = rules(library.version).two_shot
        op = f"flashinfer all_reduce_rms_norm (H={facts.hidden_size}, {facts.dtype})"
        what = f"{op} of group {group.name!r}, rank {group.rank} of {group.size},"
        self._watchdog = Watchdog(read, what, WARM_UP * facts.timeout_s)
        self._closed = False
        atexit.register(self.close)

    def finish(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        """One kernel for what `reference.all_reduce_rms_norm` says, with FlashInfer's own roundings.

        Args: partial, residual: [T, H]. weight: [H]. All of the opened dtype, contiguous, 16-byte aligned.
        Returns: (norm_out, residual_out), [T, H] each.
        Raises: ValueError: before the launch. RuntimeError: the launch failed; the other ranks are waiting then.
        """
        framework = self._library.framework
        if residual is None:
            residual = framework.zeros_like(partial)
        self._require(partial, residual, weight, weight_offset)
        norm_out, residual_out = framework.empty_like(partial), framework.empty_like(partial)
        rows = partial.shape[0]
        if rows:
            self._call(partial, residual, norm_out, residual_out, weight, eps, weight_offset, self.one_shot(rows))
        return norm_out, residual_out

    def one_shot(self, rows: int) -> bool:
        """Two-shot for big messages, where the version's two-shot is sound; it wants more rows than ranks."""
        facts = self._facts
        nbytes = 2 * facts.size * rows * facts.hidden_size * ELEMENT_BYTES[facts.dtype]
        return not self._two_shot or rows <= facts.size or nbytes <= _ONE_SHOT_BYTES[facts.size]

    def check(self) -> None:
        """Nothing to raise: a call that runs out of time ends the process."""

    def freeze(self) -> None:
        """From now on a call may wait `timeout_s`. Nothing allocates but the outputs."""
        self._watchdog.limit_s = self._facts.timeout_s

    def stats(self) -> dict[str, Any]:
        return {"version": self._library.version, "note": self._library.note, "limit_s": self._watchdog.limit_s}

    def close(self) -> None:
        """Give the workspace back, all ranks together and in bounded time; leave it to process exit if a call hangs."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        idle = self._watchdog.idle_within(CLOSE_TIMEOUT_S)
        if self._release(wait=idle):
            self._watchdog.stop()
            self._read.close()

    def warm_up(self) -> None:
        """Collective: call once with numbers that add up exactly, so the kernel is loaded and known to work."""
        facts, framework = self._facts, self._library.framework
        rows = [1, facts.size + 1] if not self.one_shot(self.limit) else [1]

        def run() -> None:
            for count in rows:
                x = _full(framework, (count, facts.hidden_size), facts.dtype, facts.rank + 1.0)
                weight = _full(framework, (facts.hidden_size,), facts.dtype, 1.0)
                norm_out, total = self.finish(x, None, weight, facts.eps, 0.0)
                need = facts.size * (facts.size + 1) / 2
                got = (float(total.min()), float(total.max()), round(float(norm_out.max()), 1))
                if got != (need, need, 1.0):
                    raise FusionError(because("flashinfer_wrong", got=str(got), need=str((need, need, 1.0))))

        _, refusal = attempt(run)
        try:
            settle(self._group, "flashinfer_ran", refusal, None, WARM_UP * facts.timeout_s)
        except FusionError:
            self.close()
            raise

    def _require(self, partial: Tensor, residual: Tensor, weight: Tensor, weight_offset: float) -> None:
        """The kernel checks none of this: it would read past the end, or one dtype as another."""
        facts, rows = self._facts, partial.shape[0]
        if rows > self.limit:
            raise ValueError(f"flashinfer: T={rows}; the workspace holds {self.limit} rows")
        if weight_offset and not self._adds_bias:
            raise ValueError(f"flashinfer {self._library.version}: weight_offset {weight_offset}; it adds none")
        row = [rows, facts.hidden_size]
        for name, tensor, shape in (("x", partial, row), ("residual", residual, row), ("weight", weight, row[1:])):
            dtype = str(tensor.dtype).rpartition(".")[2]
            if [*tensor.shape] != shape or dtype != facts.dtype:
                raise ValueError(f"flashinfer: {name} is {[*tensor.shape]} {dtype}; expected {shape} {facts.dtype}")
            if not tensor.is_contiguous() or tensor.data_ptr() % _ALIGNMENT:
                raise ValueError(
                    f"flashinfer: {name} is not contiguous, or not aligned to {_ALIGNMENT} bytes; copy it"
                )


def _full(framework: Any, shape: tuple[int, ...], dtype: str, value: float) -> Tensor:
    where = {} if framework.__name__ == "paddle" else {"device": "cuda"}
    return framework.full(shape, value, dtype=getattr(framework, dtype), **where)
