"""One rank of `bench decode`: the models, the ways of reducing, their check and their replays in turn."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import decode_fp8, rivals
from bench.decode_model import Model, Shape, shape_of
from bench.decode_report import paired
from bench.decode_tokens import same_tokens
from bench.flashinfer_entry import open_flashinfer
from bench.timing import load_file, provenance
from fd_fusion.backends import triton as backend
from fd_fusion.backends.qk_rms_norm import qk_rms_norm
from fd_fusion.cli.tune.pull import Pull, compile_kernels
from fd_fusion.comm.folder_store import FolderStore
from fd_fusion.comm.group import Group, working
from fd_fusion.comm.symmetric_memory import as_refusal
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.frameworks.tensors import place
from fd_fusion.spec import OpSpec

EPS = 1e-5
OURS, AGAIN, BOUND, BEHIND = "ours", "ours again", "no reduction", "ours, quantised behind"


def measure(args: argparse.Namespace, rank: int, folder: Path) -> None:
    """Append a line of JSON for each thing found, on rank 0, so that what was measured outlives a kill."""
    began = time.monotonic()
    _, device, arch = place(rank)
    group = Group("decode", rank, args.ranks, tuple(range(args.ranks)), FolderStore(folder / "store"))
    _, refusal = as_refusal(lambda: rivals.join(group, folder))
    joined = agree(group, "joined", Vote(refusal), timeout_s=90)

    def tell(**line: Any) -> None:
        if rank == 0:
            with open(folder / "lines", "a") as lines:
                print(json.dumps(line), file=lines)

    tell(**_circumstances(args, device))
    if not joined.ok:
        tell(without=f"torch's process group: {joined.reason}")
    rows = [int(part) for part in args.rows.split(",")]
    for name in args.models.split(","):
        spent = agree(group, "time", Vote(data=time.monotonic() - began), timeout_s=60).data
        if max(spent) > args.seconds:
            tell(without=f"{name}: no time was left")
            continue
        shape = shape_of(name)
        spec = _spec(shape, group, device, arch, max(rows), args.fp8)
        with working(group):
            op = backend.open(spec, group)
        bench = Bench(args, group, spec, shape, op, rows)
        if not args.fp8:
            tell(tokens={name: same_tokens(bench.model, op, group, rows, ours_qk_norm, EPS)})
        for count in rows:
            spent = agree(group, "time", Vote(data=time.monotonic() - began), timeout_s=60).data
            if max(spent) > args.seconds:
                tell(without=f"{name} from T={count} on: no time was left")
                break
            for why in bench.without:
                tell(without=why)
            bench.without.clear()
            tell(cells={"model": name, "layers": bench.model.layers, **bench.cell(count)})
        op.check()
        bench.close()
        del bench, op  # two models at once may not fit
    agree(group, "end", Vote(), timeout_s=60)


def compile_for(args: argparse.Namespace) -> None:
    """Fill Triton's cache for one model: no group, one process."""
    _, device, arch = place(0)
    shape = shape_of(args.models)
    group = Group("compile", 0, args.ranks, tuple(range(args.ranks)), None)
    spec = _spec(shape, group, device, arch, 128, args.fp8)
    compile_kernels(spec)
    backend.TritonOp(spec, group)
    model = _model(args.fp8, [], shape, args.ranks, 0, 1, args.context, 8, getattr(torch, spec.dtype))
    plain = torch.empty(8, shape.hidden, dtype=model.dtype, device=model.device)
    reduce = rivals.Rival()
    reduce._plain, reduce.call = plain, lambda x, residual, weight: (F.rms_norm(x, x.shape[1:], weight), residual)
    if args.fp8:
        reduce = decode_fp8.Behind(reduce, model.quantise)
    for count in (1, 8):
        model.step(model.embedding[:count], reduce, ours_qk_norm)


def ours_qk_norm(qkv: torch.Tensor, weight: torch.Tensor, q: int, kv: int, dim: int) -> None:
    qk_rms_norm(qkv, weight, weight, q_heads=q, kv_heads=kv, head_dim=dim, eps=EPS)


def torch_qk_norm(qkv: torch.Tensor, weight: torch.Tensor, q: int, kv: int, dim: int) -> None:
    for part in qkv[:, : q * dim], qkv[:, q * dim : (q + kv) * dim]:
        heads = part.unflatten(1, (-1, dim))
        heads.copy_(F.rms_norm(heads, (dim,), weight, EPS))


def _model(fp8: bool, without: list[str], *args: Any) -> Model:
    return decode_fp8.Fp8Model(without, *args) if fp8 else Model(*args)


def _spec(shape: Shape, group: Group, device: str, arch: int | None, rows: int, fp8: bool) -> OpSpec:
    dtype = "bfloat16" if device == "gpu" or fp8 else "float32"
    limits = {"max_token_num": rows, "timeout_s": 30}
    limits |= {"fp8": (decode_fp8.BOTH, decode_fp8.ALONE)} if fp8 else {}
    return OpSpec(group.rank, group.size, shape.hidden, dtype, eps=EPS, device=device, arch=arch, **limits)


def _circumstances(args: argparse.Namespace, device: str) -> dict[str, Any]:
    about = provenance() if device == "gpu" else {"device": "CPU", "commit": "", "date": "", "versions": {}}
    about |= {"mode": device, "ranks": args.ranks, "context": args.context, "rounds": args.rounds}
    reference = args.qk_reference.name if args.qk_reference else "torch's rms_norm of q and of k"
    return {**about, "stock_qk_norm": reference}


class Bench:
    """A model and all ways to reduce in it."""

    def __init__(self, args: argparse.Namespace, group: Group, spec: OpSpec, shape: Shape, op: Any, rows: list[int]):
        self.group, self.spec, self.shape, self.rounds = group, spec, shape, args.rounds
        self.without: list[str] = []
        layers = args.layers or _enough_layers(shape, group.size)
        dtype, most = getattr(torch, spec.dtype), max(rows)
        sizes = layers, args.context, most
        self.model = _model(args.fp8, self.without, shape, group.size, group.rank, *sizes, dtype)
        self.pull = Pull(spec, group, most)
        self.norm = rivals.Norm(self.pull)
        plain = torch.empty(most, shape.hidden, dtype=dtype, device=self.model.device)
        ours = rivals.Fused(op, plain, EPS)
        stock = load_file(args.qk_reference).qk_rmsnorm_fused if args.qk_reference else None
        self.ways: dict[str, tuple[Any, Callable]] = {
            BOUND: (rivals.NoReduction(plain, self.norm), ours_qk_norm),
            OURS: (ours, ours_qk_norm),
            AGAIN: (ours, ours_qk_norm),
        }
        if shape.qk_norm:
            self.ways["ours, stock q/k norm"] = ours, functools.partial(_stock, stock) if stock else torch_qk_norm
        self.flashinfer = open_flashinfer(args.flashinfer, group, plain, op._push, EPS, self.without)
        if self.flashinfer:
            self.ways["flashinfer"] = self.flashinfer, ours_qk_norm
        others = rivals.open_rivals(group, spec, most, self.pull, self.norm, self.without)
        self.ways |= {name: (way, ours_qk_norm) for name, way in others.items()}
        if args.fp8:
            behind = {
                BEHIND if name == OURS else name: (decode_fp8.Behind(way, self.model.quantise), norm)
                for name, (way, norm) in self.ways.items()
                if name != AGAIN
            }
            ours = decode_fp8.Fused(op, plain, EPS), ours_qk_norm
            self.ways = {OURS: ours, AGAIN: ours, **behind}

    def cell(self, rows: int) -> dict[str, Any]:
        """us a layer by each way at this T, and the paired differences from ours."""
        self.norm.tune(rows)
        ways = {name: way for name, way in self.ways.items() if name == BOUND or self._is_right(name, rows)}
        x = self.model.embedding[torch.arange(rows, device=self.model.device) * 7]
        calls = {name: functools.partial(self.model.step, x, *way) for name, way in ways.items()}
        fence = functools.partial(self.ways[OURS][0].call, *self._numbers(1)[:3])
        mine = take_turns(calls, fence, self.rounds, x.is_cuda)
        everybody = agree(self.group, "times", Vote(data=mine), timeout_s=120).data
        slowest = {name: [max(times) for times in zip(*(one[name] for one in everybody))] for name in mine}
        layers = self.model.layers
        us = {name: [time / layers for time in times] for name, times in slowest.items()}
        head = functools.partial(self._head, x)
        return {"T": rows, **paired(us, OURS), "head_us": round(one_us(head, x.is_cuda), 2)}

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.model.head).argmax(-1)

    def _numbers(self, rows: int) -> tuple[torch.Tensor, ...]:
        """(this rank's partial sums, residual, weight, the norm of the whole in fp64)"""
        dtype, device = self.model.dtype, self.model.device

        def draw(who: int, *shape: int) -> torch.Tensor:
            generator = torch.Generator(device).manual_seed(1000 * rows + who)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        parts = [draw(rank, rows, self.shape.hidden) for rank in range(self.group.size)]
        residual, weight = draw(100, rows, self.shape.hidden), draw(101, self.shape.hidden)
        total = sum(part.double() for part in parts) + residual.double()
        truth = total * torch.rsqrt((total**2).mean(-1, keepdim=True) + EPS) * weight.double()
        return parts[self.group.rank], residual, weight, truth

    def _is_right(self, name: str, rows: int) -> bool:
        partial, residual, weight, truth = self._numbers(rows)
        way = self.ways[name][0]
        x = way.buffer(rows).copy_(partial)
        got, most = way.call(x, residual.clone(), weight)[0], 0.01
        if isinstance(got, decode_fp8.Quantised):
            got, most = got.codes.double() * got.scales.repeat_interleave(128, 1), 0.04
        error = ((got.double() - truth).norm() / truth.norm()).item()
        errors = agree(self.group, f"right {name}", Vote(data=error), timeout_s=60).data
        if right := all(one < most for one in errors):  # a rounding is far below, a fault far above; NaN is wrong
            return right
        self.without.append(f"{name} at T={rows}, H={self.shape.hidden}: wrong numbers, {errors}")
        return False

    def close(self) -> None:
        if self.model.device == "cuda":
            torch.cuda.synchronize()
        for one in filter(None, (self.flashinfer, self.pull, self.ways[OURS][0].op)):
            one.close()


def _stock(kernel: Callable, qkv: torch.Tensor, weight: torch.Tensor, q: int, kv: int, dim: int) -> None:
    kernel(qkv, weight, weight, EPS, q * dim, kv * dim, dim)


def _enough_layers(shape: Shape, size: int) -> int:
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size if torch.cuda.is_available() else 0
    return max(6, -(-4 * cache // shape.layer_bytes(size)))


def take_turns(calls: dict[str, Callable], fence: Callable, rounds: int, on_gpu: bool) -> dict[str, list[float]]:
    """us of each call: twice a round, in one order and then in the other. Before each timed replay an untimed one and
    the fence bring the ranks together, without the host's time between them."""
    replays = {name: rivals.captured(call) if on_gpu else call for name, call in calls.items()}
    meet = rivals.captured(fence) if on_gpu else fence
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in [*calls, *reversed(calls)]:
            if on_gpu:
                replays[name]()
                meet()
            us = rivals.event_us(replays[name]) if on_gpu else _clock_us(replays[name])
            if number or not on_gpu:
                times[name].append(us)
    return times


def one_us(call: Callable, on_gpu: bool) -> float:
    if not on_gpu:
        return _clock_us(call)
    replay = rivals.captured(call)
    return min(rivals.event_us(replay) for _ in range(5))


def _clock_us(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)
