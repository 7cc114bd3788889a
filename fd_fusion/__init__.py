"""fd_fusion: all-reduce + residual + RMSNorm in one kernel, for PaddlePaddle and FastDeploy.

Importing this package loads no Paddle, Triton, FlashInfer or torch: every public name is loaded on first use.

Words, each with one meaning in all of the code (fd_fusion/README.md has more):
    partial sum   what a row-parallel linear has before the all-reduce: one rank's part of y
    pair          a layer that makes a partial sum, and the norm that reads the whole sum
    Site          a bound pair: the linear hands its partial sum over, the norm finishes it
    owner         of a row, by two-shot: the rank that sums it; of a reduction: the Site
    slot          where the other ranks' words of one row arrive
    sentinel      the word of ones in an empty slot, which is never sent
    launch        one run of the kernel; its number names the half of the slots that it uses
    abort word    the word of a rank's memory that ends all waiting on it
    error page    host memory in which a kernel writes that it ran out of time, and which ranks it waited for
    refusal       a rank's "no" in a vote, with a reason
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what runs is __getattr__
    from fd_fusion.binding.bind import check as check
    from fd_fusion.binding.bind import report as report
    from fd_fusion.binding.bind import unbind as unbind
    from fd_fusion.binding.lifecycle import freeze as freeze
    from fd_fusion.binding.lifecycle import reset as reset
    from fd_fusion.config import FusionConfig as FusionConfig
    from fd_fusion.hosts.decoder import Decoder as Decoder
    from fd_fusion.hosts.own_layers import bind as bind
    from fd_fusion.layers.fp8 import Fp8Linear as Fp8Linear
    from fd_fusion.layers.qk_rms_norm import QKRMSNorm as QKRMSNorm
    from fd_fusion.layers.rms_norm import RMSNorm as RMSNorm
    from fd_fusion.layers.row_parallel_linear import RowParallelLinear as RowParallelLinear
    from fd_fusion.reasons import BindError as BindError
    from fd_fusion.reasons import FusionError as FusionError
    from fd_fusion.reasons import FusionTimeout as FusionTimeout
    from fd_fusion.reasons import HandOverError as HandOverError
    from fd_fusion.spec import Fp8 as Fp8

__version__ = "0.1.0"

_HOME = {
    "FusionConfig": "config",
    "FusionError": "reasons",
    "FusionTimeout": "reasons",
    "BindError": "reasons",
    "HandOverError": "reasons",
    "Decoder": "hosts.decoder",
    "bind": "hosts.own_layers",
    "unbind": "binding.bind",
    "report": "binding.bind",
    "check": "binding.bind",
    "freeze": "binding.lifecycle",
    "reset": "binding.lifecycle",
    "Fp8": "spec",
    "Fp8Linear": "layers.fp8",
    "RMSNorm": "layers.rms_norm",
    "RowParallelLinear": "layers.row_parallel_linear",
    "QKRMSNorm": "layers.qk_rms_norm",
}
__all__ = [
    "BindError",
    "Decoder",
    "Fp8",
    "Fp8Linear",
    "FusionConfig",
    "FusionError",
    "FusionTimeout",
    "HandOverError",
    "QKRMSNorm",
    "RMSNorm",
    "RowParallelLinear",
    "__version__",
    "bind",
    "check",
    "freeze",
    "report",
    "reset",
    "unbind",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fd_fusion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fd_fusion.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
