"""The installed packages, read from their metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fd_fusion import __version__
from fd_fusion.cli.doctor.checks import CheckResult, of_reason, result
from fd_fusion.frameworks.paddle_runtime import too_old
from fd_fusion.reasons import because

PADDLE = ("paddlepaddle", "paddlepaddle-gpu")
_FLASHINFER = ("flashinfer-python", "flashinfer-python-paddle")
_FLASHINFER_PARTS = ("flashinfer-cubin", "flashinfer-jit-cache")
_FASTDEPLOY = ("fastdeploy-gpu", "fastdeploy-gpu-80-90", "fastdeploy-gpu-86-89", "fastdeploy")
# Others, and what is missing without them.
_OPTIONAL = {
    "apache-tvm-ffi": "needed only to load FlashInfer's kernel",
    "torch": "needed only on machines without Paddle",
    "prometheus_client": "metrics go to the log as JSON lines",
}

Look = Callable[[str], "str | None"]


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_of(module: str) -> str | None:
    """Return the folder on the path in which a package lies, with or without a distribution, or None."""
    spec = importlib.util.find_spec(module)
    return str(Path(next(iter(spec.submodule_search_locations))).parent) if spec else None


def packages(version_of: Look = version_of, source_of: Look = source_of) -> Iterator[CheckResult]:
    """Check every package that fusion may need."""
    yield _found("python", "Python", sys.version.split()[0])
    yield _found("fd_fusion", "fd_fusion", __version__)
    yield _paddle(version_of)
    if version := version_of("triton"):
        yield _found("triton", "Triton", version)
    else:
        yield of_reason("triton", "warn", because("no_triton", detail="it is not installed"))
    yield _flashinfer(version_of)
    yield _fastdeploy(version_of, source_of)
    for name, without in _OPTIONAL.items():
        if version := version_of(name):
            yield _found(name, name, version)
        else:
            yield result(name, "note", f"{name} is not installed: {without}", version=None)


def _found(name: str, called: str, version: str) -> CheckResult:
    return result(name, "ok", f"{called} {version}", version=version)


def _versions(names: tuple[str, ...], version_of: Look) -> tuple[dict[str, str], str]:
    """Return the versions of those that are installed, and the same as text."""
    found = {name: version for name in names if (version := version_of(name))}
    return found, ", ".join(f"{name} {version}" for name, version in found.items())


def _paddle(version_of: Look) -> CheckResult:
    found, text = _versions(PADDLE, version_of)
    if not found:
        state = "warn" if version_of("torch") else "broken"  # on torch the kernels, bench and tune run, but no model
        return of_reason("paddle", state, because("no_paddle", detail="it is not installed"), versions=found)
    first, *second = found.values()
    reason = because("two_paddles", first=first, second=second[0]) if second else too_old(first)
    if reason:
        return of_reason("paddle", "broken", reason, versions=found)
    return result("paddle", "ok", text, versions=found)


def _flashinfer(version_of: Look) -> CheckResult:
    """Check FlashInfer's packages, which must be of one version: its Python calls its kernels by position."""
    found, text = _versions((*_FLASHINFER, *_FLASHINFER_PARTS), version_of)
    if not any(name in found for name in _FLASHINFER):
        return result("flashinfer", "note", "FlashInfer is not installed: fine, triton needs none of it")
    if len({version.split("+")[0] for version in found.values()}) > 1:
        return of_reason("flashinfer", "warn", because("flashinfer_mixed", versions=text), versions=found)
    return result("flashinfer", "ok", text, versions=found)


def _fastdeploy(version_of: Look, source_of: Look) -> CheckResult:
    for distribution in _FASTDEPLOY:
        if version := version_of(distribution):
            return _found("fastdeploy", distribution, version)
    if folder := source_of("fastdeploy"):
        text = f"FastDeploy from {folder}, a source tree"
        return result("fastdeploy", "ok", text, version=None, folder=folder)
    return result("fastdeploy", "note", "FastDeploy is not installed", version=None)
