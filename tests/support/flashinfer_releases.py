"""The releases of FlashInfer that the rules were compared with: what their compiled entries take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """`c_args` counts the arguments of the compiled entry; the 23rd is added to the weight."""

    version: str
    c_args: int
    distribution: str = "flashinfer-python"


RELEASES = (
    Release("0.2.9", 21),
    Release("0.4.1", 21),
    Release("0.4.1.1", 21, "flashinfer-python-paddle"),
    Release("0.6.12", 23),
    Release("0.6.17", 23),
    Release("0.7.2.post1", 23),
)
