"""Which backend serves a group: each candidate in turn is asked, opened and voted on, on all ranks or on none."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fd_fusion.comm.group import Group, Vote, agree, working
from fd_fusion.config import FusionConfig
from fd_fusion.frameworks import paddle_runtime as runtime
from fd_fusion.frameworks import triton_launch as runtime_triton
from fd_fusion.reasons import FusionError, Reason, because
from fd_fusion.tuning import table as tuning_table
from fd_fusion.tuning.limits import NEVER, OpSpec, limit_source
from fd_fusion.tuning.table import Fingerprint, Limits

_AUTO = {"cpu": ("paddle",), "gpu": ("triton", "flashinfer")}


@dataclass(frozen=True)
class Opening:
    """A backend that is open on all ranks of a group."""

    backend: str
    opened: Any
    limit_source: str = "built in"
    note: Reason | None = None  # why the tuning table of this machine is not used


def open_for(
    group: Group, pairs: Sequence[Any], config: FusionConfig, deterministic: bool, workspace_bytes: int
) -> tuple[Opening | None, Reason | None, tuple[int, ...]]:
    """Collective: open a backend for pairs of one hidden size and dtype.

    Args: workspace_bytes: the most that the workspace may have, equal on all ranks.
    Returns: (opening, None, ()), or (None, the reason of the first candidate, the ranks that refused). Any refusal
        of any rank moves all of them to the next candidate.
    """
    device, arch = runtime.device_of()
    tuned, note = (None, None) if deterministic or device == "cpu" else _tuned(group, pairs[0], config.timeout_s)
    wins = tuned is None or (tuned.order if config.backend == "auto" else tuned.rows.get(config.backend, True))
    if not wins and config.max_token_num is None:
        shape = {"size": group.size, "hidden_size": pairs[0].hidden_size, "dtype": pairs[0].dtype}
        return None, because("never_wins", **shape), ()
    first: tuple[Reason, tuple[int, ...]] | None = None
    for name in _candidates(config.backend, device, tuned):
        spec = [_spec(group, pair, config, deterministic, device, arch, workspace_bytes) for pair in pairs]
        found: dict[str, Any] = {"other_weight_dtypes": tuple(pair.weight_dtype for pair in pairs)}
        if tuned:
            found |= {"tuned_rows": tuned.rows.get(name) or None, "two_shot_rows": tuned.two_shot_rows or NEVER}
        spec = [dataclasses.replace(one, **found) for one in spec]
        opened, reason, ranks = _try(name, spec, group, config.timeout_s)
        if opened is not None:
            return Opening(name, opened, limit_source(spec[0]), note), None, ()
        first = first or (reason, ranks)
    return None, *first


def _candidates(named: str, device: str, tuned: Limits | None) -> tuple[str, ...]:
    """What is tried, in turn. By the table the fastest first, and none that never wins."""
    if named != "auto":
        return (named,)
    return tuned.order if tuned and tuned.order else _AUTO[device]


def _tuned(group: Group, pair: Any, timeout_s: float) -> tuple[Limits | None, Reason | None]:
    """Collective: what the tuning table says, if it says the same on all ranks, or why it is not used."""
    try:
        gpu = runtime_triton.framework().cuda.get_device_name()
        key = Fingerprint(gpu, group.size, pair.hidden_size, pair.dtype, tuning_table.versions_here())
        limits, note = tuning_table.read_limits(key, tuning_table.table_path())
    except Exception as error:  # told in the report; the other ranks wait for this vote
        limits, note = None, because("table_unusable", path="of limits", error=f"{type(error).__name__}: {error}")
    verdict = agree(group, "table", Vote(None, limits and limits.to_dict()), timeout_s=timeout_s)
    if not verdict.ok:
        return None, verdict.reason
    if any(data != verdict.data[0] for data in verdict.data):
        return None, because("table_differs")
    return limits, note


def _try(name: str, spec: list[OpSpec], group: Group, timeout_s: float) -> tuple[Any, Reason | None, tuple[int, ...]]:
    """Ask, vote, open, vote. What this rank opened is closed again when another one could not."""
    backend, refusal = _load(name, spec)
    verdict = agree(group, f"{name}.supports", Vote(refusal), timeout_s=timeout_s)
    if not verdict.ok:
        return None, verdict.reason, tuple(rank for rank, _ in verdict.refusals)
    opened = None
    with working(group, timeout_s=timeout_s):
        try:
            opened = backend.open(spec[0], group)
        except FusionError as error:
            refusal = error.reason
        except Exception as error:  # becomes a vote with its text, so that the other ranks hear of it
            refusal = because("open_failed", error=f"{type(error).__name__}: {error}")
    with contextlib.ExitStack() as unless_ok:
        if opened is not None:
            unless_ok.callback(opened.close)
        verdict = agree(group, f"{name}.open", Vote(refusal), timeout_s=timeout_s)
        if verdict.ok:
            unless_ok.pop_all()
            return opened, None, ()
    return None, verdict.reason, tuple(rank for rank, _ in verdict.refusals)


def _load(name: str, spec: list[OpSpec]) -> tuple[Any, Reason | None]:
    """The backend's module and its answer for every pair."""
    try:
        backend = importlib.import_module(f"fd_fusion.backends.{name}")
        answers = (backend.supports(one) for one in spec)
        return backend, next((answer for answer in answers if answer is not None), None)
    except FusionError as error:
        return None, error.reason
    except Exception as error:  # a backend whose package is broken: a reason, not a crash
        return None, because("backend_failed", backend=name, error=f"{type(error).__name__}: {error}")


def _spec(
    group: Group,
    pair: Any,
    config: FusionConfig,
    deterministic: bool,
    device: str,
    arch: int | None,
    workspace_bytes: int,
) -> OpSpec:
    return OpSpec(
        rank=group.rank,
        size=group.size,
        hidden_size=pair.hidden_size,
        dtype=pair.dtype,
        weight_dtype=pair.weight_dtype,
        weight_offset=pair.weight_offset,
        eps=pair.eps,
        device=device,
        arch=arch,
        deterministic=deterministic,
        max_token_num=config.max_token_num,
        workspace_bytes=workspace_bytes,
        timeout_s=config.timeout_s,
    )
