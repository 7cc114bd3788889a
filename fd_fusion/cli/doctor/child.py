"""The checks that import packages: in child processes, since an import may fail, hang or end its process."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from fd_fusion.binding.backend_selection import load_backend
from fd_fusion.cli.doctor.checks import CheckResult, of_reason, result, run_checks
from fd_fusion.cli.doctor.machine import tool
from fd_fusion.cli.processes.signals import held_back
from fd_fusion.cli.processes.tied import child_environment, end_with_parent
from fd_fusion.config import BACKENDS
from fd_fusion.frameworks.tensors import devices, paddle_or_torch
from fd_fusion.reasons import FusionError, because
from fd_fusion.spec import OpSpec
from fd_fusion.tuning import table as tuning_table

_MARK = "fd_fusion doctor: "
_FUSING = {"cpu": ("triton",), "gpu": ("triton", "flashinfer")}  # those with a kernel
LAUNCHED_ROWS = {"cpu": (1, 3), "gpu": (1, 5, 64)}  # T of each call of the launch


def ask(what: str, *args: Any, timeout_s: float = 120) -> list[CheckResult]:
    """Run one of `PROBES` in a child process, and return its results. A child that dies is a result."""
    with asking(what, *args, timeout_s=timeout_s) as answer:
        return answer()


@contextlib.contextmanager
def asking(what: str, *args: Any, timeout_s: float = 120) -> Iterator[Callable[[], list[CheckResult]]]:
    """Start such a child now; the function that is yielded waits for its results. It ends with the block."""
    command = [sys.executable, "-W", "ignore", "-m", "fd_fusion.cli.doctor.child", what, *map(str, args)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with contextlib.ExitStack() as stack:
        with held_back():
            child = stack.enter_context(subprocess.Popen(command, env=child_environment(), text=True, **pipes))
            stack.callback(child.kill)  # does nothing to one that has ended
        deadline = time.monotonic() + timeout_s  # of all children that run at once, though they are read in turn
        yield lambda: run_checks(what, lambda: _answer(child, what, timeout_s, deadline))


def _answer(child: subprocess.Popen, what: str, timeout_s: float, deadline: float) -> list[CheckResult]:
    try:
        out, err = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        return [result("import", _failed(what), f"importing {what} was not done within {timeout_s:g} s")]
    lines = [line for line in out.splitlines() if line.startswith(_MARK)]
    if not lines:
        last = next((line for line in reversed(err.splitlines()) if line.strip()), "no message")
        text = f"importing {what} ends its process (exit code {child.returncode}): {last}"
        return [result("import", _failed(what), text, "reinstall the package")]
    return [CheckResult(**one) for one in json.loads(lines[-1].removeprefix(_MARK))]


def _failed(what: str) -> str:
    """Return the state of a probe that came to no answer: nothing works without the framework."""
    return "broken" if what == "framework" else "warn"


def spec_for(size: int, device: str, arch: int | None, rank: int = 0) -> OpSpec:
    """Return the pair that `doctor` asks about and launches: bfloat16, H=4096 on a GPU, 256 under the interpreter."""
    hidden_size = 4096 if device == "gpu" else 256
    return OpSpec(rank, size, hidden_size, "bfloat16", device=device, arch=arch)


def framework(size: str) -> Iterator[CheckResult]:
    """Check Paddle, or torch where there is no Paddle: its devices, and which backends can run."""
    try:
        module = paddle_or_torch()
    except ImportError as error:
        detail = str(error) if importlib.util.find_spec("paddle") else "neither Paddle nor torch is installed"
        yield of_reason("import", "broken", because("no_paddle", detail=detail))
        return
    device, arch, count = devices(module)
    name = f"{module.__name__} {module.__version__}"
    where = f"{count} GPU{'s' * (count > 1)}, sm_{arch}" if count else "CPU only"
    data = {"name": module.__name__, "version": module.__version__, "device": device, "arch": arch, "gpus": count}
    yield result("import", "ok", f"{name} imports: {where}", **data)
    listed = [] if count else (tool("nvidia-smi", "-L") or "").splitlines()
    if gpus := sum(line.startswith("GPU ") for line in listed):
        remedy = "install a build for GPUs, with a CUDA that the driver knows, and check CUDA_VISIBLE_DEVICES"
        yield result("gpus", "off", f"{name} sees none of this machine's GPUs ({gpus})", remedy)
    spec = spec_for(int(size), device, arch)
    if device == "gpu":
        yield from run_checks("framework", lambda: [_memory(module, spec)])
        yield from run_checks("framework", lambda: [_table(module, spec)])
    yield from run_checks("backends", lambda: _backends(spec))


def _memory(framework: Any, spec: OpSpec) -> CheckResult:
    """Compare the room that is left on the GPU with what a workspace takes."""
    free, total = (part >> 20 for part in framework.cuda.mem_get_info())
    need = spec.workspace_bytes >> 20
    state, remedy = ("ok", "") if free > need else ("off", "free GPU memory")
    text = f"GPU memory: {free} of {total} MiB free; the workspaces of a process take up to {need} MiB (workspace_mb)"
    return result("memory", state, text, remedy, free_mib=free)


def _table(framework: Any, spec: OpSpec) -> CheckResult:
    """Check whether `bind` would find a measurement of this machine."""
    path = tuning_table.table_path()
    key = (framework.cuda.get_device_name(), spec.size, spec.hidden_size, spec.dtype, tuning_table.versions_here())
    limits, reason = tuning_table.read_limits(tuning_table.Fingerprint(*key), path)
    shape = f"{spec.size} ranks, H={spec.hidden_size}, {spec.dtype}"
    if reason:
        return of_reason("table", "warn", reason)
    if limits:
        text = f"tuned limits for {shape}: {dict(limits.rows)}"
        return result("table", "ok", text, **limits.to_dict())
    where = path or "~/.cache, since this user has no home"
    text = f"nothing tuned for {shape} in {where}: the built-in limits count"
    return result("table", "note", text, f"python -m fd_fusion tune --nproc {spec.size}")


def _backends(spec: OpSpec) -> Iterator[CheckResult]:
    """Ask each backend. Fusion is off where none of those with a kernel can run."""
    refused = {}
    for name in BACKENDS[1:]:
        _, reason = load_backend(name, [spec])
        if reason is None:
            yield result(name, "ok", f"{name}: yes, on {spec.device}")
        else:
            refused[name] = reason
            yield result(name, "note", f"{name}: no: {reason}", reason.remedy, code=reason.code)
    if all(name in refused for name in _FUSING[spec.device]):
        first = refused[_FUSING[spec.device][0]]
        yield result("any", "off", f"no backend can fuse on this machine: {first}", first.remedy)


def flashinfer() -> Iterator[CheckResult]:
    """Check whether FlashInfer's kernel loads, or FlashInfer imports where it would be compiled."""
    from fd_fusion.backends.flashinfer import loader

    version = loader.installed_version()
    compiled = loader.compiled_module(version) is not None
    try:
        (loader.load if compiled else loader.run_build)(version)
    except FusionError as error:
        yield of_reason("import", "warn", error.reason)
        return
    text = f"the kernel of FlashInfer {version} is compiled, and loads"
    if not compiled:
        text = f"FlashInfer {version} imports; its kernel is not compiled yet"
    yield result("import", "ok", text, version=version, compiled=compiled)


def fastdeploy() -> Iterator[CheckResult]:
    """Check FastDeploy's own plugin loading, and which of its decoders could be bound."""
    version = getattr(importlib.import_module("fastdeploy"), "__version__", "unknown")
    yield result("import", "ok", f"FastDeploy {version} imports", version=version)
    importlib.import_module("fastdeploy.plugins").load_model_register_plugins()
    ours = sys.modules.get("fd_fusion.hosts.fastdeploy.plugin")
    if ours is not None and ours.is_registered():
        state, does, remedy = "ok", "finds and loads fd_fusion", ""
    else:
        state, does = "off", "does not bring fd_fusion up"
        remedy = "pip install --no-deps fd_fusion beside FastDeploy, unset FD_FUSION_DISABLE, "
        remedy += "and set FD_PLUGINS=fd_fusion"
    yield result("plugin", state, f"FastDeploy's plugin loading {does}", remedy)
    yield from run_checks("fastdeploy", lambda: [_custom_all_reduce()])
    yield _decoders()


def _custom_all_reduce() -> CheckResult:
    """Check whether FastDeploy's own all-reduce, which fusing has to beat, is on, and up to how many bytes."""
    from fd_fusion.hosts.fastdeploy import custom_all_reduce as own

    data, how = {"max_size_mb": own.limit_mb(), "compiled": True}, "on, unless --disable-custom-all-reduce is given"
    try:
        own.check_compiled()
    except (ImportError, RuntimeError) as error:
        data["compiled"], how = False, f"off: {error}"
    text = f"FastDeploy's custom all-reduce is {how}; FD_CUSTOM_AR_MAX_SIZE_MB is {data['max_size_mb']}"
    return result("custom_all_reduce", "note", text, **data)


def _decoders() -> CheckResult:
    from fd_fusion.hosts.fastdeploy.between import reads_in_layer
    from fd_fusion.hosts.fastdeploy.pairs import DECODERS

    models = importlib.import_module("fastdeploy.model_executor.models").__name__ + "."
    modules = [module for key, module in list(sys.modules.items()) if key.startswith(models)]
    classes = {name: value for module in modules for name, value in vars(module).items() if name in DECODERS}
    known = sorted(name for name, value in classes.items() if not reads_in_layer(value.forward))
    text = f"decoders that can be bound: {', '.join(known)}" if known else "fd_fusion knows none of its decoders"
    return result("decoders", "ok" if known else "off", text, decoders=known)


PROBES: dict[str, Callable[..., Iterator[CheckResult]]] = {p.__name__: p for p in (framework, flashinfer, fastdeploy)}


def main() -> None:
    end_with_parent()
    what, *args = sys.argv[1:]
    found = run_checks(what, lambda: PROBES[what](*args), _failed(what))
    print("\n" + _MARK + json.dumps([asdict(one) for one in found]), flush=True)


if __name__ == "__main__":
    main()
