"""Whether the greedy tokens of a sequence depend on how many sequences are decoded beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.decode_model import Model
from bench.rivals import Rival
from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Vote, agree

STEPS = 8


class Some(Rival):
    """Reduces the first rows alone, by the fused op; the others keep this rank's part, which nobody looks at."""

    def __init__(self, op: Any, rows: int, plain: torch.Tensor, eps: float):
        self._op, self._rows, self._plain, self._eps = op, rows, plain, eps

    def call(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Any, Any]:
        rows, x, residual = self._rows, x.clone(), residual.clone()
        x[:rows], residual[:rows] = self._op.finish(x[:rows], residual[:rows], weight, self._eps, 0.0)
        return x, residual


def same_tokens(
    model: Model, op: Any, group: Group, batches: list[int], qk_norm: Callable, eps: float
) -> dict[str, Any]:
    """Decode STEPS greedy tokens with each number of sequences, and compare tokens and bits with the largest one.

    The model's own GEMMs take the most rows every time, as a batch-invariant library would make them: what differs is
    the number of rows that the fused op reduces.
    """
    most = max(batches)
    plain = torch.empty(most, model.shape.hidden, dtype=model.dtype, device=model.device)
    runs = {rows: _decode(model, Some(op, rows, plain, eps), group, rows, qk_norm) for rows in batches}
    tokens, bits = runs[most]
    verdict = agree(group, "tokens", Vote(data=runs[most]), timeout_s=60).data
    return {
        "batches": batches,
        "steps": len(tokens),
        "same_tokens": all([step[:rows] for step in tokens] == runs[rows][0] for rows in batches),
        "same_bits": all([step[:rows] for step in bits] == runs[rows][1] for rows in batches),
        "same_on_all_ranks": all(one == verdict[0] for one in verdict),
        "different_tokens": len({token for step in tokens for token in step}),
    }


def _decode(model: Model, reduce: Some, group: Group, rows: int, qk_norm: Callable) -> tuple[list, list]:
    """([step][row] tokens, [step][row] digests of the row that the head reads), of the first rows."""
    last = torch.arange(len(reduce._plain), device=model.device) * 11 % model.shape.vocabulary
    tokens, bits = [], []
    for _ in range(STEPS if last.is_cuda else 2):
        x, _ = model.step(model.embedding[last], reduce, qk_norm)
        logits = F.linear(x, model.head).float()
        best, at = logits.max(-1)
        mine = [best[:rows].tolist(), (at[:rows] + group.rank * len(model.head)).tolist()]
        shards = agree(group, "best", Vote(data=mine), timeout_s=60).data
        chosen = [max(zip(*one), key=lambda pair: (pair[0], -pair[1]))[1] for one in _by_row(shards)]
        last[:rows] = torch.tensor(chosen, device=last.device)
        numbers = x[:rows].contiguous().view(torch.uint8).cpu().numpy()
        tokens.append(chosen)
        bits.append([hashlib.sha256(row.tobytes()).hexdigest()[:12] for row in numbers])
    return tokens, bits


def _by_row(shards: tuple) -> list[tuple[tuple, tuple]]:
    """[(the ranks' best logits, their tokens), ...] of each row."""
    return list(zip(zip(*(one[0] for one in shards)), zip(*(one[1] for one in shards))))
