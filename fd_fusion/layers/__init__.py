"""Layers on Paddle, usable with no host: each with or without a Site, in eager mode and under `to_static`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what runs is __getattr__, which loads Paddle on first use
    from fd_fusion.layers.qk_rms_norm import QKRMSNorm as QKRMSNorm
    from fd_fusion.layers.rms_norm import RMSNorm as RMSNorm
    from fd_fusion.layers.row_parallel_linear import RowParallelLinear as RowParallelLinear
    from fd_fusion.layers.row_parallel_linear import reduce_or_hand_over as reduce_or_hand_over

_HOME = {
    "QKRMSNorm": "qk_rms_norm",
    "RMSNorm": "rms_norm",
    "RowParallelLinear": "row_parallel_linear",
    "reduce_or_hand_over": "row_parallel_linear",
}
__all__ = ["QKRMSNorm", "RMSNorm", "RowParallelLinear", "reduce_or_hand_over"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fd_fusion.layers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fd_fusion.layers.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
