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
from typing import Any

from fd_fusion.binding.backend_selection import load_backend
from fd_fusion.cli.doctor.checks import CheckResult, of_reason, run_checks
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
        yield lambda: _answer(child, what, timeout_s, deadline)


def _answer(child: subprocess.Popen, what: str, timeout_s: float, deadline: float) -> list[CheckResult]:
    try:
        out, err = child.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return [CheckResult(what, "import", _failed(what), f"importing {what} was not done within {timeout_s:g} s")]
    lines = [line for line in out.splitlines() if line.startswith(_MARK)]
    if not lines:
        last = next((line for line in reversed(err.splitlines()) if line.strip()), "no message")
        text = f"importing {what} ends its process (exit code {child.returncode}): {last}"
        return [CheckResult(what, "import", _failed(what), text, "reinstall the package")]
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
        yield of_reason("framework", "import", "broken", because("no_paddle", detail=detail))
        return
    device, arch, count = devices(module)
    name = f"{module.__name__} {module.__version__}"
    where = f"{count} GPU{'s' * (count > 1)}, sm_{arch}" if count else "CPU only"
    data = {"name": module.__name__, "version": module.__version__, "device": device, "arch": arch, "gpus": count}
    yield CheckResult("framework", "import", "ok", f"{name} imports: {where}", data=data)
    listed = [] if count else (tool("nvidia-smi", "-L") or "").splitlines()
    if gpus := sum(line.startswith("GPU ") for line in listed):
        remedy = "install a build for GPUs, with a CUDA that the driver knows, and check CUDA_VISIBLE_DEVICES"
        yield CheckResult("framework", "gpus", "off", f"{name} sees none of this machine's GPUs ({gpus})", remedy)
    spec = spec_for(int(size), device, arch)
    yield from run_checks("framework", lambda: _memory(module, spec))
    yield from run_checks("framework", lambda: _table(module, spec))
    yield from _backends(spec)


def _memory(framework: Any, spec: OpSpec) -> Iterator[CheckResult]:
    """Compare the room that is left on the GPU with what a workspace takes."""
    if spec.device == "cpu":
        return
    free, total = (part >> 20 for part in framework.cuda.mem_get_info())
    need = spec.workspace_bytes >> 20
    text = f"GPU memory: {free} of {total} MiB free; the workspaces of a process take up to {need} MiB (workspace_mb)"
    state = "ok" if free > need else "off"
    yield CheckResult(
        "framework", "memory", state, text, "" if state == "ok" else "free GPU memory", {"free_mib": free}
    )


def _table(framework: Any, spec: OpSpec) -> Iterator[CheckResult]:
    """Check whether `bind` would find a measurement of this machine."""
    if spec.device == "cpu":
        return
    path = tuning_table.table_path()
    key = (framework.cuda.get_device_name(), spec.size, spec.hidden_size, spec.dtype, tuning_table.versions_here())
    limits, reason = tuning_table.read_limits(tuning_table.Fingerprint(*key), path)
    shape = f"{spec.size} ranks, H={spec.hidden_size}, {spec.dtype}"
    if reason:
        yield of_reason("framework", "table", "warn", reason)
    elif limits:
        yield CheckResult(
            "framework", "table", "ok", f"tuned limits for {shape}: {dict(limits.rows)}", data=limits.to_dict()
        )
    else:
        where = path or "~/.cache, since this user has no home"
        text = f"nothing tuned for {shape} in {where}: the built-in limits count"
        yield CheckResult("framework", "table", "note", text, f"python -m fd_fusion tune --nproc {spec.size}")


def _backends(spec: OpSpec) -> Iterator[CheckResult]:
    """Ask each backend. Fusion is off where none of those with a kernel can run."""
    refused = {}
    for name in BACKENDS[1:]:
        _, reason = load_backend(name, [spec])
        if reason is None:
            yield CheckResult("backends", name, "ok", f"{name}: yes, on {spec.device}")
        else:
            refused[name] = reason
            yield CheckResult("backends", name, "note", f"{name}: no: {reason}", reason.remedy, {"code": reason.code})
    if all(name in refused for name in _FUSING[spec.device]):
        first = refused[_FUSING[spec.device][0]]
        yield CheckResult("backends", "any", "off", f"no backend can fuse on this machine: {first}", first.remedy)


def flashinfer() -> Iterator[CheckResult]:
    """Check whether FlashInfer imports under the framework of this machine, and has its kernel."""
    from fd_fusion.backends.flashinfer import loader

    paddle_or_torch()
    try:
        library = loader.load()
    except FusionError as error:
        yield of_reason("flashinfer", "import", "warn", error.reason)
        return
    path = loader.compiled_module(library.version)
    data = {"version": library.version, "compiled": bool(path)}
    text = f"FlashInfer {library.version} imports; its kernel {'is compiled' if path else 'is not compiled yet'}"
    yield CheckResult("flashinfer", "import", "ok", text + (f" ({library.note})" if library.note else ""), data=data)


def fastdeploy() -> Iterator[CheckResult]:
    """Check FastDeploy's own plugin loading, and which of its decoders could be bound."""
    host = importlib.import_module("fastdeploy")
    version = getattr(host, "__version__", "unknown")
    yield CheckResult("fastdeploy", "import", "ok", f"FastDeploy {version} imports", data={"version": version})
    importlib.import_module("fastdeploy.plugins").load_model_register_plugins()
    ours = sys.modules.get("fd_fusion.hosts.fastdeploy.plugin")
    if ours is None or not ours.is_registered():
        remedy = (
            "pip install --no-deps fd_fusion beside FastDeploy, unset FD_FUSION_DISABLE, and set FD_PLUGINS=fd_fusion"
        )
        yield CheckResult(
            "fastdeploy", "plugin", "off", "FastDeploy's plugin loading does not bring fd_fusion up", remedy
        )
    else:
        yield CheckResult("fastdeploy", "plugin", "ok", "FastDeploy's plugin loading finds and loads fd_fusion")
    yield from run_checks("fastdeploy", _custom_all_reduce)
    from fd_fusion.hosts.fastdeploy.between import reads_in_layer
    from fd_fusion.hosts.fastdeploy.pairs import DECODERS

    importlib.import_module("fastdeploy.model_executor.models")
    classes = {
        name
        for key, module in list(sys.modules.items())
        if key.startswith("fastdeploy.model_executor.models.")
        for name, value in vars(module).items()
        if name in DECODERS and not reads_in_layer(value.forward)
    }
    known = sorted(classes)
    text = f"decoders that can be bound: {', '.join(known)}" if known else "fd_fusion knows none of its decoders"
    yield CheckResult("fastdeploy", "decoders", "ok" if known else "off", text, data={"decoders": known})


def _custom_all_reduce() -> Iterator[CheckResult]:
    """Check whether FastDeploy's own all-reduce, which fusing has to beat, is on, and up to how many bytes."""
    from fd_fusion.hosts.fastdeploy import custom_all_reduce as own

    megabytes = own.limit_mb()
    data = {"max_size_mb": megabytes, "compiled": False}
    limit = f"FD_CUSTOM_AR_MAX_SIZE_MB is {megabytes}"
    try:
        data["compiled"] = own.is_compiled()
        why = "its kernels are not compiled here"
    except ImportError as error:
        why = f"it does not import: {error}"
    text = f"FastDeploy's custom all-reduce is on, unless --disable-custom-all-reduce is given; {limit}"
    if not data["compiled"]:
        text = f"FastDeploy's custom all-reduce is off: {why}; {limit}"
    yield CheckResult("fastdeploy", "custom_all_reduce", "note", text, data=data)


PROBES: dict[str, Callable[..., Iterator[CheckResult]]] = {p.__name__: p for p in (framework, flashinfer, fastdeploy)}


def main() -> None:
    end_with_parent()
    what, *args = sys.argv[1:]
    found = run_checks(what, lambda: PROBES[what](*args), _failed(what))
    print("\n" + _MARK + json.dumps([one.to_dict() for one in found]), flush=True)


if __name__ == "__main__":
    main()
