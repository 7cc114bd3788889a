"""One call of FlashInfer's fused kernel, by the entry of its compiled module, and what its releases do.

    sum = round(x_0 + ... + x_{N-1});  residual_out = round(sum + residual)
    norm_out = round(residual_out * rsqrt(mean(residual_out^2) + eps) * (weight + bias))

Three roundings to the tensors' dtype; our own contract has no first one. All tensors of a call have one dtype, since
the kernel reads every one of them as the input's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATTERN = 1  # kARResidualRMSNorm
Tensor = Any
Call = Callable[..., None]  # (x, residual, norm_out, residual_out, weight, eps, bias, one_shot)


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


def compiled_call(
    entry: Callable[..., None], version: str, size: int, rank: int, hidden_size: int, pointers: Tensor
) -> Call:
    """Call the compiled module's entry: by position, in its own order, 21 to 23 arguments by version.

    pointers: an int64 table of 3N + 1 addresses.
    """
    more = rules(version).c_args - 21

    def call(x, residual, norm_out, residual_out, weight, eps, bias, one_shot) -> None:
        head = (x, size, rank, x.shape[0], hidden_size, pointers)
        how = (False, one_shot, True, True, PATTERN)  # pdl, one-shot, trigger at end, fp32 sum
        outputs = (None, residual, residual_out, norm_out, None, None, weight, eps, None, None)
        entry(*head, *how, *outputs, *(None, bias)[:more])

    return call
