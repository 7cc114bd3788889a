"""A rank of the FlashInfer backend on a CPU: the real vote, workspace, watchdog and calls, and a kernel in Python.

usage: run_ranks("flashinfer_ranks.py", N, folder, case, ...)     each case as in a new process
"""

import ctypes
import importlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import paddle

from fd_fusion.backends.flashinfer import loader
from fd_fusion.backends.flashinfer import backend as flashinfer, workspace as flashinfer_workspace
from fd_fusion.comm.group import working
from fd_fusion.comm.posix_shm import PosixShm
from fd_fusion.reasons import FusionError
from tests.support import fake_flashinfer
from tests.support.flashinfer_spec import spec
from tests.support.ranks import this_group, this_rank

H, EPS = 128, 1e-6
FOLDER = Path(sys.argv[1])


class Reader:
    """Reads the control block where it lies in the memory of this process."""

    def __init__(self, address):
        self._words = (ctypes.c_int * 5).from_address(address)

    def __call__(self):
        return tuple(self._words)

    def close(self):
        del self._words


def pretend(**release):
    """The package of this rank on sys.path, and CPU memory in place of the GPU's."""
    folder = FOLDER / case / f"rank{this_rank()}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(FOLDER / case)  # all ranks of a machine have one
    if release:
        sys.path.insert(0, str(fake_flashinfer.write(folder, **release)))
        importlib.invalidate_caches()
    flashinfer.CudaIpc, flashinfer.ControlReader = PosixShm, Reader


def open_backend(group, **changed):
    given = {"hidden_size": H, "dtype": "float32", "max_token_num": 5, "timeout_s": 20.0}
    with working(group):
        return flashinfer.open(spec(**{**given, "rank": group.rank, "size": group.size, **changed}), group)


def call_and_compare(op, group, rows, offset):
    rng = np.random.default_rng(rows)
    parts = rng.standard_normal((group.size, rows, H)).astype(np.float32)
    parts[:, :1, :5] = [-0.0, 0.0, -1e-40, 1e-40, -3.0]
    residual, weight = rng.standard_normal((rows, H)), rng.standard_normal(H)
    tensors = [paddle.to_tensor(a.astype(np.float32)) for a in (parts[group.rank], residual, weight)]
    norm_out, residual_out = op.finish(*tensors, EPS, offset)
    total = parts.astype(np.float64).sum(0) + residual
    norm = total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS) * (weight + offset)
    for name, got, want in (("residual_out", residual_out, total), ("norm_out", norm_out, norm)):
        error = np.abs(got.numpy() - want).max() if rows else 0.0
        assert error < 1e-5 and got.shape == [rows, H], (name, rows, error)


def kernel():
    return sys.modules["tvm_ffi"]


def plain():
    pretend(version="0.7.2", build_s=0.5)
    group = this_group(f"tp {case}")
    op = open_backend(group)
    assert op.limit == 5 and op.stats()["version"] == "0.7.2"
    warm = kernel().CALLS[0]  # with a residual, and then without
    assert warm["token_num"] == 1 and warm["weight_bias"] == 0.0
    for index, rows in enumerate((1, 5, 2, 0, 4, 3, 5, 1)):
        call_and_compare(op, group, rows, offset=index % 2)
        if index == 3:
            op.freeze()
            assert op.stats()["limit_s"] == 20.0
    biases = [call["weight_bias"] for call in kernel().CALLS[2:]]
    assert biases == [0, 1, 0, 0, 1, 0, 1] and len(kernel().LOADS) == 1
    assert len(Path(kernel().LOADS[0][0]).read_text().splitlines()) == 1, "compiled once, by one rank"
    assert not [name for name in sys.modules if name.split(".")[0] in ("flashinfer", "torch")]
    op.check()
    op.reset()
    kept = op.finish
    op.close()
    op.close()
    x = paddle.ones([1, H])
    for use in (lambda: kept(x, x, x[0], EPS, 0.0), op.finish, op.check, op.freeze, op.reset):
        try:
            use()
            raise AssertionError("a closed workspace was used")
        except FusionError as error:
            assert error.reason.code == "closed", error
    times = FOLDER / f"built{group.rank}"
    times.write_text(str(kernel().LOADS[0][1]))


def sub_groups():
    pretend(version="0.4.1.1")
    ranks = (0, 2) if this_rank() % 2 == 0 else (1, 3)
    group = this_group("-".join(map(str, ranks)), ranks)
    op = open_backend(group)
    for rows in (3, 1, 5):
        call_and_compare(op, group, rows, offset=0.0)
    assert {call["world_rank"] for call in kernel().CALLS} == {group.rank}
    assert {call["world_size"] for call in kernel().CALLS} == {2}
    op.close()


def refused():
    """Rank 1 differs; every rank gets one reason."""
    odd, how = {"missing": {}, "version": {"version": "0.6.12"}}, case.partition(":")[2]
    if how in odd:
        pretend(**(odd[how] if this_rank() == 1 else {"version": "0.7.2"}))
    if how == "offset":
        pretend(version="0.6.11")
    if how == "build":
        pretend(version="0.7.2", raises="TypeError('no torch')")
    if how == "fill":
        pretend(version="0.7.2")
        if this_rank() == 1:
            flashinfer_workspace.fill = lambda layout, memory: 1 / 0
    providers = []
    flashinfer.CudaIpc = lambda: providers.append(PosixShm()) or providers[-1]
    try:
        open_backend(this_group(f"tp {case}"), weight_offset=float(how == "offset"))
    except FusionError as error:
        print(f"{how}, reason:", error.reason)
    assert not any(provider._maps for provider in providers), "what could not be used is not given back"


def hang():
    """Rank 1 does not come to the third call; the watchdog of rank 0 ends its process."""
    pretend(version="0.7.2")
    group = this_group(f"tp {case}")
    op = open_backend(group, timeout_s=1.0)
    call_and_compare(op, group, 2, 0.0)
    op.freeze()
    if group.rank == 0:
        call_and_compare(op, group, 2, 0.0)
        raise AssertionError("a call without its peer ended")
    time.sleep(4)


def forget(path, fill):
    """As in a process that has not loaded FlashInfer."""
    sys.path[:], flashinfer_workspace.fill = path, fill
    loader._load.cache_clear()
    sys.modules.pop("tvm_ffi", None)


CASES = {"plain": plain, "sub_groups": sub_groups, "refused": refused, "hang": hang}
before = sys.path[:], flashinfer_workspace.fill
for case in sys.argv[2:]:
    forget(*before)
    CASES[case.partition(":")[0]]()
    print(f"{case} ended")
