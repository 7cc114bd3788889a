"""FastDeploy's own custom all-reduce, which fusing has to beat: opened and called through FastDeploy's Python."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

_DEFAULT_MB = 8  # of versions without the variable


@dataclass(frozen=True)
class CustomAllReduce:
    """reduce: x -> the sum, out of place. capturing: what graphs are captured in. limit: bytes of the largest x."""

    reduce: Callable[[Any], Any]
    capturing: Callable[[], AbstractContextManager]
    limit: int


def limit_mb() -> int:
    """Return FD_CUSTOM_AR_MAX_SIZE_MB as FastDeploy reads it. Raises ImportError without FastDeploy."""
    return getattr(importlib.import_module("fastdeploy.envs"), "FD_CUSTOM_AR_MAX_SIZE_MB", _DEFAULT_MB)


def check_compiled() -> None:
    """Raises: ImportError, RuntimeError: FastDeploy's compiled ops lack the kernels, so it would use NCCL here."""
    module = importlib.import_module("fastdeploy.distributed.custom_all_reduce.custom_all_reduce")
    if not getattr(module, "custom_ar", True):  # some versions set it to False where the ops fail
        raise RuntimeError("the kernels of its custom all-reduce are not compiled")


def open_custom_all_reduce(group: Any) -> CustomAllReduce:
    """Collective over Paddle's `group`, behind `check_compiled`. RuntimeError: FastDeploy would use NCCL here."""
    communication = importlib.import_module("fastdeploy.distributed.communication")
    limit = limit_mb() << 20
    communication.use_custom_allreduce(group, limit)
    made = communication._TP_AR
    if made is None or not getattr(made, "_initialized", True):
        raise RuntimeError(f"FastDeploy's custom all-reduce does not take {group.nranks} ranks")

    def reduce(x: Any) -> Any:
        return communication.tensor_model_parallel_all_reduce(x, group)

    return CustomAllReduce(reduce, communication.capture_custom_allreduce, limit)
