"""What is not fused, for `tune` to measure against: the host's own all-reduce or a pull, NCCL above its limit."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fd_fusion.cli.processes.ranks import join_paddle
from fd_fusion.cli.tune.pull import NORM_WARPS, Pull
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import on_all_ranks
from fd_fusion.reasons import FusionError
from fd_fusion.reference import DTYPE_BYTES
from fd_fusion.spec import OpSpec

_PULL_BYTES = 8 << 20  # the limit of FastDeploy's own, for which the pull stands


@dataclass
class Rival:
    """An all-reduce and a norm that are not fused, for calls of up to `most_rows` rows."""

    name: str
    most_rows: int
    reduce: Callable[[Any], Any]
    norms: Sequence[Callable[[Any, Any, Any], tuple[Any, Any]]]  # of which the fastest counts
    place: Callable[[Any], None] = lambda x: None  # x where it is reduced, which a model's GEMM would do itself
    capturing: Callable[[], Any] = contextlib.nullcontext
    check: Callable[[], None] = lambda: None  # raises where the calls since the last check mean nothing
    close: Callable[[], None] = lambda: None

    def call(self, norm: Callable, x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
        return norm(self.reduce(x), residual, weight)

    def finish(self, x: Any, residual: Any, weight: Any, eps: float, weight_offset: float) -> tuple[Any, Any]:
        """The same as a fused op's, so that one check serves both."""
        self.place(x)
        return self.call(self.norms[0], x, residual, weight)


def open_rivals(
    framework: Any, spec: OpSpec, group: Group, job: dict[str, Any]
) -> tuple[list[Rival], dict[str, str]]:
    """Collective: the rivals, the first that takes a number of rows counting; and what was not opened, with why."""
    found: dict[str, Rival] = {}
    skipped: dict[str, str] = {}

    def opened(name: str, *steps: Callable[[], Any]) -> bool:
        try:
            for number, step in enumerate(steps):  # no rank enters a collective step that another one cannot
                rival = on_all_ranks(group, f"rival {name} {number}", step, 3 * job["timeout_s"])
            found[name] = rival
        except FusionError as error:
            skipped[name] = str(error.reason)
        return name in found

    library = "NCCL" if spec.device == "gpu" else "gloo"
    on_paddle = framework.__name__ == "paddle"
    joined = opened(library, partial(_paddle_rival if on_paddle else _torch_rival, framework, spec, job, library))
    if spec.device == "gpu" and on_paddle and joined and importlib.util.find_spec("fastdeploy"):
        from fd_fusion.hosts.fastdeploy.custom_all_reduce import check_compiled

        # Without its own, FastDeploy runs NCCL.
        opened("FastDeploy", check_compiled, partial(_host_rival, spec, found[library].norms))
    else:
        rows = min(max(job["rows"]), _rows(spec, _PULL_BYTES))
        opened("pull", lambda: _pull_rival(framework, spec, Pull(spec, group, rows)))
    return [*(one for name, one in found.items() if name != library), *filter(None, [found.get(library)])], skipped


def told(rivals: list[Rival]) -> str:
    """What fusing was measured against, in a sentence's part."""
    *small, last = rivals
    return ", ".join([*(f"{one.name} up to {one.most_rows} rows" for one in small), last.name])


def _rows(spec: OpSpec, nbytes: int) -> int:
    return nbytes // (spec.hidden_size * DTYPE_BYTES[spec.dtype])


def _pull_rival(framework: Any, spec: OpSpec, pull: Pull) -> Rival:
    sums: dict[int, Any] = {}

    def reduce(x: Any) -> Any:
        out = sums.setdefault(x.shape[0], framework.empty_like(x))
        pull.reduce(out)
        return out

    def norm(warps: int, x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
        pull.norm(x, residual, weight, warps)
        return x, residual

    name = "a pull of this package and its norm, in the place of a host's own all-reduce"
    norms, ends = [partial(norm, warps) for warps in NORM_WARPS], {"check": pull.check, "close": pull.close}
    return Rival(name, _rows(spec, _PULL_BYTES), reduce, norms, place=pull.write, **ends)


def _host_rival(spec: OpSpec, norms: Sequence[Callable]) -> Rival:
    import paddle.distributed as dist

    from fd_fusion.hosts.fastdeploy.custom_all_reduce import open_custom_all_reduce

    own = open_custom_all_reduce(dist.new_group(list(range(spec.size))))
    name = "FastDeploy's custom all-reduce and Paddle's fused_rms_norm, which it calls"
    return Rival(name, _rows(spec, own.limit), own.reduce, norms, capturing=own.capturing)


def _paddle_rival(framework: Any, spec: OpSpec, job: dict[str, Any], library: str) -> Rival:
    import paddle
    import paddle.distributed as dist

    join_paddle(spec.rank, spec.size, job["ports"], library.lower())
    if spec.device == "cpu":
        from fd_fusion.frameworks import paddle_ops

        def plain(x: Any, r: Any, w: Any) -> tuple[Any, Any]:
            return paddle_ops.rms_norm(x, w, eps=spec.eps, residual=r)

        return Rival("gloo and Paddle's operations", max(job["rows"]), paddle_ops.all_reduce, [plain])

    def reduce(x: Any) -> Any:
        dist.stream.all_reduce(x, sync_op=True, use_calc_stream=True)  # on the stream that is captured
        return x

    def norm(x: Any, r: Any, w: Any) -> tuple[Any, Any]:
        fused = paddle.incubate.nn.functional.fused_rms_norm
        return fused(x, w, None, spec.eps, begin_norm_axis=1, residual=r)

    return Rival("NCCL and Paddle's fused_rms_norm", max(job["rows"]), reduce, [norm])


def _torch_rival(torch: Any, spec: OpSpec, job: dict[str, Any], library: str) -> Rival:
    dist = importlib.import_module("torch.distributed")
    place = f"tcp://127.0.0.1:{job['ports'][0]}"
    dist.init_process_group(library.lower(), init_method=place, rank=spec.rank, world_size=spec.size)

    def reduce(x: Any) -> Any:
        dist.all_reduce(x)
        return x

    def norm(x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
        total = x + residual
        return torch.nn.functional.rms_norm(total, weight.shape, weight, spec.eps), total

    return Rival(f"{library} and torch's rms_norm", max(job["rows"]), reduce, [norm])
