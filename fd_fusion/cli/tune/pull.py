"""The rival that stands in for a host's own all-reduce where no host is installed: a plain pull, and a norm."""

from __future__ import annotations

import ctypes
import importlib
import struct
from typing import Any

from fd_fusion.comm.cuda_driver import CudaDriver
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group
from fd_fusion.comm.posix_shm import PosixShm
from fd_fusion.comm.symmetric_memory import agree_or_raise, on_all_ranks, open_symmetric_memory
from fd_fusion.frameworks.triton_launch import interpreting, load_kernel, prepare
from fd_fusion.reference import DTYPE_BYTES
from fd_fusion.spec import OpSpec

_ADDRESS = 1 << 40  # what the kernels are compiled for; nothing is specialized on its value
NORM_WARPS = (4, 8, 16)


def two_shot_from(size: int) -> int:
    """From so many bytes on each rank sums a part: where FastDeploy's own all-reduce begins to."""
    return 1 << 62 if size == 2 else 512 << 10 if size <= 4 else 256 << 10


def compile_kernels(spec: OpSpec) -> tuple[dict[bool, Any], dict[int, Any], Any]:
    """The launches of the pull by path, of the norm by its number of warps, and of the store that proves memory."""
    dtype = getattr(importlib.import_module("triton.language"), spec.dtype)
    shape = {"N": spec.size, "DTYPE": dtype, "UNIT": 16 // DTYPE_BYTES[spec.dtype]}
    kernels = importlib.import_module("fd_fusion.kernels.pull_all_reduce")
    constants = {**shape, "SIZE": kernels.BLOCK, "num_warps": kernels.NUM_WARPS}
    pull, like = load_kernel("pull_all_reduce", "pull_all_reduce"), (_ADDRESS, _ADDRESS, _ADDRESS, 2, 2, 0)
    paths = (False, True) if spec.size > 2 else (False,)
    pulls = {path: prepare(pull, like, {**constants, "TWO_SHOT": path}, spec.device).launch for path in paths}
    norm, like = load_kernel("add_rms_norm", "add_rms_norm"), (_ADDRESS, _ADDRESS, _ADDRESS, 1e-5)
    constants = {"H": spec.hidden_size, "WIDTH": 1 << (spec.hidden_size - 1).bit_length(), "DTYPE": dtype}
    norms = {w: prepare(norm, like, {**constants, "num_warps": w}, spec.device).launch for w in NORM_WARPS}
    store = prepare(load_kernel("all_reduce.probe", "store_word"), (_ADDRESS, _ADDRESS), {}, spec.device)
    return pulls, norms, store.launch


class Pull:
    """Collective: the memory of `rows` rows that all ranks read, and the kernels. It works on addresses."""

    def __init__(self, spec: OpSpec, group: Group, rows: int):
        self.spec, self._row_units = spec, spec.hidden_size * DTYPE_BYTES[spec.dtype] // 16
        with interpreting(spec.device):
            made = on_all_ranks(group, "pull compiled", lambda: compile_kernels(spec), spec.timeout_s)
            self._reduce, self._norms, store = made
            self._provider = CudaIpc() if spec.device == "gpu" else PosixShm()

            def push(addresses: tuple[int, ...], value: int) -> None:
                for address in addresses:
                    store(1, address, value)

            self._layout = importlib.import_module("fd_fusion.kernels.pull_all_reduce")
            self._sums = self._layout.DATA + rows * 16 * self._row_units
            nbytes = self._sums + (rows * 16 * self._row_units if spec.size > 2 else 0)
            self.memory = open_symmetric_memory(group, nbytes, self._provider, push, timeout_s=spec.timeout_s)
        self.rows = self.memory.own + self._layout.DATA  # where the rows to be reduced lie
        table = struct.pack(f"<{spec.size}q", *self.memory.addresses)
        self._provider.write(self.memory.own + self._layout.ADDRESSES, table)
        agree_or_raise(group, "pull open", None, None, spec.timeout_s)

    def reduce(self, out: Any) -> None:
        """Sum all ranks' first rows into `out`, a tensor [T, H]."""
        units, size = out.shape[0] * self._row_units, self.spec.size
        launch = self._reduce[16 * units >= two_shot_from(size)]
        addresses = self.memory.own, out.data_ptr(), self._sums
        launch(self._layout.PROGRAMS, *addresses, units, -(-units // size), self.spec.rank)

    def norm(self, x: Any, residual: Any, weight: Any, warps: int = 8) -> None:
        """residual += x; x = norm(residual), in place."""
        self._norms[warps](x.shape[0], x.data_ptr(), residual.data_ptr(), weight.data_ptr(), self.spec.eps)

    def write(self, x: Any) -> None:
        """Copy a tensor's rows to where they are reduced; a model's GEMM would write there itself."""
        nbytes = x.shape[0] * 16 * self._row_units
        if self.spec.device == "cpu":
            ctypes.memmove(self.rows, x.data_ptr(), nbytes)
            return
        self._provider.synchronize()  # x may still be on its way, on any stream
        addresses = ctypes.c_uint64(self.rows), ctypes.c_uint64(x.data_ptr())
        CudaDriver().call("cuMemcpyDtoD_v2", *addresses, ctypes.c_size_t(nbytes))
        self._provider.synchronize()

    def check(self) -> None:
        """Raise RuntimeError if a rank did not come to a meeting of a call: then its time means nothing."""
        if any(self._provider.read(self.memory.own + self._layout.MISSED, 4)):
            raise RuntimeError("a rank did not come to the pull's meeting in time")

    def close(self) -> None:
        self.memory.close()
