"""The load of FlashInfer on first use, with Paddle in the place of torch (`torch_proxy`), and nothing left behind.

Where the import fails (the upstream wheels use torch modules that Paddle has no counterpart of), a kernel that
FlashInfer compiled earlier is loaded by itself: its entry takes Paddle tensors through tvm_ffi, without torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fd_fusion.backends.flashinfer.torch_proxy import PACKAGE, scoped_torch
from fd_fusion.reasons import FusionError, Reason, because

DISTRIBUTIONS = ("flashinfer-python-paddle", "flashinfer-python")
MODULE = "trtllm_comm"  # FlashInfer's name of the compiled module

_lock = threading.RLock()
_state: FlashInfer | Reason | None = None


@dataclass(frozen=True)
class FlashInfer:
    """What was loaded. `build()` compiles or loads the kernel and returns the entry of a compiled module, if any.

    `function` is `trtllm_allreduce_fusion`, or None where the import failed.
    """

    version: str
    framework: ModuleType  # paddle or torch: the one whose tensors it takes
    function: Callable[..., None] | None
    build: Callable[[], Callable[..., None] | None]
    note: str | None = None  # why the compiled module is used instead of the Python interface


def installed_version() -> str | None:
    """Return the installed version, without importing it; "0" for a copy without a version; None for none."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    if PACKAGE in sys.modules:
        return getattr(sys.modules[PACKAGE], "__version__", "0")
    return "0" if importlib.util.find_spec(PACKAGE) else None


def load() -> FlashInfer:
    """Import FlashInfer once in the process. Raises FusionError, with the same reason each time."""
    global _state
    with _lock:
        if _state is None:
            try:
                _state = _load()
            except FusionError as error:
                _state = error.reason
        if isinstance(_state, Reason):
            raise FusionError(_state)
        return _state


def compiled_module(version: str) -> Path | None:
    """Return FlashInfer's own build of the kernel: shipped with it, or in its cache; None if it must be built."""
    found: list[Path] = []
    for package, inside in ((PACKAGE, "data/aot"), ("flashinfer_jit_cache", "jit_cache")):
        with contextlib.suppress(ValueError):  # a module that was put into sys.modules without a spec
            if (spec := importlib.util.find_spec(package)) and spec.origin:
                found += (Path(spec.origin).parent / inside / MODULE).glob(f"{MODULE}.so")
    base = os.environ.get("FLASHINFER_WORKSPACE_BASE") or os.path.expanduser("~")
    if os.path.isabs(base):  # "~" where there is neither HOME nor an entry in the password file: no cache either
        cache = Path(base) / ".cache" / "flashinfer" / version
        found += sorted(cache.glob(f"*/cached_ops/{MODULE}/{MODULE}.so"))
    return found[0] if found else None


def _load() -> FlashInfer:
    version = installed_version()
    if version is None:
        raise FusionError(because("flashinfer_missing"))
    try:  # on a machine without Paddle the tensors are torch's own
        framework = sys.modules.get("paddle") or importlib.import_module("torch")
    except ImportError as error:
        raise FusionError(because("no_paddle", detail=str(error))) from None
    before = set(sys.modules)
    scope = scoped_torch if framework.__name__ == "paddle" else contextlib.nullcontext
    try:
        _map_cuda_runtime()
        with scope():
            comm = importlib.import_module(f"{PACKAGE}.comm")
    except FusionError:
        raise
    except Exception as error:  # whatever an import can raise; it becomes the reason or the note
        for name in filter(_is_flashinfers, set(sys.modules) - before):
            del sys.modules[name]  # no later import finds half of a package
        return _load_compiled(version, framework, f"{type(error).__name__}: {error}")
    _refuse_foreign(framework)
    version = getattr(sys.modules[PACKAGE], "__version__", version)
    function = getattr(comm, "trtllm_allreduce_fusion", None)
    if function is None:
        raise FusionError(because("flashinfer_no_kernel", version=version))

    def build() -> None:
        with scope():
            importlib.import_module(f"{PACKAGE}.comm.trtllm_ar").get_trtllm_comm_module()

    return FlashInfer(version, framework, function, build)


def _load_compiled(version: str, framework: ModuleType, error: str) -> FlashInfer:
    """Load the compiled kernel alone, by tvm_ffi: the second way."""
    reason = because("flashinfer_import", version=version, framework=framework.__name__, error=error)
    path = compiled_module(version)
    if path is None or importlib.util.find_spec("tvm_ffi") is None:
        raise FusionError(reason)

    def build() -> Callable[..., None]:
        return importlib.import_module("tvm_ffi").load_module(str(path)).trtllm_allreduce_fusion

    return FlashInfer(version, framework, None, build, note=str(reason))


def _refuse_foreign(framework: ModuleType) -> None:
    """Raise if FlashInfer was imported before with real torch, by the host perhaps: it takes torch tensors then."""
    for name in filter(_is_flashinfers, list(sys.modules)):
        tensor = getattr(vars(sys.modules[name]).get("torch"), "Tensor", None)
        if tensor is not None and tensor is not framework.Tensor:
            raise FusionError(because("flashinfer_foreign", module=name, framework=framework.__name__))


def _is_flashinfers(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _map_cuda_runtime() -> None:
    """Map a CUDA runtime: versions before 0.6.14 search this process's maps for one while they are imported."""
    with open("/proc/self/maps") as maps:
        if "libcudart" in maps.read():
            return
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return
