"""FlashInfer's all-reduce + residual + RMSNorm by its C entry, in memory of ours: its own Python is not needed."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch

from bench.rivals import Rival
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import as_refusal, open_symmetric_memory
from fd_fusion.comm.vote import Vote, agree


class FlashInfer(Rival):
    """The C entry of FlashInfer, 23 arguments (0.6.12 to 0.7.2), in a workspace laid out as it expects."""

    def __init__(self, entry: Any, group: Group, plain: torch.Tensor, push: Any, eps: float):
        rows, self._hidden = plain.shape
        self._call, self._group, self._plain, self._eps = entry, group, plain, eps
        self.one_shot_rows = min(rows, 256)  # one-shot alone uses the buffers behind the flags
        provider, size = CudaIpc(), group.size
        comm, flags = size * rows * self._hidden * 2, size * 256 * 4
        lamport = size * self.one_shot_rows * self._hidden * 2
        starts = (0, comm, comm + flags)
        self.memory = open_symmetric_memory(group, comm + flags + 3 * lamport, provider, push, timeout_s=30)
        minus_zero = (ctypes.c_uint64(self.memory.own + starts[2]), ctypes.c_ushort(0x8000))
        provider._cuda.call("cuMemsetD16_v2", *minus_zero, ctypes.c_size_t(3 * lamport // 2))
        self._control = torch.tensor([0, 0, 0, lamport, 0], dtype=torch.int32, device="cuda")
        table = [address + start for start in starts for address in self.memory.addresses]
        self._table = torch.tensor([*table, self._control.data_ptr()], dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        assert agree(group, "flashinfer filled", Vote(), timeout_s=30).ok

    def call(self, x, residual, weight, one_shot=True):
        norm_out, residual_out = torch.empty_like(x), torch.empty_like(x)
        self._call(x, self._group.size, self._group.rank, x.shape[0], self._hidden, self._table, False, one_shot,
                   True, True, 1, None, residual, residual_out, norm_out, None, None, weight, self._eps, None, None,
                   None, 0.0)  # fmt: skip
        return norm_out, residual_out

    def close(self):
        self.memory.close()


def open_flashinfer(
    file: Any, group: Group, plain: torch.Tensor, push: Any, eps: float, without: list[str]
) -> FlashInfer | None:
    """Collective: None where no file is given, or where it cannot be loaded on some rank: then `without` gets why."""
    if not file:
        return None

    def load() -> Any:
        return importlib.import_module("tvm_ffi").load_module(str(file)).trtllm_allreduce_fusion

    entry, refusal = as_refusal(load)
    verdict = agree(group, "flashinfer loaded", Vote(refusal), timeout_s=60)
    if verdict.ok:
        return FlashInfer(entry, group, plain, push, eps)
    without.append(f"flashinfer: {verdict.reason}")
    return None
