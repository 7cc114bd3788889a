"""The machine, read from the system and NVIDIA's own tools: no framework is imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from fd_fusion.cli.doctor.checks import CheckResult, result

_SMALL_SHM = 64 << 20  # Docker's default for /dev/shm
Tool = Callable[..., "str | None"]


def tool(*command: str) -> str | None:
    """Return what a command prints; None where there is none, where it fails, or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(tool: Tool = tool) -> Iterator[CheckResult]:
    """Check driver, toolkit, GPUs, links, confidential computing, namespaces, shared memory."""
    gpus = _gpus(tool)
    yield gpus
    yield _toolkit(tool)
    if len(gpus.data["gpus"]) > 1:
        yield _peers(tool)
        yield _links(tool)
    if gpus.data["gpus"]:
        yield from _confidential(tool)
    yield _namespaces()
    yield _shared_memory()


def _gpus(tool: Tool) -> CheckResult:
    query = "--query-gpu=name,memory.total,memory.free,driver_version"
    lines = (tool("nvidia-smi", query, "--format=csv,noheader,nounits") or "").splitlines()
    rows = [row for line in lines if len(row := [part.strip() for part in line.split(",")]) == 4]
    if not rows:
        return result("gpus", "note", "no NVIDIA GPU or no driver: a CPU run", gpus=[])
    gpus = [{"name": name, "total_mib": _int(total), "free_mib": _int(free)} for name, total, free, _ in rows]
    driver = rows[0][3]
    names = ", ".join(f"{gpu['name']} ({gpu['free_mib']} of {gpu['total_mib']} MiB free)" for gpu in gpus)
    return result("gpus", "ok", f"driver {driver}; {names}", driver=driver, gpus=gpus)


def _toolkit(tool: Tool) -> CheckResult:
    found = re.search(r"release ([\d.]+)", tool("nvcc", "--version") or "")
    ninja = tool("ninja", "--version")
    text = "no CUDA toolkit: only FlashInfer would need it, to compile its kernel"
    if found:
        text = f"CUDA toolkit {found[1]}, ninja {ninja or 'missing'}"
    return result("toolkit", "ok" if found else "note", text, nvcc=found and found[1], ninja=ninja)


def _peers(tool: Tool) -> CheckResult:
    """Check which GPUs can write into which: `nvidia-smi topo -p2p w`, a matrix of OK, CNS, NS ..."""
    rows = _matrix(tool("nvidia-smi", "topo", "-p2p", "w"), r"X|OK|CNS|GNS|TNS|NS|DR|U")
    bad = [f"{gpu}-GPU{i}" for gpu, row in rows.items() for i, cell in enumerate(row) if cell not in ("X", "OK")]
    if not rows:
        text = "nvidia-smi does not show its P2P matrix; the launch below shows it"
        return result("p2p", "note", text, matrix=rows)
    if bad:
        remedy = "use GPUs with P2P between them; in a virtual machine or with IOMMU on, ask for ACS to be disabled"
        return result("p2p", "warn", f"no P2P writes between {', '.join(bad[:8])}", remedy, matrix=rows)
    return result("p2p", "ok", f"P2P writes between all {len(rows)} GPUs", matrix=rows)


def _links(tool: Tool) -> CheckResult:
    rows = _matrix(tool("nvidia-smi", "topo", "-m"), r"X|NV\d+|PIX|PXB|PHB|NODE|SYS")
    slow = sorted({cell for row in rows.values() for cell in row if not re.fullmatch(r"X|NV\d+", cell)})
    if not rows:
        return result("nvlink", "note", "nvidia-smi does not show how the GPUs are linked", matrix=rows)
    if slow:
        remedy = "measure with `python -m fd_fusion tune`: without NVLink fusing may not win"
        return result("nvlink", "warn", f"some GPUs are linked by {', '.join(slow)} only", remedy, matrix=rows)
    return result("nvlink", "ok", "NVLink between all GPUs", matrix=rows)


def _matrix(text: str | None, cell: str) -> dict[str, list[str]]:
    """Return the rows GPU0, GPU1 ... of a matrix of nvidia-smi, one cell for each GPU."""
    rows = {}
    for line in (text or "").splitlines():
        first, *cells = re.sub(r"\x1b\[[\d;]*m", "", line).split() or [""]
        if re.fullmatch(r"GPU\d+", first) and cells and re.fullmatch(cell, cells[0]):
            rows[first] = cells
    return {gpu: [one for one in cells[: len(rows)] if re.fullmatch(cell, one)] for gpu, cells in rows.items()}


def _confidential(tool: Tool) -> Iterator[CheckResult]:
    text = tool("nvidia-smi", "conf-compute", "-f")
    if text is None:
        return
    on = re.search(r"CC status:\s*ON", text, re.I) is not None
    remedy = "expect refused mappings between GPUs: see whether the launch below works" if on else ""
    text, state = f"confidential computing is {'on' if on else 'off'}", "warn" if on else "ok"
    yield result("confidential_computing", state, text, remedy, on=on)


def _namespaces() -> CheckResult:
    data = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("ipc", "pid")}
    text = f"namespaces {data['ipc']}, {data['pid']}: all ranks must be in these"
    return result("namespaces", "ok", text, **data)


def _shared_memory() -> CheckResult:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return result("shm", "warn", "there is no /dev/shm", "mount a tmpfs there", total=0, free=0)
    total, _, free = shutil.disk_usage(folder)
    text, state, remedy = f"/dev/shm: {free >> 20} of {total >> 20} MiB free", "ok", ""
    if free < _SMALL_SHM:
        text, state = f"{text}; NCCL and ranks on a CPU need more", "warn"
        remedy = "start the container with --shm-size=1g, or --ipc=host"
    return result("shm", state, text, remedy, total=total, free=free)


def _int(text: str) -> int | None:
    return int(text) if text.isdigit() else None
