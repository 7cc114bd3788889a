"""The installed packages, read from their metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fd_fusion import __version__
from fd_fusion.cli.doctor.checks import CheckResult, of_reason
from fd_fusion.frameworks.paddle_runtime import too_old
from fd_fusion.reasons import because

TOPIC = "packages"
_PADDLE = ("paddlepaddle", "paddlepaddle-gpu")
_FLASHINFER = ("flashinfer-python", "flashinfer-python-paddle")
_FLASHINFER_PARTS = ("flashinfer-cubin", "flashinfer-jit-cache")
_FASTDEPLOY = ("fastdeploy-gpu", "fastdeploy-gpu-80-90", "fastdeploy-gpu-86-89", "fastdeploy")
# Others, and what is missing without them.
_OPTIONAL = {
    "apache-tvm-ffi": "needed only to load a FlashInfer kernel that was compiled beforehand",
    "torch": "needed only on machines without Paddle",
    "prometheus_client": "metrics go to the log as JSON lines",
}

VersionOf = Callable[[str], "str | None"]
SourceOf = Callable[[str], "str | None"]


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


def packages(version_of: VersionOf = version_of, source_of: SourceOf = source_of) -> Iterator[CheckResult]:
    """Check every package that fusion may need."""
    yield CheckResult(
        TOPIC, "python", "ok", f"Python {sys.version.split()[0]}", data={"version": sys.version.split()[0]}
    )
    yield CheckResult(TOPIC, "fd_fusion", "ok", f"fd_fusion {__version__}", data={"version": __version__})
    yield _paddle({name: version_of(name) for name in _PADDLE}, version_of("torch"))
    triton = version_of("triton")
    if triton is None:
        yield of_reason(TOPIC, "triton", "warn", because("no_triton", detail="it is not installed"))
    else:
        yield CheckResult(TOPIC, "triton", "ok", f"Triton {triton}", data={"version": triton})
    yield _flashinfer(version_of)
    yield _fastdeploy(version_of, source_of)
    for name, without in _OPTIONAL.items():
        version = version_of(name)
        text = f"{name} {version}" if version else f"{name} is not installed: {without}"
        yield CheckResult(TOPIC, name, "ok" if version else "note", text, data={"version": version})


def _paddle(versions: dict[str, str | None], torch: str | None) -> CheckResult:
    found = {name: version for name, version in versions.items() if version}
    if len(found) == 2:
        first, second = found.values()
        return of_reason(
            TOPIC, "paddle", "broken", because("two_paddles", first=first, second=second), versions=found
        )
    if not found:
        state = "warn" if torch else "broken"  # on torch the kernels, bench and tune run, but no model
        return of_reason(TOPIC, "paddle", state, because("no_paddle", detail="it is not installed"), versions={})
    name, version = next(iter(found.items()))
    if refusal := too_old(version):
        return of_reason(TOPIC, "paddle", "broken", refusal, versions=found)
    return CheckResult(TOPIC, "paddle", "ok", f"{name} {version}", data={"versions": found})


def _flashinfer(version_of: VersionOf) -> CheckResult:
    """Check FlashInfer's packages, which must be of one version: its Python calls its kernels by position."""
    found = {name: v for name in (*_FLASHINFER, *_FLASHINFER_PARTS) if (v := version_of(name))}
    if not any(name in found for name in _FLASHINFER):
        return CheckResult(TOPIC, "flashinfer", "note", "FlashInfer is not installed: fine, triton needs none of it")
    if len({version.split("+")[0] for version in found.values()}) > 1:
        versions = ", ".join(f"{name} {version}" for name, version in found.items())
        return of_reason(TOPIC, "flashinfer", "warn", because("flashinfer_mixed", versions=versions), versions=found)
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return CheckResult(TOPIC, "flashinfer", "ok", text, data={"versions": found})


def _fastdeploy(version_of: VersionOf, source_of: SourceOf) -> CheckResult:
    for distribution in _FASTDEPLOY:
        if version := version_of(distribution):
            return CheckResult(TOPIC, "fastdeploy", "ok", f"{distribution} {version}", data={"version": version})
    if folder := source_of("fastdeploy"):
        text = f"FastDeploy from {folder}, a source tree"
        return CheckResult(TOPIC, "fastdeploy", "ok", text, data={"version": None, "folder": folder})
    return CheckResult(TOPIC, "fastdeploy", "note", "FastDeploy is not installed", data={"version": None})
