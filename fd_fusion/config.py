"""`FusionConfig`: what may fuse, and which of the sources that ask for it wins.

    FD_FUSION_DISABLE=1  >  an explicit config (--fusion-config, or an argument)  >  FD_FUSION_CONFIG
                         >  upstream's --enable-flashinfer-allreduce-fusion  >  off

Installed but not asked for, the package changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fd_fusion.reasons import Reason, because

BACKENDS = ("auto", "triton", "flashinfer", "paddle")
ENV_CONFIG = "FD_FUSION_CONFIG"
ENV_DISABLE = "FD_FUSION_DISABLE"


@dataclass(frozen=True)
class FusionConfig:
    """What may be fused, by what, and within which bounds.

    Args:
        enable_all_reduce_rms_norm: fuse all-reduce + residual + RMSNorm.
        enable_qk_rms_norm: fuse the RMSNorm of q and k.
        backend: "auto", or the name of one; a named backend that fails is an error at bind.
        max_token_num: the most rows T that a call may have to be fused; None takes the tuned or built-in limit.
            In deterministic mode it has no effect.
        workspace_mb: bounds all workspaces of a process together, in MiB.
        timeout_s: how long a fused call waits for a missing rank, in seconds.
        strict: nothing may be off: what would be one warning is an error at bind, on all ranks. Left out are only
            what was not asked for and what a rule of the table of reasons excludes: one rank, a draft model, a layer
            on another pipeline rank, a tuning table in which fusing never wins, q and k with another backend.
    Raises: ValueError: a value of the wrong type or out of range; the message names the key.
    """

    enable_all_reduce_rms_norm: bool = True
    enable_qk_rms_norm: bool = True
    backend: str = "auto"
    max_token_num: int | None = None
    workspace_mb: int = 40  # two ranks: slots for 2559 rows of H=4096, 1279 of 8192
    timeout_s: float = 30.0
    strict: bool = False

    def __post_init__(self) -> None:
        for key in ("enable_all_reduce_rms_norm", "enable_qk_rms_norm", "strict"):
            _require(isinstance(getattr(self, key), bool), key, getattr(self, key), "true or false")
        _require(self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}")
        limit = self.max_token_num
        _require(limit is None or _is_int(limit, 1, 2**31 - 1), "max_token_num", limit, "null or an integer from 1")
        _require(_is_int(self.workspace_mb, 1, 65536), "workspace_mb", self.workspace_mb, "an integer, 1 to 65536")
        time_ok = isinstance(self.timeout_s, (int, float)) and not isinstance(self.timeout_s, bool)
        _require(time_ok and 0.1 <= self.timeout_s <= 3600, "timeout_s", self.timeout_s, "a number, 0.1 to 3600")

    @property
    def insists(self) -> bool:
        """Return whether a failure of what was asked for is an error: under `strict`, or of a named backend."""
        return self.strict or self.backend != "auto"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FusionConfig:
        """Make a config from plain data. Raises ValueError for an unknown key, naming it and the known ones."""
        if not isinstance(data, Mapping):
            raise ValueError(f"fusion config: got {type(data).__name__}, expected an object of key and value")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"fusion config: unknown key {key!r}; allowed are {', '.join(known)}")
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> FusionConfig:
        """Make a config from JSON text such as '{"backend": "triton"}'. Raises ValueError."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number or a nesting beyond Python's own limits
            raise ValueError(f"fusion config: {text!r} is not JSON: {error}; expected an object like {{}}") from None
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Resolved:
    """The config that won, or None with the reason, and the source that it came from."""

    config: FusionConfig | None
    source: str
    reason: Reason | None = None


def resolve(
    explicit: FusionConfig | Mapping[str, Any] | str | None = None,
    *,
    explicit_source: str = "an argument",
    upstream_flag: bool | None = None,
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """Choose among the sources by the table at the top of this module.

    Args:
        explicit: a config given as such: a FusionConfig, plain data, or JSON text.
        upstream_flag: the host's own fusion flag; true asks for the defaults, false (its default) vetoes nothing.
        environ: the environment to read; `os.environ` when None.
    Raises: ValueError: the winning source is malformed. A source that did not win is not read.
    """
    environ = os.environ if environ is None else environ
    if environ.get(ENV_DISABLE, "").strip().lower() not in ("", "0", "false", "no", "off"):
        return Resolved(None, ENV_DISABLE, because("kill_switch"))
    if explicit is not None:
        return Resolved(_as_config(explicit, explicit_source), explicit_source)
    if environ.get(ENV_CONFIG, "").strip():
        return Resolved(_as_config(environ[ENV_CONFIG], ENV_CONFIG), ENV_CONFIG)
    if upstream_flag:
        return Resolved(FusionConfig(), "--enable-flashinfer-allreduce-fusion")
    return Resolved(None, "no source", because("not_asked"))


def _as_config(value: FusionConfig | Mapping[str, Any] | str, source: str) -> FusionConfig:
    if isinstance(value, FusionConfig):
        return value
    try:
        return FusionConfig.from_json(value) if isinstance(value, str) else FusionConfig.from_dict(value)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _require(ok: bool, key: str, got: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"fusion config: {key} = {got!r}; allowed is {allowed}")
