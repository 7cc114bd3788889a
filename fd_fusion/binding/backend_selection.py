"""The selection of a backend for a group: all ranks try the candidates in turn, and vote on each."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fd_fusion.comm.group import Group, working
from fd_fusion.comm.vote import Verdict, Vote, agree
from fd_fusion.config import FusionConfig
from fd_fusion.frameworks import paddle_runtime
from fd_fusion.frameworks.tensors import paddle_or_torch
from fd_fusion.reasons import FusionError, Reason, because
from fd_fusion.spec import Backend, Fp8, FusedOp, OpSpec
from fd_fusion.tuning import table as tuning_table
from fd_fusion.tuning.limits import NEVER, limit_source
from fd_fusion.tuning.table import Fingerprint, Limits

_AUTO = {"cpu": ("paddle",), "gpu": ("triton", "flashinfer")}


@dataclass(frozen=True)
class SelectedBackend:
    """The op that is open on all ranks of a group, and the backend that it is of."""

    backend: str
    op: FusedOp
    limit_source: str = "built in"
    note: Reason | None = None  # why the tuning table of this machine is not used


def select_backend(
    group: Group, pairs: Sequence[Any], config: FusionConfig, deterministic: bool, workspace_bytes: int
) -> tuple[SelectedBackend | None, Reason | None, tuple[int, ...]]:
    """Collective: open the op for pairs of one hidden size and dtype, of the first backend that no rank refuses.

    Args: workspace_bytes: the most that the workspace may have, equal on all ranks.
    Returns: (backend, None, ()), or (None, the reason of the first candidate, the ranks that refused).
    """
    spec = _spec_of(pairs, group, config, deterministic, workspace_bytes)
    norms = dict.fromkeys((pair.eps, pair.weight_offset) for pair in pairs)
    tuned, note = (None, None) if deterministic or spec.device == "cpu" else _tuned(group, spec)
    wins = tuned is None or (tuned.order if config.backend == "auto" else tuned.rows.get(config.backend, True))
    if not wins and config.max_token_num is None:
        return None, because("never_wins", size=spec.size, hidden_size=spec.hidden_size, dtype=spec.dtype), ()
    if tuned:
        spec = replace(spec, two_shot_rows=tuned.two_shot_rows or NEVER, tuned_staying_rows=tuned.staying_rows)
    first: Verdict | None = None
    for name in _candidates(config.backend, spec.device, tuned):
        spec = replace(spec, tuned_rows=tuned.rows.get(name) or None if tuned else None)
        specs = [replace(spec, eps=eps, weight_offset=offset) for eps, offset in norms]
        op, verdict = _try(name, specs, group, config.timeout_s)
        if op is not None:
            return SelectedBackend(name, op, limit_source(spec), note), None, ()
        first = first or verdict
    return None, first.reason, tuple(rank for rank, _ in first.refusals)


def _spec_of(
    pairs: Sequence[Any], group: Group, config: FusionConfig, deterministic: bool, workspace_bytes: int
) -> OpSpec:
    """Describe the op of one workspace, without the eps and the weight offset, which differ from pair to pair."""
    device, arch = paddle_runtime.device_of()
    return OpSpec(
        *(group.rank, group.size, pairs[0].hidden_size, pairs[0].dtype),
        weight_dtypes=tuple(pair.weight_dtype for pair in pairs),
        fp8=tuple(dict.fromkeys(pair.fp8 for pair in pairs if isinstance(pair.fp8, Fp8))),
        device=device,
        arch=arch,
        deterministic=deterministic,
        max_token_num=config.max_token_num,
        workspace_bytes=workspace_bytes,
        timeout_s=config.timeout_s,
    )


def _candidates(named: str, device: str, tuned: Limits | None) -> tuple[str, ...]:
    """Return the backends to try, in turn: by the tuning table the fastest first, without one that never wins."""
    if named != "auto":
        return (named,)
    return tuned.order if tuned and tuned.order else _AUTO[device]


def _tuned(group: Group, spec: OpSpec) -> tuple[Limits | None, Reason | None]:
    """Collective: read the tuning table. Returns its limits, or the reason why the ranks do not use them."""
    try:
        gpu = paddle_or_torch().cuda.get_device_name()
        key = Fingerprint(gpu, spec.size, spec.hidden_size, spec.dtype, tuning_table.versions_here())
        limits, note = tuning_table.read_limits(key, tuning_table.table_path())
    except Exception as error:  # a note of the report; the other ranks wait for this vote
        limits, note = None, because("table_unusable", path="of limits", error=f"{type(error).__name__}: {error}")
    verdict = agree(group, "table", Vote(None, limits and limits.to_dict()), timeout_s=spec.timeout_s)
    if not verdict.ok:
        return None, verdict.reason
    if any(data != verdict.data[0] for data in verdict.data):
        return None, because("table_differs")
    return limits, note


def _try(name: str, specs: list[OpSpec], group: Group, timeout_s: float) -> tuple[FusedOp | None, Verdict]:
    """Ask the backend, vote, open the op, vote. An op is closed again when another rank could not open it."""
    backend, refusal = load_backend(name, specs)
    verdict = agree(group, f"{name}.supports", Vote(refusal), timeout_s=timeout_s)
    if not verdict.ok:
        return None, verdict
    op = None
    with working(group, timeout_s=timeout_s):
        try:
            op = backend.open(specs[0], group)
        except FusionError as error:
            refusal = error.reason
        except Exception as error:  # its text becomes this rank's vote
            refusal = because("open_failed", error=f"{type(error).__name__}: {error}")
    with contextlib.ExitStack() as unless_ok:
        if op is not None:
            unless_ok.callback(op.close)
        verdict = agree(group, f"{name}.open", Vote(refusal), timeout_s=timeout_s)
        if verdict.ok:
            unless_ok.pop_all()
            return op, verdict
    return None, verdict


def load_backend(name: str, specs: list[OpSpec]) -> tuple[Backend | None, Reason | None]:
    """Import the backend and ask it about every spec. Returns the module, and its first refusal."""
    try:
        backend = importlib.import_module(f"fd_fusion.backends.{name}")
        answers = (backend.supports(spec) for spec in specs)
        return backend, next((answer for answer in answers if answer is not None), None)
    except FusionError as error:
        return None, error.reason
    except Exception as error:  # a backend whose package is broken: a reason, not a crash
        return None, because("backend_failed", backend=name, error=f"{type(error).__name__}: {error}")
