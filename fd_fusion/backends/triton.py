"""The triton backend: one kernel of this package over symmetric memory; it needs no FlashInfer, nvcc or torch.

On NVIDIA GPUs the kernel is compiled and launched on Paddle or torch tensors; on a CPU the same source runs under
Triton's interpreter, each rank a process. All that a call needs beside its tensors is fixed by `open`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any

from fd_fusion.backends.triton_first_calls import run_all, run_all_fp8
from fd_fusion.backends.triton_fp8 import Outputs, compile_fp8, refuses_fp8
from fd_fusion.backends.triton_setup import (
    ANY_ADDRESS,
    ONE_SHOT,
    STAYS,
    TWO_SHOT,
    compile_kernels,
    layout_of,
    paths_in_rounds,
    paths_of,
    plan_of,
    supports,
)
from fd_fusion.comm.cuda_ipc import CudaIpc
from fd_fusion.comm.group import Group
from fd_fusion.comm.posix_shm import PosixShm
from fd_fusion.comm.symmetric_memory import MemoryProvider, agree_or_raise, as_refusal
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.comm.workspace import Workspace, open_workspace
from fd_fusion.frameworks import triton_launch
from fd_fusion.frameworks.tensors import maker, paddle_or_torch
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce.counts import Counts
from fd_fusion.reasons import FusionError, Reason, because, closed
from fd_fusion.spec import OpSpec
from fd_fusion.tuning.limits import row_limit

__all__ = ["TritonOp", "open", "refuses_fp8", "supports"]
_CPU_PROGRAMS = 4  # rows in flight under the interpreter, where programs run one after another anyway


def open(spec: OpSpec, group: Group) -> TritonOp:
    """Collective: import Triton, compile the kernels, open the workspace, run each kernel once.

    Raises: FusionError: on all ranks alike, with the first rank that refused and its reason.
    """
    no_fp8 = None
    if spec.fp8:
        no_fp8 = agree(group, "triton.fp8", Vote(refuses_fp8(spec)), timeout_s=spec.timeout_s).reason
        spec = spec if no_fp8 is None else dataclasses.replace(spec, fp8=())
    with triton_launch.interpreting(spec.device):
        op, refusal = as_refusal(lambda: TritonOp(spec, group))
        how = None if op is None else f"{op._slots} slots, rows at once by path {op.at_once}"
        ranks = agree_or_raise(group, "triton", refusal, how, spec.timeout_s)
        # A round that a program has ended tells it about the same program of each peer.
        for rank, got in enumerate(ranks):
            if got != ranks[0]:
                raise FusionError(because("launches_differ", rank=rank, got=got, need=ranks[0]))
        try:
            op.no_fp8 = no_fp8
            op._open()
        except BaseException:
            op.close()
            raise
    return op


class TritonOp:
    """The kernels of one workspace, and their launch; `spec.StayingOp` has the contract of each method."""

    in_rank_order = True
    no_fp8: Reason | None = None  # why it quantises nothing, where that was asked for

    def __init__(self, spec: OpSpec, group: Group):
        """Compile the kernels: the half of `open` that needs no vote and no memory."""
        self.limit, self.fp8 = row_limit(spec), spec.fp8
        self._spec, self._group, self._plan = spec, group, plan_of(spec)
        triton_launch.require_mode(spec.device)
        self._provider: MemoryProvider = CudaIpc() if spec.device == "gpu" else PosixShm()
        paths = paths_of(spec, self._plan)
        self.may_stay = STAYS in paths
        self.staying_limit = row_limit(spec, stays=self.may_stay)
        # The built-in limit of what stays was measured with no more slots than what is sent back asks for, so that a
        # second model finds room; the tuning table's with as many as fit.
        limit = self.limit if spec.tuned_rows is None else self.staying_limit
        self._slots = plans.slots_of(self._plan, workspace_bytes=spec.workspace_bytes, limit=limit)
        self._launches, self._fp8_launches = {}, {}
        alone = self._add_kernels(paths, False)
        several = self._add_kernels(paths_in_rounds(spec, self._plan, self._slots, alone), True)
        # By path, of calls of one round and of rounds; 0 without such a kernel. Its fewer registers would let it have
        # more, and a round would end in a batch of the few rows that are left.
        self.at_once = {path: (most, min(most, several.get(path, 0))) for path, most in alone.items()}
        word = ANY_ADDRESS, ANY_ADDRESS
        store = triton_launch.load_kernel("all_reduce.probe", "store_word")
        self._store_word = triton_launch.prepare(store, word, {}, spec.device).launch
        self._framework = paddle_or_torch()
        dtype = getattr(self._framework, spec.dtype)
        self._dtypes, self._new = (dtype, dtype), maker(spec.device)
        launches = self._launches | self._fp8_launches
        # By a weight's dtype, compared by identity: to compare or to hash two dtypes takes a microsecond.
        self._of_weights = [
            (getattr(self._framework, name), {key[1:]: run for key, run in launches.items() if key[0] == name})
            for name in spec.weight_dtypes
        ]
        self._two_shot_rows, self._row_bytes = self._plan.two_shot_rows or 1 << 62, 4 * self._plan.words
        self._cut = functools.lru_cache(1024)(self._cut_call)
        self._calls, self._rank, self._interpreted = itertools.count(), group.rank, spec.device == "cpu"
        self._counts = Counts(2)
        self._workspace: Workspace | None = None

    @property
    def bytes(self) -> int:
        return self._workspace.bytes

    def finish(self, partial, residual, weight, eps, weight_offset, stays=False):
        """Compute the formula of `reference.all_reduce_rms_norm` in one kernel, with the same bits for every T.

        Args:
            partial: this rank's partial sums, [T, H]. residual: [T, H] or None. weight: [H].
        Returns: (norm_out, residual_out), [T, H], new tensors. If a rank is missing: NaN, and `check` raises.
        Raises: ValueError: another shape or dtype than the workspace was opened for; a weight may have been replaced.
            FusionTimeout: on a CPU, at once.
        """
        return self._finish(partial, residual, weight, eps, weight_offset, stays, None)

    def _finish(self, partial, residual, weight, eps, weight_offset, stays, fp8):
        rows, hidden = shape = partial.shape
        added = partial if residual is None else residual
        # Tuples are compared by identity first: two dtypes that are not one object take a microsecond.
        if hidden != self._spec.hidden_size or added.shape != shape or (partial.dtype, added.dtype) != self._dtypes:
            got = [None if tensor is None else (list(tensor.shape), tensor.dtype) for tensor in (partial, residual)]
            expected = f"{self._spec.hidden_size} {self._spec.dtype}"
            raise ValueError(f"opened for rows of {expected}, got partial {got[0]}, residual {got[1]}")
        launches = self._launches_for(weight)
        x, r, w = partial.data_ptr(), added.data_ptr(), weight.data_ptr()
        if (x | r | w) & 15 or not (partial.is_contiguous() and added.is_contiguous() and weight.is_contiguous()):
            partial, added, weight = _ready(partial), _ready(added), _ready(weight)
            x, r, w = partial.data_ptr(), added.data_ptr(), weight.data_ptr()
        residual_out = self._new(shape, self._dtypes[0])
        norm_out = self._new(shape, self._dtypes[0]) if fp8 is None or fp8.keeps_norm else residual_out
        if rows:
            stays = stays and self.may_stay and residual is not None
            path = ONE_SHOT if rows < self._two_shot_rows else STAYS if stays else TWO_SHOT
            out = norm_out.data_ptr(), residual_out.data_ptr()
            in_rounds, cut = self._cut(rows, path, self._slots, self.at_once[path])
            variant = path, residual is None, in_rounds
            launch = launches[variant if fp8 is None else (*variant, fp8.kernel)]
            self._launch(launch, cut, x, r, w, *out, eps, weight_offset, fp8)
        return norm_out, residual_out

    def finish_fp8(self, partial, residual, weight, eps, weight_offset, fp8, stays=False):
        """Compute `finish`, and codes and scales of its norm_out by `reference.quantise`, in the same kernel.

        Args: those of `finish`, and fp8: one of `spec.fp8`.
        Returns: (norm_out or None, codes, scales, residual_out). codes [T, H], float8_e4m3fn; scales [T, H / 128] as
            `fp8` says, None for a static scale. If a rank is missing all codes are NaN.
        """
        outputs = Outputs(self._framework, self._new, partial.shape, fp8)
        norm_out, residual_out = self._finish(partial, residual, weight, eps, weight_offset, stays, outputs)
        return None if norm_out is residual_out else norm_out, outputs.codes, outputs.scales, residual_out

    def residual_stays(self, rows: int) -> bool:
        return self.may_stay and rows >= self._two_shot_rows

    def whole(self, residual, weight, eps, weight_offset):
        if not self.residual_stays(residual.shape[0]):
            return residual
        return self.finish(self._framework.zeros_like(residual), residual, weight, eps, weight_offset)[1]

    def check(self) -> None:
        """Raise FusionTimeout if a call ran out of time, on this rank or another; before results are published."""
        self._workspace.check()

    def freeze(self) -> None:
        """End the warm-up of the workspace: from now on a call waits `timeout_s`, not ten times as long."""
        self._workspace.freeze()

    def reset(self) -> None:
        """Collective: reset the workspace after a FusionTimeout, on all ranks or on none. Raises FusionError."""
        as_refusal(self._device_counts)  # a reset clears the counts; a read that fails must not part the ranks
        self._counts.pause()
        self._workspace.reset()
        self._counts.start_anew()

    def stats(self) -> dict[str, Any]:
        """Return settings and counts of the workspace; of a closed one those that need no memory."""
        plan, workspace = self._plan, self._workspace
        return {
            "bytes": workspace.bytes,
            "rows_at_once": max(most for most, _ in self.at_once.values()),
            "split": plan.split,
            "num_warps": plan.num_warps,
            "two_shot_rows": plan.two_shot_rows,
            "generation": workspace.generation,
            "frozen": workspace.frozen,
            "timeouts": workspace.generation + (not workspace.closed and workspace.error() is not None),
            "device": None if workspace.closed else self._device_counts(),
        }

    def _device_counts(self) -> dict[str, int]:
        """Read the kernel's own counts since `open`, replays of graphs included.

        rows: finished rows. calls: rounds of the kernel; a call of more rows than there are slots has several.
        """
        rows, calls = self._counts.read(self._read_counters)
        return {"rows": rows, "calls": calls}

    def _read_counters(self) -> tuple[int, int]:
        data = self._workspace.read(self._workspace.local, 8 * plans.HEAD_WORDS)
        head = struct.unpack(f"<{plans.HEAD_WORDS}Q", data)
        return head[plans.ROWS], head[plans.COUNTER] // plans.COUNTER_STEP

    @property
    def error_page(self) -> int | None:
        """Return the file descriptor of the error page, for a process beside this one; None without a page."""
        return self._workspace.page

    def close(self) -> None:
        """Free the workspace; may be repeated, and waits no more than seconds for the other ranks."""
        self.finish = self.finish_fp8 = closed
        self._launches_for = closed  # a `finish` that a caller kept launches nothing either
        if self._workspace is not None:
            self._workspace.close()

    def _launches_for(self, weight) -> dict[tuple, Callable[..., None]]:
        """Return the launches for this weight, by (path, without residual, in rounds), and of FP8. Raises ValueError.

        With another weight the kernel would read past its end, or one dtype as another.
        """
        dtype, shape = weight.dtype, weight.shape  # the shape a list of Paddle's, or a tuple of torch's
        if len(shape) == 1 and shape[0] == self._spec.hidden_size:
            for known, launches in self._of_weights:
                if dtype is known:
                    return launches
            for known, launches in self._of_weights:
                if dtype == known:
                    return launches
        expected = f"[{self._spec.hidden_size}] of {' or '.join(self._spec.weight_dtypes)}"
        raise ValueError(f"opened for weights {expected}, got {list(weight.shape)} of {dtype}; bind the model anew")

    def _rows_at_once(self, path: int, kernels: dict[tuple, triton_launch.Loaded]) -> int:
        """All programs of a call must run at once; half of what fits leaves room for other streams' kernels."""
        resident = min(kernel.resident for (_, of, *_), kernel in kernels.items() if of == path)
        room = _CPU_PROGRAMS if self._spec.device == "cpu" else resident * self._provider.multiprocessors() // 2
        return plans.rows_at_once(self._plan, self._slots, programs=room, two_shot=path != ONE_SHOT)

    def _launch(self, launch, cut, partial, residual, weight, norm_out, residual_out, eps, weight_offset, fp8):
        """Launch on the current stream, with the addresses of the tensors. cut: see `_cut_call`.

        `call_id`, `op` on the error page, counts calls, or captures of them.
        """
        call_id, (local, own) = next(self._calls) & 0xFFFFFF, self._own
        for programs, start, count, rounds in cut:
            skip = start * self._row_bytes
            launch(
                programs,
                partial + skip,
                residual + skip,
                weight,
                norm_out + skip,
                residual_out + skip,
                local,
                own,
                count,
                rounds,
                self._rank,
                call_id,
                eps,
                weight_offset,
                *(() if fp8 is None else fp8.arguments(start)),
            )
        if self._interpreted and (reason := self._workspace.error()) is not None:
            self._workspace.fail(reason)

    def launches(self, rows: int, path: int) -> list[plans.Launch]:
        """Return the launches of a call of `rows` rows."""
        return plans.launches(self._plan, self._slots, self.at_once[path], rows, path != ONE_SHOT)

    def _cut_call(self, rows, path, *_) -> tuple[bool, list[tuple[int, int, int, int]]]:
        """Return whether a call has rounds, and its launches. Cached, by slots and rows at once too."""
        launches = self.launches(rows, path)
        return launches[0].rounds > 1, [tuple(one) for one in launches]

    def _add_kernels(self, paths: Sequence[int], in_rounds: bool) -> dict[int, int]:
        """Compile and add the kernels of these paths. Returns the rows at once of each path."""
        kernels, fp8 = self._compile(paths, in_rounds), compile_fp8(self._spec, self._plan, paths, in_rounds)
        self._launches |= {variant: kernel.launch for variant, kernel in kernels.items()}
        self._fp8_launches |= {variant: kernel.launch for variant, kernel in fp8.items()}
        return {path: self._rows_at_once(path, {**kernels, **fp8}) for _, path, *_ in kernels}

    def _compile(self, paths: Sequence[int], in_rounds: bool) -> dict[tuple, triton_launch.Loaded]:
        return compile_kernels(self._spec, self._plan, paths, in_rounds)

    def _push(self, addresses: tuple[int, ...], value: int) -> None:
        """Store `value` at each address, as the proof of the memory asks: a `symmetric_memory.Push`."""
        for address in addresses:
            self._store_word(1, address, value)

    def _open(self) -> None:
        """Collective: open the workspace and run the kernels: the second half of `open`."""
        timeout_s = self._spec.timeout_s
        layout = layout_of(self._plan, self._slots)
        self._workspace = open_workspace(self._group, layout, self._provider, self._push, timeout_s=timeout_s)
        self._own = self._workspace.local, self._workspace.memory.own
        _, refusal = as_refusal(self._run_once)
        agree_or_raise(self._group, "ran", refusal, None, timeout_s)

    def _run_once(self) -> None:
        """Run every kernel that a call can choose, and compare its results: a first launch may allocate."""
        run_all(self, self._spec, self._framework)
        run_all_fp8(self, self._spec, self._framework)
        self._provider.synchronize()
        self.check()


def _ready(tensor: Any) -> Any:
    """Return the tensor, or a copy: contiguous and on a 16-byte boundary, as the kernel reads it."""
    tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() & 15 else tensor
