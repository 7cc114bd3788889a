"""What a backend must bring: the description of an op that it gets, and the protocols of its module and of its op."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fd_fusion.config import FusionConfig
from fd_fusion.reasons import Reason

if TYPE_CHECKING:
    from fd_fusion.comm.group import Group


@dataclass(frozen=True)
class Fp8:
    """How a norm is quantised: by a formula of `reference.quantise`, and where its scales lie."""

    formula: str = "multiply"
    # As [H / 128, T], T padded to a multiple of 4, and given as a view [T, H / 128]; by rows in a traced graph.
    by_column: bool = False
    keeps_norm: bool = True  # norm_out is written too
    static_scale: float = 1.0

    @property
    def kernel(self) -> tuple[str, str]:
        """OUTPUT and FORMULA of the kernel."""
        return "both" if self.keeps_norm else "codes", self.formula


@dataclass(frozen=True)
class OpSpec:
    """The fused op of one workspace: its group, its shape and its limits. Equal on all ranks, except `rank`."""

    rank: int
    size: int  # N
    hidden_size: int  # H
    dtype: str  # of the partial sum and the residual: "float32", "bfloat16" or "float16"
    _: KW_ONLY
    weight_dtypes: tuple[str, ...] = ()  # of all pairs of the workspace, each once and sorted; () for `dtype` alone
    weight_offset: float = 0.0
    eps: float = 1e-6
    device: str = "cpu"  # or "gpu"
    arch: int | None = None  # 90 for sm_90, None on a CPU
    deterministic: bool = False
    max_token_num: int | None = None
    workspace_bytes: int = FusionConfig.workspace_mb << 20
    timeout_s: float = FusionConfig.timeout_s
    tuned_rows: int | None = None  # the tuning table's limit for the backend that is asked, if it has one
    tuned_staying_rows: int = 0  # that where a residual stays with the owners of its rows
    fp8: tuple[Fp8, ...] = ()  # what `finish_fp8` may be asked for
    two_shot_rows: int | None = None  # the tuning table's, NEVER for never; None leaves it to the backend

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_dtypes", tuple(sorted({*self.weight_dtypes} or {self.dtype})))


class Backend(Protocol):
    """A module of `backends/`. The one that a config names is imported, and nothing else of it is used."""

    def supports(self, spec: OpSpec) -> Reason | None:
        """Return why this rank cannot run `spec`, or None. Local: allocates and compiles nothing."""

    def open(self, spec: OpSpec, group: Group) -> FusedOp:
        """Collective: compile, allocate, and call once on numbers with a known answer.

        Raises: FusionError: on all ranks alike, with the reason of the first rank that refused.
        """


class FusedOp(Protocol):
    """All-reduce, residual and RMSNorm as one operation, over a workspace that is open on all ranks of a group."""

    limit: int | None  # the most rows T of a call; None for any number
    # What `finish_fp8(*arguments of finish, fp8)` gives, (norm_out or None, codes, scales, residual_out), with
    # `stays` behind these where `StayingOp.finish` takes it; () without that method.
    fp8: tuple[Fp8, ...]
    in_rank_order: bool  # whether `residual_out` is the contract's sum, bit for bit
    error_page: int | None  # the file descriptor of the page that a kernel writes its errors to, if there is one
    bytes: int  # the size of the workspace

    def finish(self, partial: Any, residual: Any, weight: Any, eps: float, weight_offset: float) -> tuple[Any, Any]:
        """Compute `reference.all_reduce_rms_norm`: [T, H], [T, H] or None, [H] -> (norm_out, residual_out), [T, H].

        Raises: ValueError: another shape or dtype than the op was opened for, before anything is launched.
        """

    def check(self) -> None:
        """Raise FusionTimeout if a call ran out of time, on this rank or on another one."""

    def freeze(self) -> None:
        """End the warm-up: from now on nothing is allocated but the outputs, and a call waits `timeout_s` at most."""

    def reset(self) -> None:
        """Collective: make the op usable again after a FusionTimeout, on all ranks or on none. Raises FusionError."""

    def stats(self) -> dict[str, Any]:
        """Return what the report shows: settings, and counts of the device. May be called after `close`."""

    def close(self) -> None:
        """Free the workspace, in bounded time. May be repeated; a later call of the op raises `closed`."""


class StayingOp(FusedOp, Protocol):
    """An op that may leave residual_out with the owners of its rows: each row is NaN on all other ranks."""

    may_stay: bool  # whether it does so for some T; an op without this attribute never does
    staying_limit: int | None  # the most rows of a call whose residual stays, as `limit` of one that sends it back

    def residual_stays(self, rows: int) -> bool:
        """Return whether a call of so many rows reads a row of the residual on its owner alone, and may leave it
        there. Pure, and equal on all ranks."""

    def finish(
        self, partial: Any, residual: Any, weight: Any, eps: float, weight_offset: float, stays: bool = False
    ) -> tuple[Any, Any]:
        """Compute the same as `FusedOp.finish`. stays: leave residual_out with its owners where `residual_stays(T)`.
        A residual that an earlier call of as many rows has left is as good as a whole one."""

    def whole(self, residual: Any, weight: Any, eps: float, weight_offset: float) -> Any:
        """Collective: gather a residual [T, H] that stays with its owners; one of another T is whole as it is."""
