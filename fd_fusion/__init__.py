"""fd_fusion: all-reduce + residual + RMSNorm in one kernel, for PaddlePaddle and FastDeploy.

Importing this package loads no Paddle, Triton, FlashInfer or torch: every public name is loaded on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "FusionConfig": "config",
    "FusionTimeout": "reasons",
    "bind": "integration.binding",
    "unbind": "integration.binding",
    "report": "integration.binding",
    "check": "integration.binding",
    "freeze": "integration.binding",
    "reset": "integration.binding",
    "RMSNorm": "layers.rms_norm",
    "RowParallelLinear": "layers.row_parallel_linear",
    "QKRMSNorm": "layers.qk_rms_norm",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fd_fusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fd_fusion.{_HOME[name]}"), name)
