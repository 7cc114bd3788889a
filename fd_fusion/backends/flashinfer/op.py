"""FlashInfer's kernel over one open workspace: the op, its checks, and the end of it."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

import numpy as np

from fd_fusion import exact
from fd_fusion.backends.flashinfer.calls import Call, Tensor, rules
from fd_fusion.backends.flashinfer.watchdog import Watchdog
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import CLOSE_TIMEOUT_S, on_all_ranks
from fd_fusion.comm.workspace import WARM_UP
from fd_fusion.frameworks.tensors import dtype_name, numbers, paddle_or_torch, tensor
from fd_fusion.reasons import FusionError, Reason, closed
from fd_fusion.reference import DTYPE_BYTES
from fd_fusion.spec import OpSpec

ALIGNMENT = 16
_ONE_SHOT_BYTES = {2: 512 << 20, 4: 64 << 20, 8: 42 << 20, 16: 42 << 20}  # 2*N*T*H*e up to which one-shot is taken


class FlashInferOp:
    """FlashInfer's kernel over one workspace, for one group, hidden size and dtype."""

    in_rank_order = False  # its tree changes with T, and the sum is rounded before the residual is added
    fp8 = ()
    error_page = None  # its watchdog names the rank itself

    def __init__(
        self,
        spec: OpSpec,
        group: Group,
        version: str,
        call: Call,
        rows: int,
        nbytes: int,
        read: Any,
        release: Callable[..., Any],
    ):
        self.limit, self.bytes = rows, nbytes
        self._spec, self._group, self._version, self._rules = spec, group, version, rules(version)
        self._call, self._read, self._release, self._framework = call, read, release, paddle_or_torch()
        name = f"flashinfer all_reduce_rms_norm (H={spec.hidden_size}, {spec.dtype})"
        what = f"{name} of group {group.name!r}, rank {group.rank} of {group.size},"
        self._watchdog = Watchdog(read, what, WARM_UP * spec.timeout_s)
        self._closed = False
        atexit.register(self.close)

    def finish(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        """Compute `reference.all_reduce_rms_norm` in one kernel, with FlashInfer's own roundings.

        Args: partial, residual: [T, H]. weight: [H]. All of the opened dtype, contiguous, 16-byte aligned.
        Returns: (norm_out, residual_out), [T, H] each.
        Raises: ValueError: before the launch. RuntimeError: the launch failed; the other ranks are waiting then.
        """
        framework = self._framework
        if residual is None:
            residual = framework.zeros_like(partial)
        self._require(partial, residual, weight, weight_offset)
        norm_out, residual_out = framework.empty_like(partial), framework.empty_like(partial)
        rows = partial.shape[0]
        if rows:
            self._call(partial, residual, norm_out, residual_out, weight, eps, weight_offset, self.one_shot(rows))
        return norm_out, residual_out

    def one_shot(self, rows: int) -> bool:
        """Return whether a call is one-shot: T <= N, few bytes, or a version whose two-shot is not sound."""
        spec = self._spec
        nbytes = 2 * spec.size * rows * spec.hidden_size * DTYPE_BYTES[spec.dtype]
        return not self._rules.two_shot or rows <= spec.size or nbytes <= _ONE_SHOT_BYTES[spec.size]

    def check(self) -> None:
        """Raise nothing but `closed`: a call that runs out of time ends the process, so there is nothing to reset."""
        if self._closed:
            closed()

    reset = check

    def freeze(self) -> None:
        """End the warm-up: from now on a call may wait `timeout_s`."""
        self.check()
        self._watchdog.limit_s = self._spec.timeout_s

    def stats(self) -> dict[str, Any]:
        return {"version": self._version, "limit_s": self._watchdog.limit_s}

    def close(self) -> None:
        """Give the workspace back, all ranks together, in bounded time; leave it to the exit if a call hangs."""
        if self._closed:
            return
        self._closed, self.finish, self._call = True, closed, closed  # `_call`: whoever kept `finish` calls nothing
        atexit.unregister(self.close)
        idle = self._watchdog.idle_within(CLOSE_TIMEOUT_S)
        if self._release(wait=idle):
            self._watchdog.stop()
            self._read.close()

    def warm_up(self) -> None:
        """Collective: call once with and without a residual, so the kernel is loaded and known to be right."""
        spec, framework = self._spec, self._framework
        rows = [1, spec.size + 1] if not self.one_shot(self.limit) else [1]

        def run() -> None:
            reasons = [_compare(self, spec, framework, count, bare) for count in rows for bare in (False, True)]
            if wrong := next((reason for reason in reasons if reason), None):
                raise FusionError(wrong)

        on_all_ranks(self._group, "flashinfer_ran", run, WARM_UP * spec.timeout_s, undo=self.close)

    def _require(self, partial: Tensor, residual: Tensor, weight: Tensor, weight_offset: float) -> None:
        """Raise ValueError for what the kernel does not check; it would read past the end, or a wrong dtype."""
        spec, rows = self._spec, partial.shape[0]
        if rows > self.limit:
            raise ValueError(f"flashinfer: T={rows}; the workspace holds {self.limit} rows")
        if weight_offset and not self._rules.weight_bias:
            raise ValueError(f"flashinfer {self._version}: weight_offset {weight_offset}; it adds none")
        row = [rows, spec.hidden_size]
        for name, one, shape in (("x", partial, row), ("residual", residual, row), ("weight", weight, row[1:])):
            dtype = dtype_name(one)
            if [*one.shape] != shape or dtype != spec.dtype:
                raise ValueError(f"flashinfer: {name} is {[*one.shape]} {dtype}; expected {shape} {spec.dtype}")
            if not one.is_contiguous() or one.data_ptr() % ALIGNMENT:
                raise ValueError(
                    f"flashinfer: {name} is not contiguous, or not aligned to {ALIGNMENT} bytes; copy it"
                )


def _compare(op: FlashInferOp, spec: OpSpec, framework: Any, rows: int, bare: bool) -> Reason | None:
    """Compare one call on integers that add up exactly in every dtype and order; its norm rounds once."""
    known = [
        np.resize(exact.probe_partial(r, spec.size, spec.hidden_size, 1.0, spec.dtype), (rows, spec.hidden_size))
        for r in range(spec.size + 1)
    ]
    residual, weight = None if bare else known[-1], exact.known_weight(spec.hidden_size, spec.dtype)
    offset, eps = spec.weight_offset, 1.0
    arrays = known[spec.rank], residual, weight
    tensors = [None if values is None else tensor(framework, values, spec.dtype, "gpu") for values in arrays]
    norm_out, total = (numbers(out) for out in op.finish(*tensors, eps, offset))
    need = exact.rank_order_sum(known[:-1], residual)
    limits = {"eps": eps, "weight_offset": offset, "dtype": spec.dtype, "rounded": True}
    wrong = {"residual_out": total != need, "norm_out": exact.norm_excess(norm_out, need, weight, **limits) > 1}
    return exact.first_wrong_word(f"FlashInfer's kernel {'without' if bare else 'with'} a residual, T={rows},", wrong)
