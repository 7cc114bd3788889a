"""Rank script: FP8 out of the fused kernel, on torch tensors: its bits against the contract, then its speed.

The rival is the same op without FP8 and a quantiser of its own behind it, in the best of several shapes; it uses the
same code for a row and starts, like the op, while the kernel in front ends. Other forms of the kernels, each a folder
with a copy of fd_fusion/kernels (`--forms`), are timed beside the package's. Started by tests/gpu/bench_fp8.py, which
has the method of the figures from bench_rank.py.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
REHEARSED = "TRITON_INTERPRET" in os.environ  # on a CPU, with no graphs: the times mean nothing

import bench_rank
import numpy as np
import torch
from bench.quantiser import Quantiser

import fd_fusion
from fd_fusion import reference
from fd_fusion.backends import triton as backend
from fd_fusion.backends.triton_setup import ONE_SHOT
from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.frameworks.tensors import bytes_of, numbers
from fd_fusion.reasons import FusionError
from fd_fusion.spec import Fp8, OpSpec
from tests.support.ranks import this_group, this_rank

EPS = bench_rank.EPS
BOTH, ALONE = Fp8(), Fp8(keeps_norm=False, by_column=True)
EVERY = (*(Fp8(formula, static_scale=0.02) for formula in reference.FP8_FORMULAS), ALONE)
SHAPES = {"128 words": (128, 1), "512 words": (512, 4), "1024 words": (1024, 4), "a row": (None, 4), "a row, 8": (None, 8)}


_PARTS = ("fd_fusion.kernels", "fd_fusion.backends")
_imported = {}  # by form: its modules


@contextlib.contextmanager
def form(folder):
    """Import kernels and backends anew inside this block, with the kernels of `folder`."""
    def of_form():
        return {name: module for name, module in sys.modules.items() if name.startswith(_PARTS)}

    own = of_form()
    if folder is not None:
        for name in own:
            del sys.modules[name]
        sys.modules.update(_imported.get(folder, {}))
        fd_fusion.__path__.insert(0, str(folder))
    try:
        yield
    finally:
        if folder is not None:
            fd_fusion.__path__.remove(str(folder))
            _imported[folder] = of_form()
            for name in _imported[folder]:
                del sys.modules[name]
            sys.modules.update(own)
            fd_fusion.kernels, fd_fusion.backends = sys.modules[_PARTS[0]], sys.modules[_PARTS[1]]


def open_form(folder, spec, group):
    with form(folder):
        return importlib.import_module("fd_fusion.backends.triton").open(spec, group)


def opened(options, size, rank):
    """What is compiled and opened: (name, OpSpec). The first of each H is what is timed."""
    device = {"device": "cpu"}
    if not REHEARSED:
        major, minor = torch.cuda.get_device_capability()
        device = {"device": "gpu", "arch": 10 * major + minor}
    limits = {"max_token_num": 1 << 20, "workspace_bytes": options.workspace_mb << 20, "timeout_s": 20}
    specs = {}
    for hidden in options.hidden:
        base = OpSpec(rank, size, hidden, "bfloat16", eps=EPS, fp8=(BOTH, ALONE), **device, **limits)
        specs[f"H={hidden}"] = base
        specs[f"plain, H={hidden}"] = dataclasses.replace(base, fp8=())
        if hidden == options.hidden[0]:
            specs |= {f"{one.formula}, H={hidden}": dataclasses.replace(base, fp8=(one,)) for one in EVERY[1:5]}
            specs[f"two-shot, H={hidden}"] = dataclasses.replace(base, two_shot_rows=1)
    return specs


def inputs(group, rows, hidden, special):
    """x of this rank, residual, weight; `special`: a row of zeros, huge and tiny numbers, Inf and NaN."""
    device = "cpu" if REHEARSED else "cuda"
    own, common = (torch.Generator(device).manual_seed(seed) for seed in (1000 * rows + group.rank, 7))

    def draw(generator, *shape):
        return torch.randn(*shape, device=device, generator=generator).to(torch.bfloat16)

    x, residual, weight = draw(own, rows, hidden), draw(common, rows, hidden), draw(common, hidden)
    if special:
        x[0], residual[0] = 0, 0
        odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, -0.0, 1e-38], device=device)
        weight[: len(odd)] = odd.to(torch.bfloat16)  # not x: one Inf there is NaN in the whole row
        weight[128:256] *= 1e-37
    return x, residual, weight


def check_bits(group, op, form, rows, hidden, special):
    """Codes and scales against `reference.quantise` of the norm, and all of it against the call without FP8."""
    x, residual, weight = inputs(group, rows, hidden, special)
    norm, summed = op.finish(x, residual, weight, EPS, 0.0)
    norm_out, codes, scales, residual_out = op.finish_fp8(x, residual, weight, EPS, 0.0, form)
    op.check()
    want_codes, want_scales = reference.quantise(numbers(norm), form.formula, form.static_scale)
    wrong = {"codes": int((bytes_of(codes) != want_codes).sum())}
    if scales is not None:
        wrong["scales"] = int((numbers(scales).view(np.uint32) != want_scales.view(np.uint32)).sum())
    for name, got, plain in (("norm", norm_out, norm), ("sum", residual_out, summed)):
        wrong[name] = 0 if got is None else int((bytes_of(got) != bytes_of(plain)).sum())
    return wrong, bytes_of(codes).tobytes()


def every_half(dtype, formula, count, device):
    """Quantise groups with each half in turn as the largest. Returns how many codes and scales are not the contract's."""
    bits = torch.linspace(0, 0x7FFF, count, dtype=torch.float64).round().to(torch.int32).view(-1, 1)
    others = torch.randint(0, 1 << 16, (count, 128), generator=torch.Generator().manual_seed(1))
    signs = others & 0x8000
    words = torch.where((others & 0x7FFF) <= bits, others, signs | bits)
    near = torch.randint(0, 2048, (count, 128), generator=torch.Generator().manual_seed(2))  # of the largest
    words[:, 1::2] = (signs | (bits - near).clamp(min=0))[:, 1::2]
    words[:, 5], words[::3, 9], words[::5, 11] = bits[:, 0], 0x7FFF, 0x8000
    x = words.to(torch.int32).to(torch.int16).view(getattr(torch, dtype)).view(-1, 1024)
    want = reference.quantise(numbers(x), formula)
    made = Quantiser(1024, 512, 1, device, formula, dtype)(x.to("cpu" if device == "cpu" else "cuda"), BOTH)
    wrong_scales = numbers(made.scales).view(np.uint32) != want[1].view(np.uint32)
    return int((bytes_of(made.codes) != want[0]).sum()), int(wrong_scales.sum())


def values_of_halves(device):
    """Every formula with groups, both halves. Returns how many cases there are, and those that were wrong."""
    kinds = list(itertools.product(("bfloat16", "float16"), reference.FP8_FORMULAS[:-1]))
    count = 64 if device == "cpu" else 0x8000
    found = {kind: every_half(*kind, count, device) for kind in kinds}
    return len(kinds), [["every half", *kind, *wrong] for kind, wrong in found.items() if any(wrong)]


def values(group, specs, options):
    """Every spec, several T; the ranks compare their bits. Returns how many cases were right, and those that were not."""
    right, wrong = 0, []
    for name, spec in specs.items():
        op = backend.open(spec, group)
        for rows, special in ((1, False), (3, True), (options.most, False), (7, True)):
            for form in spec.fp8:
                found, codes = check_bits(group, op, form, rows, spec.hidden_size, special)
                everybody = agree(group, "bits", Vote(data=[found, hash_of(codes)]), timeout_s=60).data
                if any(any(one[0].values()) for one in everybody) or len({one[1] for one in everybody}) > 1:
                    wrong.append([name, form.formula, rows, special, [one[0] for one in everybody]])
                right += 1
        op.close()
    cases, of_halves = values_of_halves(specs[next(iter(specs))].device)
    wrong += of_halves
    return right + cases - len(wrong), wrong


def hash_of(data):
    import hashlib

    return hashlib.sha256(data).hexdigest()


def contenders(ops, quantisers, x, residual, weight):
    """The op alone, with FP8 beside and in the place of its norm, and with each quantiser behind it."""
    def plain(op):
        return lambda: op.finish(x, residual, weight, EPS, 0.0)

    def with_fp8(op, form):
        return lambda: op.finish_fp8(x, residual, weight, EPS, 0.0, form)

    def behind(quantiser, form=ALONE):
        def call():
            norm, summed = ops["now"].finish(x, residual, weight, EPS, 0.0)
            return norm, quantiser(norm, form), summed

        return call

    found = {"bf16": plain(ops["now"]), "bf16, plain workspace": plain(ops["plain"])}
    for name, op in ops.items():
        if name != "plain":
            which = "" if name == "now" else f", {name}"
            found |= {f"bf16 + FP8{which}": with_fp8(op, BOTH), f"FP8{which}": with_fp8(op, ALONE)}
    return found | {f"bf16, quantiser ({name})": behind(one) for name, one in quantisers.items()}


def measure(calls_of, options, calls, rows):
    if not REHEARSED:
        return bench_rank.measure(calls_of, options.rounds, calls, rows, None)
    times = {}
    for name, call in calls_of.items():
        start = time.monotonic()
        call()
        times[name] = [(time.monotonic() - start) * 1e6] * options.rounds
    return times


def open_forms(group, specs, hidden, forms, wrong):
    """Open the op without FP8, the package's with FP8, and that of each form whose bits are right, which all ranks
    have found so; what is not goes to `wrong`."""
    spec = specs[f"H={hidden}"]
    ops = {"plain": backend.open(specs[f"plain, H={hidden}"], group), "now": backend.open(spec, group)}
    for folder in forms:
        try:
            op = open_form(folder, spec, group)
        except FusionError as error:  # on all ranks
            wrong.append([folder.name, hidden, str(error)])
            continue
        ops[folder.name] = op
        for rows, form in itertools.product((1, 7, op.at_once[ONE_SHOT][0] * 2 + 1), (BOTH, ALONE)):
            found = check_bits(group, op, form, rows, hidden, rows == 7)[0]
            everybody = agree(group, "bits of a form", Vote(data=found), timeout_s=60).data
            if any(any(one.values()) for one in everybody):
                wrong.append([folder.name, hidden, rows, everybody])
    for op in ops.values():
        op.freeze()
    return ops


def speed(group, specs, options, began):
    """us a call of each contender, by (H, T); the slowest rank's, the median over the rounds."""
    results, wrong = [], []
    for hidden in options.hidden:
        spec = specs[f"H={hidden}"]
        ops = open_forms(group, specs, hidden, options.forms, wrong)
        op = ops["now"]
        quantisers = {name: Quantiser(hidden, *shape, spec.device) for name, shape in SHAPES.items()}
        for rows in options.rows:
            spent = agree(group, "time", Vote(data=time.monotonic() - began), timeout_s=60).data
            if max(spent) > options.seconds:
                print(f"no time for H={hidden} T={rows}", flush=True)
                continue
            x, residual, weight = inputs(group, rows, hidden, False)
            norm, _ = op.finish(x, residual, weight, EPS, 0.0)
            want = op.finish_fp8(x, residual, weight, EPS, 0.0, ALONE)
            for name, one in quantisers.items():  # the rival does the same work
                made = one(norm, ALONE)
                same = torch.equal(made.codes.view(torch.uint8), want[1].view(torch.uint8))
                assert same and torch.equal(made.scales, want[2]), (name, hidden, rows)
            calls = 2 if REHEARSED else 20 if rows <= 128 else 6
            mine = measure(contenders(ops, quantisers, x, residual, weight), options, calls, rows)
            everybody = agree(group, "times", Vote(data=mine), timeout_s=60).data
            slowest = {n: [max(one[n][i] for one in everybody) for i in range(options.rounds)] for n in mine}
            for name, all_of in slowest.items():
                cell = {"N": group.size, "H": hidden, "T": rows, "name": name, "at_once": op.at_once[ONE_SHOT][0]}
                results.append(cell | {"us": round(statistics.median(all_of), 3), "min_us": round(min(all_of), 3)})
        for one in ops.values():
            one.check()
            one.close()
        if group.rank == 0:
            print("FORMS", json.dumps(wrong), flush=True)
            print("RESULT", json.dumps(results), flush=True)
            print(f"H={hidden} done at {time.monotonic() - began:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 5120, 7168])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--most", type=int, default=130, help="rows of the largest call whose bits are compared")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--workspace_mb", type=int, default=40)
    parser.add_argument("--forms", type=Path, nargs="*", default=[], help="each a folder with `kernels`")
    parser.add_argument("--compile", type=int, help="compile the spec of this number for two ranks, and run nothing; "
                        "of a form, if one is given")  # fmt: skip
    options = parser.parse_args()
    began = time.monotonic()
    if not REHEARSED:
        torch.cuda.set_device(0 if options.compile is not None else this_rank() % torch.cuda.device_count())
        torch.zeros(1, device="cuda")
    if options.compile is not None:
        spec = list(opened(options, 2, 0).values())[options.compile]
        with form(options.forms[0] if options.forms else None):
            importlib.import_module("fd_fusion.backends.triton").TritonOp(spec, Group("compile", 0, 2, (0, 1), None))
        if options.forms:
            return
        if spec.fp8 == (BOTH, ALONE) and spec.two_shot_rows is None:
            for shape in SHAPES.values():
                Quantiser(spec.hidden_size, *shape, spec.device)
        if options.compile == 0:
            for dtype, formula in itertools.product(("bfloat16", "float16"), reference.FP8_FORMULAS[:-1]):
                Quantiser(1024, 512, 1, spec.device, formula, dtype)
        return
    group = this_group()
    specs = opened(options, group.size, group.rank)
    right, wrong = values(group, specs, options)
    if group.rank == 0:
        print("VALUES", json.dumps({"right": right, "wrong": wrong}), flush=True)
        print(f"values done at {time.monotonic() - began:.0f} s", flush=True)
    speed(group, specs, options, began)
    agree(group, "end", Vote(), timeout_s=30)


if __name__ == "__main__":
    main()
