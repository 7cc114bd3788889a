"""A dummy run of ours leaves nothing behind in the host's runner: its first request finds what stock's would."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import paddle

_SMALL = 1 << 20  # elements


@contextlib.contextmanager
def untouched(runner: Any) -> Iterator[None]:
    """For a run of one request: the fields of the runner and of its proposer, what they feed their models, the random
    numbers, as before.

    Not kept is what no step reads before it writes it: blocks of the KV cache, the metadata of the attention backend,
    copies in pinned memory, and in large tensors all but the first row, which is this request's.
    """
    proposer = getattr(runner, "proposer", None)
    owners = runner, getattr(runner, "share_inputs", None), proposer, getattr(proposer, "model_inputs", None)
    kept = [_keep(owner if isinstance(owner, dict) else vars(owner)) for owner in owners if owner is not None]
    random = paddle.get_rng_state()
    try:
        yield
    finally:
        paddle.set_rng_state(random)
        for containers, parts in kept:
            for held, value in containers:
                _restore(held, value)
            for part, value in parts:
                part.copy_(value, True)


def _restore(held: list | dict, value: list | dict) -> None:
    """In place: others hold it too, and a thread of the runner reads its fields meanwhile."""
    if isinstance(held, list):
        held[:] = value
        return
    for name in held.keys() - value.keys():
        del held[name]
    held.update(value)


def _keep(fields: dict[str, Any]) -> tuple[list[tuple], list[tuple]]:
    """Return (list or dict, a copy) for the fields themselves and each that is one, and (tensor, its value now)."""
    containers = [fields, *(held for held in fields.values() if type(held) in (list, dict))]
    tensors = [held for held in fields.values() if isinstance(held, paddle.Tensor) and _is_kept(held)]
    parts = [tensor if tensor.size <= _SMALL else tensor[:1] for tensor in tensors]
    return [(held, copy.copy(held)) for held in containers], [(part, part.clone()) for part in parts]


def _is_kept(tensor: Any) -> bool:
    return tensor._is_initialized() and tensor.size > 0 and not tensor.place.is_cuda_pinned_place()
