"""The triton backend: one kernel of our own over symmetric memory; no FlashInfer, no nvcc, no torch.

On NVIDIA GPUs it is compiled and launched on Paddle or torch tensors; on a CPU the same source runs under Triton's
interpreter, each rank a process. Everything that a call needs beside its tensors is fixed at open.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import struct
from collections.abc import Callable
from typing import Any

from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group
from fd_fusion.comm.posix_shm import PosixShm
from fd_fusion.comm.symmetric_memory import Maker, attempt, settle
from fd_fusion.comm.workspace import Layout, Workspace, open_workspace
from fd_fusion.frameworks import triton_launch as runtime_triton
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce.counts import Counts
from fd_fusion.reasons import Reason, because, closed
from fd_fusion.tuning.limits import NEVER, Facts, row_limit

_CPU_PROGRAMS = 4  # rows in flight under the interpreter, where programs run one after another anyway
_ANY_ADDRESS = 1 << 40  # what a kernel is compiled for: an int64; nothing is specialized on its value


def supports(facts: Facts) -> Reason | None:
    """Whether this rank can try. Imports nothing and allocates nothing."""
    if importlib.util.find_spec("triton") is None:
        return because("no_triton", detail="it is not installed")
    if facts.size not in plans.SIZES:
        return because("world_size", got=facts.size, allowed=f"{plans.SIZES[0]} to {plans.SIZES[-1]}")
    for dtype in (facts.dtype, *facts.weight_dtypes):
        if dtype not in plans.DTYPE_BYTES:
            return because("dtype", got=dtype, allowed=", ".join(plans.DTYPE_BYTES))
    if facts.hidden_size * plans.DTYPE_BYTES[facts.dtype] % 16:
        return because("hidden_size", got=facts.hidden_size, need="a whole number of 16-byte units")
    if not plans.SMALLEST <= facts.eps < float("inf"):
        return because("eps", got=facts.eps)
    if facts.device == "gpu" and (facts.arch or 0) < 80:
        return because("old_gpu", got=facts.arch, need=80)
    plan = _plan(facts)
    if (need := plans.total_bytes(plan, 1)) > facts.workspace_bytes:
        return because("workspace_small", need=need, got=facts.workspace_bytes)
    return None


def open(facts: Facts, group: Group) -> Opened:
    """Collective: import, compile, open the workspace, run once. On all ranks or on none.

    Raises: FusionError: on all ranks alike, naming the first rank that refused and why.
    """
    with runtime_triton.interpreting(facts.device):
        opened, refusal = attempt(lambda: Opened(facts, group))
        settle(group, "triton", refusal, None, facts.timeout_s)
        try:
            opened._open()
        except BaseException:
            opened.close()
            raise
    return opened


class Opened:
    """One workspace and its kernels. `limit`: the most rows T of a call, None for any number."""

    in_rank_order = True  # the exact bits of the contract's sum

    def __init__(self, facts: Facts, group: Group):
        """The local half of `open`: import and compile, no vote and no memory."""
        self.limit = row_limit(facts)
        self._facts, self._group, self._plan = facts, group, _plan(facts)
        runtime_triton.require_mode(facts.device)
        self._maker: Maker = CudaIpc() if facts.device == "gpu" else PosixShm()
        kernels = self._compile()
        self._launches = {variant: kernel.launch for variant, kernel in kernels.items()}
        # All programs of a call must run at once; half of what fits leaves room for other streams and for ours.
        resident = min(kernel.resident for kernel in kernels.values())
        room = _CPU_PROGRAMS if facts.device == "cpu" else resident * self._maker.multiprocessors() // 2
        self.programs, self._slots = plans.programs_and_slots(
            self._plan, workspace_bytes=facts.workspace_bytes, at_once=room, limit=self.limit
        )
        word = _ANY_ADDRESS, _ANY_ADDRESS
        store = runtime_triton.load_kernel("all_reduce.probe", "store_word")
        self._store_word = runtime_triton.prepare(store, word, {}, facts.device).launch
        self._framework = runtime_triton.framework()
        self._empty_like = runtime_triton.empty_like()
        self._dtype = getattr(self._framework, facts.dtype)
        # The launches of a weight's dtype, found by identity: to compare or to hash dtypes takes a microsecond.
        self._of_weights = [
            (getattr(self._framework, name), {key[1:]: run for key, run in self._launches.items() if key[0] == name})
            for name in facts.weight_dtypes
        ]
        self._two_shot_rows = self._plan.two_shot_rows or 1 << 62
        self._calls = itertools.count()
        self._counts = Counts(2)
        self._workspace: Workspace | None = None

    @property
    def bytes(self) -> int:
        return self._workspace.bytes

    def finish(self, partial, residual, weight, eps, weight_offset):
        """The formula of `reference.all_reduce_rms_norm` in one kernel, with the same bits for every T.

        Args:
            partial: this rank's partial sums, [T, H]. residual: [T, H] or None. weight: [H].
        Returns: (norm_out, residual_out), [T, H], new tensors. If a rank is missing: NaN, and `check` raises.
        Raises: ValueError: another shape or dtype than this was opened for, the weight's too, which may have been
            replaced. FusionTimeout: on a CPU, at once.
        """
        rows, hidden = partial.shape
        alike = residual is None or (residual.shape == partial.shape and self._is_of_dtype(residual))
        if hidden != self._facts.hidden_size or not alike or not self._is_of_dtype(partial):
            got = [None if tensor is None else (list(tensor.shape), tensor.dtype) for tensor in (partial, residual)]
            expected = f"{self._facts.hidden_size} {self._facts.dtype}"
            raise ValueError(f"opened for rows of {expected}, got partial {got[0]}, residual {got[1]}")
        launches = self._launches_for(weight)
        partial = _ready(partial)  # before it is copied: torch's empty_like keeps the order of a transposed tensor
        norm_out, residual_out = self._empty_like(partial), self._empty_like(partial)
        if rows:
            self._launch(launches, partial, residual, weight, norm_out, residual_out, rows, eps, weight_offset)
        return norm_out, residual_out

    def check(self) -> None:
        """Raises: FusionTimeout: a call ran out of time, here or on another rank. Call it before publishing."""
        self._workspace.check()

    def freeze(self) -> None:
        """From now on nothing allocates, and a call waits `timeout_s`, not ten times as long."""
        self._workspace.freeze()

    def reset(self) -> None:
        """Collective: go on after a FusionTimeout, on all ranks or on none. Raises FusionError."""
        attempt(self._device_counts)  # for the last time; a count that fails is no reason for the ranks to part
        self._counts.pause()
        self._workspace.reset()
        self._counts.start_anew()

    def stats(self) -> dict[str, Any]:
        """Facts and counts; of a closed workspace those that need no memory."""
        plan, workspace = self._plan, self._workspace
        return {
            "bytes": workspace.bytes,
            "programs": self.programs,
            "split": plan.split,
            "num_warps": plan.num_warps,
            "two_shot_rows": plan.two_shot_rows,
            "generation": workspace.generation,
            "frozen": workspace.frozen,
            "timeouts": workspace.generation + (not workspace.closed and workspace.error() is not None),
            "device": None if workspace.closed else self._device_counts(),
        }

    def _device_counts(self) -> dict[str, int]:
        """What the kernel itself counted since open, replays of graphs too.

        rows: finished rows. calls: launches, which are calls where none has more rows than there are slots.
        """
        rows, calls = self._counts.seen(self._read_counters)
        return {"rows": rows, "calls": calls}

    def _read_counters(self) -> tuple[int, int]:
        data = self._workspace.read(self._workspace.local, 8 * plans.HEAD_WORDS)
        head = struct.unpack(f"<{plans.HEAD_WORDS}Q", data)
        return head[plans.ROWS], head[plans.COUNTER] // plans.TURN

    @property
    def error_page(self) -> int | None:
        """A descriptor of the page that `read_error` reads, for a process beside this one; None where it has none."""
        return self._workspace.page

    def close(self) -> None:
        """Give the memory back; may be repeated, and waits no more than seconds for the other ranks."""
        self.finish = closed
        self._launches_for = closed  # whoever kept `finish` launches nothing either
        if self._workspace is not None:
            self._workspace.close()

    def _is_of_dtype(self, tensor) -> bool:
        return tensor.dtype is self._dtype or tensor.dtype == self._dtype  # to compare takes a microsecond

    def _launches_for(self, weight) -> dict[tuple[bool, bool], Callable[..., None]]:
        """By (two-shot, without residual). The kernel would read past the end, or one dtype as another."""
        dtype, shape = weight.dtype, weight.shape  # the shape a list of Paddle's, or a tuple of torch's
        if len(shape) == 1 and shape[0] == self._facts.hidden_size:
            for known, launches in self._of_weights:
                if dtype is known:
                    return launches
            for known, launches in self._of_weights:
                if dtype == known:
                    return launches
        expected = f"[{self._facts.hidden_size}] of {' or '.join(self._facts.weight_dtypes)}"
        raise ValueError(f"opened for weights {expected}, got {list(weight.shape)} of {dtype}; bind the model anew")

    def _launch(self, launches, partial, residual, weight, norm_out, residual_out, rows, eps, weight_offset):
        """On the current stream. `op` on the error page is the number of the call, or of its capture."""
        weight, bare = _ready(weight), residual is None
        residual = partial if bare else _ready(residual)  # without one its address is not read
        launch = launches[rows >= self._two_shot_rows, bare]
        parts = [(0, rows)] if rows <= self._slots else plans.launches(self._slots, rows)
        op, row_bytes = next(self._calls) & 0xFFFFFF, 4 * self._plan.words
        for start, count in parts:
            launch(
                *plans.grid(self._plan, self.programs, count),
                partial.data_ptr() + start * row_bytes,
                residual.data_ptr() + start * row_bytes,
                weight.data_ptr(),
                norm_out.data_ptr() + start * row_bytes,
                residual_out.data_ptr() + start * row_bytes,
                *self._own,
                count,
                self._group.rank,
                op,
                eps,
                weight_offset,
            )
        if self._facts.device == "cpu" and (reason := self._workspace.error()) is not None:
            self._workspace.fail(reason)

    def _compile(self) -> dict[tuple[str, bool, bool], runtime_triton.Loaded]:
        """By (weight dtype, two-shot, without residual): all that any call can need, since nothing compiles later.
        Nothing is specialized on a value, so each is right for all calls."""
        kernel = runtime_triton.load_kernel("all_reduce.kernel", "all_reduce_rms_norm")
        like = (*(_ANY_ADDRESS,) * 7, 2, 0, 0, 1e-5, 0.0)
        pdl = self._facts.device == "gpu" and runtime_triton.uses_pdl()
        return {
            (name, two_shot, bare): runtime_triton.prepare(
                kernel,
                like,
                plans.constants(self._plan, weight_dtype=name, has_residual=not bare, two_shot=two_shot, pdl=pdl),
                self._facts.device,
            )
            for name in self._facts.weight_dtypes
            for two_shot in {False, self._plan.two_shot_rows is not None or self._facts.device == "cpu"}
            for bare in (False, True)
        }

    def _push(self, addresses: tuple[int, ...], value: int) -> None:
        """The proof's store: `symmetric_memory.Push`."""
        for address in addresses:
            self._store_word(1, address, value)

    def _open(self) -> None:
        """The collective half of `open`."""
        timeout_s = self._facts.timeout_s
        layout = _layout(self._plan, self._slots)
        self._workspace = open_workspace(self._group, layout, self._maker, self._push, timeout_s=timeout_s)
        self._own = self._workspace.local, self._workspace.memory.own
        _, refusal = attempt(self._run_once)
        settle(self._group, "ran", refusal, None, timeout_s)

    def _run_once(self) -> None:
        """Run every kernel that can be chosen, and compare what it gives: a first launch may allocate."""
        from fd_fusion.backends.triton_first_calls import run_all  # with NumPy, which who reads error pages lacks

        run_all(self, self._facts, self._framework)
        self._maker.synchronize()
        self.check()


def _plan(facts: Facts) -> plans.Plan:
    plan = plans.plan_for(facts.size, facts.hidden_size, facts.dtype, interpreted=facts.device == "cpu")
    if facts.two_shot_rows is None:
        return plan
    return dataclasses.replace(plan, two_shot_rows=None if facts.two_shot_rows == NEVER else facts.two_shot_rows)


def _layout(plan: plans.Plan, slots: int) -> Layout:
    return Layout(
        control_bytes=plans.CONTROL_BYTES,
        symmetric_bytes=plans.symmetric_bytes(plan, slots),
        fill=plans.SLOT_FILL,
        local_bytes=plans.local_bytes(plan, slots),
        local_words=lambda limit, page, addresses: plans.local_words(
            plan, slots, limit=limit, error_page=page, addresses=addresses
        ),
        page_bytes=plans.ERROR_PAGE_BYTES,
        read_error=read_error,
    )


def read_error(words: list[int]) -> Reason | None:
    """The error page as a reason."""
    error = plans.read_error_page(words)
    if error is None:
        return None
    where = {name: error[name] for name in ("op", "row", "launch")}
    if error["code"] == plans.TWO_STREAMS:
        return because("two_streams", **where)
    if error["code"] == plans.TOLD:
        return because("aborted")
    return because("dead_group", **where, missing=", ".join(map(str, error["missing"])) or "unknown")


def _ready(tensor: Any) -> Any:
    """The tensor as the kernel reads it: contiguous and on a 16-byte boundary. A copy where it is not."""
    tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() & 15 else tensor
