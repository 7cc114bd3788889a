"""One call of FlashInfer's fused kernel, through whichever of its two entries there is, with the same meaning.

    sum = round(x_0 + ... + x_{N-1});  residual_out = round(sum + residual)
    norm_out = round(residual_out * rsqrt(mean(residual_out^2) + eps) * (weight + bias))

Three roundings to the tensors' dtype; our own contract has no first one. All tensors of a call have one dtype, since
the kernel reads every one of them as the input's.

Which release takes which arguments is found by signature. The compiled module has none, and a fault shows in no
signature; for these the version decides, by `rules`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fd_fusion.reasons import FusionError, because

PATTERN = 1  # kARResidualRMSNorm
_UNUSED = ("allreduce_out", "quant_out", "scale_out", "scale_factor", "layout_code")  # of every release, None here
Tensor = Any
Call = Callable[..., None]  # (x, residual, norm_out, residual_out, weight, eps, bias, one_shot)
# The 21 parameters of every release, all without a default; always passed by name.
BASE = (
    "allreduce_in", "world_size", "world_rank", "token_num", "hidden_dim", "workspace_ptrs", "launch_with_pdl",
    "trigger_completion_at_end", "fp32_acc", "pattern_code", "use_oneshot", "allreduce_out", "residual_in",
    "residual_out", "norm_out", "quant_out", "scale_out", "rms_gamma", "rms_eps", "scale_factor", "layout_code",
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """The faults and arguments of a version. A launch with PDL reads a stale residual below 0.7.1: we make none."""

    c_args: int
    weight_bias: bool  # adds a number to the weight
    whole_warps: bool  # needs blocks of whole warps: the reduction over a partial warp is undefined
    two_shot: bool  # a peer's stale barrier slot lets two-shot pass early below 0.7.2
    arch_majors: tuple[int, ...]  # what its build accepts


def parse(version: str) -> tuple[int, ...]:
    """Return a version as numbers: "0.7.2.post1" is (0, 7, 2); a release candidate comes before its release."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    if not numbers:
        return (0,)
    early = re.search(r"(rc|dev|a|b)\d", version[numbers.end() :])
    release = [int(n) for n in numbers.group().split(".")]
    if early:  # 0.6.12rc1 -> (0, 6, 11, 2**31)
        while release and release[-1] == 0:
            release.pop()
        release = [*release[:-1], release[-1] - 1, 2**31] if release else [0]
    return tuple(release)


def rules(version: str) -> Rules:
    """Return the rules of a version; an unknown one follows the newest known release before it."""
    v = parse(version)
    named = parse(re.split(r"(?:rc|dev|a|b)\d", version)[0])  # its first candidate already had a release's arguments
    return Rules(
        c_args=23 if named >= (0, 6, 12) else 22 if named >= (0, 6, 11) else 21,
        weight_bias=named >= (0, 6, 12),
        whole_warps=v < (0, 6, 15),
        two_shot=v >= (0, 7, 2),
        arch_majors=(9, 10, 12) if v >= (0, 6, 17) else (9, 10),
    )


def block_threads(hidden_size: int, element_bytes: int) -> int:
    """Return the smallest block that the kernel's launch chooses for a row; others are powers of two times it.

    A thread takes 16 bytes; a row is a cluster of up to 8 blocks, which are merged while below 128 threads.
    """
    threads, cluster = hidden_size * element_bytes // 16, 8
    while threads % cluster:
        cluster //= 2
    while threads // cluster < 128 and cluster > 1:
        cluster //= 2
    return threads // cluster


@dataclass(frozen=True)
class Fixed:
    """The values that are the same in every call of a workspace. `pointers`: an int64 table of 3N + 1 addresses."""

    size: int
    rank: int
    hidden_size: int
    rows: int  # capacity
    is_fp32: bool
    pointers: Tensor

    def arguments(self) -> dict[str, Any]:
        """Return them by name, with what is the same in all workspaces."""
        of_workspace = {
            "world_size": self.size,
            "world_rank": self.rank,
            "hidden_dim": self.hidden_size,
            "workspace_ptrs": self.pointers,
        }
        how = {"launch_with_pdl": False, "trigger_completion_at_end": True, "fp32_acc": True, "pattern_code": PATTERN}
        return {**of_workspace, **how, **dict.fromkeys(_UNUSED)}

    def metadata(self) -> dict[str, Any]:
        """Return what a version from 0.5.0 compares a call with, as its own workspaces describe themselves."""
        return {
            "tp_rank": self.rank,
            "tp_size": self.size,
            "max_token_num": self.rows,
            "hidden_dim": self.hidden_size,
            "use_fp32_lamport": self.is_fp32,
        }


def python_call(function: Call, fixed: Fixed, version: str) -> tuple[Call, bool]:
    """Call through `trtllm_allreduce_fusion`, by keyword. Returns the call, and whether it adds a bias.

    Raises: FusionError: the version must be given something that is unknown, or lacks a parameter.
    """
    found = inspect.signature(function).parameters.values()
    takes = {p.name: p.default is p.empty for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    known = {*BASE, "metadata", "block_quant_group_size", "weight_bias"}
    strange = [name for name, must in takes.items() if must and name not in known]
    strange += [f"no {name}" for name in BASE if name not in takes]
    if strange:
        raise FusionError(because("flashinfer_signature", version=version, names=", ".join(strange)))
    same = fixed.arguments()
    if "metadata" in takes:
        same["metadata"] = fixed.metadata()
    if "block_quant_group_size" in takes:
        same["block_quant_group_size"] = None
    adds_bias = "weight_bias" in takes

    def call(x, residual, norm_out, residual_out, weight, eps, bias, one_shot) -> None:
        if adds_bias:
            same["weight_bias"] = bias
        function(
            allreduce_in=x,
            token_num=x.shape[0],
            use_oneshot=one_shot,
            residual_in=residual,
            residual_out=residual_out,
            norm_out=norm_out,
            rms_gamma=weight,
            rms_eps=eps,
            **same,
        )

    return call, adds_bias


def compiled_call(entry: Call, fixed: Fixed, version: str) -> tuple[Call, bool]:
    """Call the compiled module's entry: by position, in its own order, 21 to 23 arguments by version."""
    rule = rules(version)

    def call(x, residual, norm_out, residual_out, weight, eps, bias, one_shot) -> None:
        head = (x, fixed.size, fixed.rank, x.shape[0], fixed.hidden_size, fixed.pointers)
        how = (False, one_shot, True, True, PATTERN)  # pdl, one-shot, trigger at end, fp32 sum
        outputs = (None, residual, residual_out, norm_out, None, None, weight, eps, None, None)
        entry(*head, *how, *outputs, *(None, bias)[: rule.c_args - 21])

    return call, rule.weight_bias
