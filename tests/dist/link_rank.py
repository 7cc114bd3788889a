"""Rank script: variants of the fused kernel against a plain push of the same bytes, on several GPUs, torch tensors.

Every variant has a workspace of its own; in each cell all of them are captured, and their replays take turns. A figure
is the median over the rounds of the slowest rank's time for a call. Started by tests/gpu/bench_link.py.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import bench_rank as bench
import torch

from fd_fusion.frameworks import triton_launch
from fd_fusion.backends import triton as backend
from fd_fusion.backends.triton_setup import ONE_SHOT, STAYS, TWO_SHOT, plan_of
from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce.poll_ptx import poll
from fd_fusion.reasons import FusionError
from fd_fusion.tuning.limits import NEVER
from tests.support.all_reduce_cases import Case
from tests.support.ranks import this_group, this_rank

CLEAR = "    clear_slot(row, mask_if(row.mask, wait_state == 0), N - 1, shape.C * shape.SLICE)\n"


def sleeping_poll(ns):
    def text(*args, **kwargs):
        return poll(*args, **kwargs).replace("@again bra poll;", f"@again nanosleep.u32 {ns};\n@again bra poll;")

    return text


PEERS = "    memory = Memory(own_slots, state_memory, sums, peer_memories(state_memory, rank, shape.N))\n"


def stored_as(out, policy):
    words = {"norm_out": "norm", "residual_out": "summed"}[out]
    before = f"tl.store({out}, {words}, mask=row.mask)"
    return (before, f"{before[:-1]}, {policy})")


NO_NANS = [
    (
        "tl.store(residual_out, summed, mask=row.mask)",
        "tl.store(residual_out, summed, mask=mask_if(row.mask, row.number % shape.N == call.rank))",
    )
]
WORDS = [(size, hidden // 2) for size in range(2, 9) for hidden in (2880, 4096, 5120, 6144, 7168, 8192)]
VARIANTS = {  # replacements in kernel.py and row.py, what is changed in the plan or at launch
    "as it is": {},
    "PDL": {"pdl": "1"},
    "the residual stays": {"stays": True},
    "and no NaN elsewhere": {"kernel": NO_NANS, "untold": True},  # beside "the residual stays": what the NaN cost
    "a quarter of the device": {"share": 0.5},
    "all of the device": {"share": 2},
    **{f"{share} of half of the device": {"share": share} for share in (0.6, 0.7, 0.8, 0.9, 1.2, 1.5)},
    "by the kernel of rounds": {"rounds": True},
    **{f"{count} slots": {"slots": count} for count in (128, 256, 512, 768, 1024)},
    "eight warps": {"warps": 8},
    **{f"{count} registers": {"registers": count} for count in (80, 96, 112, 128, 168)},
    **{f"{count} slices": {"slices": count} for count in (1, 2)},  # by two-shot
    **{f"{split} x {warps}": {"split": (split, warps)} for split in range(1, 9) for warps in (1, 2, 4, 8)},
    "poll, sleep 50 ns": {"poll": sleeping_poll(50)},
    "poll, sleep 200 ns": {"poll": sleeping_poll(200)},
    "cleared twice": {"row": [(CLEAR, 2 * CLEAR)]},
    "residual_out streamed": {"kernel": [stored_as("residual_out", 'cache_modifier=".cs"')]},
    "residual_out evicted first": {"kernel": [stored_as("residual_out", 'eviction_policy="evict_first"')]},
    "address kept": {  # N=2 alone
        "kernel": [
            (
                PEERS,
                """    peer = pointer(tl.load(state_memory + 2 + (rank + 1) % shape.N), tl.uint32)
    memory = Memory(own_slots, state_memory, sums, (peer, peer, peer, peer, peer, peer, peer))
""",
            )
        ]
    },
    "counter not read at the end": {  # wrong: to see what it costs
        "row": [
            (
                "    counter_now = tl.load(memory.state_memory + COUNTER, volatile=True)\n    clear",
                "    counter_now = call.first_round * 0\n    clear",
            )
        ]
    },
    "outputs streamed": {
        "kernel": [stored_as(out, 'cache_modifier=".cs"') for out in ("norm_out", "residual_out")]
    },
}


def changes_of(name):
    """`name` may be several variants with " + " between them."""
    changes = {}
    for part in name.split(" + "):
        for key, change in VARIANTS[part].items():
            changes[key] = changes.get(key, []) + change if isinstance(change, list) else change
    return changes


def patched_kernel(name, changes):
    """The kernel with other source text, from files that are the same in every process."""
    folder = Path(tempfile.gettempdir()) / f"fd_fusion_link_{os.getuid()}_{abs(hash_of(name))}"
    folder.mkdir(exist_ok=True)
    home = Path(plans.__file__).parent
    loaded = None
    for module in ("row", "kernel"):
        text = (home / f"{module}.py").read_text()
        for before, after in changes.get(module, []):
            assert text.count(before) == 1, (name, before, text.count(before))
            text = text.replace(before, after)
        text = text.replace("from fd_fusion.kernels.all_reduce.row import", f"from link_row_{hash_of(name)} import")
        file = folder / f"link_{module}_{hash_of(name)}.py"
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(file)
        sys.path.insert(0, str(folder))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = loaded
        spec.loader.exec_module(loaded)
    return loaded.all_reduce_rms_norm


def hash_of(name):
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 10**8


@contextlib.contextmanager
def variant(name):
    """Inside, what is opened is this variant."""
    changes = changes_of(name)
    saved = plans.poll, dict(plans._MEASURED), set(plans._TWO_SLICES), triton_launch.load_kernel
    load = triton_launch.load_kernel
    os.environ["FD_ENABLE_PDL"] = changes.get("pdl", "0")
    plans.poll = changes.get("poll", plans.poll)
    if "split" in changes:
        plans._MEASURED.update({(size, words): changes["split"] for size, words in WORDS})
        plans._TWO_SLICES.clear()
    if "slices" in changes:
        plans._TWO_SLICES.clear()
        plans._TWO_SLICES.update(WORDS if changes["slices"] == 2 else ())
    if "warps" in changes:
        plans._MEASURED.update({key: (split, changes["warps"]) for key, (split, _) in plans._MEASURED.items()})
    if {"kernel", "row"} & set(changes):
        kernel = patched_kernel(name, changes)
        triton_launch.load_kernel = lambda module, what: kernel if what == kernel.__name__ else load(module, what)
    try:
        yield
    finally:
        plans.poll, measured, slices, triton_launch.load_kernel = saved
        for table, before in ((plans._MEASURED, measured), (plans._TWO_SLICES, slices)):
            table.clear()
            table.update(before)


class Variant(backend.TritonOp):
    """With a residual and one-shot or two-shot alone: half of the compiling."""

    path, untold, registers, rounds = ONE_SHOT, False, None, False

    def _compile(self, paths, in_rounds):
        if self.path not in paths:
            return {}
        kernel = triton_launch.load_kernel("all_reduce.kernel", "all_reduce_rms_norm")
        constants = plans.constants(
            self._plan,
            weight_dtype="bfloat16",
            has_residual=True,
            two_shot=self.path != ONE_SHOT,
            pdl=self.pdl,
            residual_stays=self.path == STAYS,
            rounds=in_rounds or self.rounds,
        )
        constants["maxnreg"] = self.registers or constants["maxnreg"]
        like = (*(1 << 40,) * 7, 2, 2, 0, 0, 1e-5, 0.0)
        prepared = triton_launch.prepare(kernel, like, constants, self._spec.device)
        return {("bfloat16", self.path, False, in_rounds): prepared}

    def _run_once(self):
        with contextlib.suppress(FusionError) if self.untold else contextlib.nullcontext():  # `cell` judges it
            super()._run_once()

    def finish(self, partial, residual, weight, eps, weight_offset, _=False):
        return super().finish(partial, residual, weight, eps, weight_offset, self.path == STAYS)


def share_of(op, path, most, share):
    return plans._spread(op._plan, min(op._slots, max(1, int(most * share))), path != ONE_SHOT) if most else 0


def open_variant(name, spec, group, collective=True):
    changes = changes_of(name)
    path = ONE_SHOT if spec.two_shot_rows != 1 else STAYS if "stays" in changes else TWO_SHOT
    kind = type("Variant", (Variant,), {"path": path, "pdl": "pdl" in changes, "untold": "untold" in changes})
    kind.registers, kind.rounds = changes.get("registers"), "rounds" in changes
    with variant(name):
        if "slots" in changes:
            spec = dataclasses.replace(spec, workspace_bytes=plans.total_bytes(plan_of(spec), changes["slots"]))
        op = kind(spec, group)
        if "share" in changes:  # 0 stays 0, of a path without rounds
            op.at_once = {path: tuple(share_of(op, path, most, changes["share"]) for most in op.at_once[path])}
        if collective:
            op._open()
            op.freeze()
    return op


def cell(group, ops, yardstick, hidden, rows, options):
    case = Case(group.size, rows, hidden)
    residual, weight = bench.common(case)
    x = bench.partial(case, group.rank)
    truth = bench.exact(case, residual, weight)
    contenders, errors = {}, {}
    for name, one in ops.items():
        def call(one=one):
            return one.finish(x, residual, weight, bench.EPS, 0.0)

        try:
            stale = [torch.full_like(x, float("nan")) for _ in range(4)]  # what the outputs will find in their memory
            del stale
            outputs = call()
            torch.cuda.synchronize()
            one.check()
            pairs = list(zip(outputs, truth))
            if one.path == STAYS:
                pairs[1] = tuple(part[group.rank :: group.size] for part in pairs[1])
            errors[name] = max([0.0, *(((o.double() - t).norm() / t.norm()).item() for o, t in pairs if len(o))])
        except Exception as error:  # told in the table
            errors[name] = float("inf")
            print(f"{name}, H={hidden} T={rows}: {type(error).__name__}: {error}", flush=True)
        contenders[name] = call
    everybody = agree(group, "right", Vote(data=errors), timeout_s=60).data
    for name in list(contenders):
        if not all(rank[name] < 0.01 for rank in everybody):
            print(f"WRONG {name}, H={hidden} T={rows}: {[rank[name] for rank in everybody]}", flush=True)
            del contenders[name]
    contenders |= yardstick.contenders(case, x, residual, weight)
    calls = 20 if rows <= 128 else 6
    times = bench.measure(contenders, options.rounds, calls, rows, None)
    everybody = agree(group, "times", Vote(data=times), timeout_s=60).data
    slowest = {n: [max(rank[n][i] for rank in everybody) for i in range(options.rounds)] for n in times}
    return [
        {
            "N": group.size,
            "H": hidden,
            "T": rows,
            "name": name,
            "two_shot": options.two_shot,
            "us": round(statistics.median(values), 3),
            "min_us": round(min(values), 3),
            "bytes_pushed": bench.bytes_pushed(group.size, case, "two-shot" if options.two_shot else "one-shot"),
        }
        for name, values in slowest.items()
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workspace_mb", type=int, default=40)
    parser.add_argument("--two-shot", action="store_true")
    parser.add_argument("--size", type=int, help="compile for so many ranks, and run nothing")
    options = parser.parse_args()
    torch.cuda.set_device(0 if options.size else this_rank() % torch.cuda.device_count())
    torch.zeros(1, device="cuda")
    began = time.monotonic()
    group = Group("compile", 0, options.size, tuple(range(options.size)), None) if options.size else this_group()
    two_shot = 1 if options.two_shot else None
    for hidden in options.hidden:
        spec = bench.spec_for(group.size, group.rank, hidden, options.workspace_mb)
        spec = dataclasses.replace(spec, two_shot_rows=two_shot or NEVER, timeout_s=3)
        ops = {name: open_variant(name, spec, group, not options.size) for name in options.variants}
        if options.size:
            continue
        yardstick = bench.Push(group, hidden, max(options.rows), ops[options.variants[0]]._push)
        results = [row for rows in options.rows for row in cell(group, ops, yardstick, hidden, rows, options)]
        if group.rank == 0:
            print("RESULT", json.dumps(results), flush=True)
            print(f"H={hidden} done at {time.monotonic() - began:.0f} s", flush=True)
        torch.cuda.synchronize()
        for one in ops.values():
            one.close()
        yardstick.close()
    if not options.size:
        agree(group, "end", Vote(), timeout_s=30)
    os._exit(0)


if __name__ == "__main__":
    main()
