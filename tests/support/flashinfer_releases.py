"""The releases of FlashInfer that the rules were compared with: what their signatures and compiled entries take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """The arguments of `trtllm_allreduce_fusion` in one release.

    `extra` are the parameters after the 21 of `BASE`; `c_args` counts the arguments of the compiled entry.
    """

    version: str
    extra: tuple[str, ...]
    c_args: int
    distribution: str = "flashinfer-python"


_NOW = ("metadata", "block_quant_group_size", "weight_bias")
RELEASES = (
    Release("0.2.9", (), 21),
    Release("0.4.1", (), 21),
    Release("0.4.1.1", (), 21, "flashinfer-python-paddle"),
    Release("0.6.12", _NOW, 23),
    Release("0.6.17", _NOW, 23),
    Release("0.7.2.post1", _NOW, 23),
)
