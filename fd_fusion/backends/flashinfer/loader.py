"""FlashInfer's compiled kernel: found, or compiled by FlashInfer in a process of its own, and loaded by tvm_ffi.

FlashInfer's Python enters no rank: it needs torch, or Paddle's torch proxy, which every thread of a process sees. The
compiled module needs neither, and takes the tensors of both.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fd_fusion.reasons import FusionError, Reason, because

DISTRIBUTIONS = ("flashinfer-python-paddle", "flashinfer-python")
PACKAGE = "flashinfer"
MODULE = "trtllm_comm"  # FlashInfer's name of the compiled module
# Under torch where there is one, else under Paddle's proxy with what that lacks. Versions before 0.6.14 search their
# process for a CUDA runtime while they are imported.
_BUILD = """
import ctypes, importlib.util, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with who waits for it
if not importlib.util.find_spec("torch"):
    import paddle
    paddle.enable_compat(scope={"flashinfer"}, silent=True)
    if not hasattr(paddle.distributed, "ProcessGroup"):
        paddle.distributed.ProcessGroup = paddle.base.core.ProcessGroup
for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        break
    except OSError:
        pass
from flashinfer.comm.trtllm_ar import get_trtllm_comm_module
if "compile" in sys.argv:
    get_trtllm_comm_module()
print(sys.modules["flashinfer"].__version__)
"""


def installed_version() -> str | None:
    """Return the installed version, without importing it; None for none."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


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


def load(version: str) -> Callable[..., None]:
    """Return the entry of the compiled module, compiled first where it is not yet, with a line on stderr: minutes.

    Raises: FusionError, with the same reason each time.
    """
    found = _load(version)
    if isinstance(found, Reason):
        raise FusionError(found)
    return found


@functools.cache
def _load(version: str) -> Callable[..., None] | Reason:
    start, path = time.monotonic(), compiled_module(version)
    try:
        if path is None:
            _say(f"compiling the kernel of FlashInfer {version}: some minutes, once on this machine")
            path = compiled_module(run_build(version, "compile"))
            _say(f"the kernel of FlashInfer {version} is compiled, in {time.monotonic() - start:.0f} s")
        return importlib.import_module("tvm_ffi").load_module(str(path)).trtllm_allreduce_fusion
    except FusionError as error:
        return error.reason
    except Exception as error:  # whatever loading can raise; it is voted on
        return because("flashinfer_build", version=version, error=f"{type(error).__name__}: {error}")


def run_build(version: str, *how: str) -> str:
    """Import FlashInfer in a process of its own, and compile its kernel if `how` is "compile".

    Returns: the version by which it names its cache. Raises: FusionError.
    """
    code = f"import sys\nsys.path[:] = {sys.path!r}\n{_BUILD}"
    command = [sys.executable, "-W", "ignore", "-c", code, *how]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        error = lines[-1] if done.returncode > 0 and lines else f"it ended its process (exit code {done.returncode})"
        raise FusionError(because("flashinfer_build", version=version, error=error))
    return done.stdout.split()[-1]


def _say(text: str) -> None:
    print(f"fd_fusion: {text}", file=sys.stderr, flush=True)
