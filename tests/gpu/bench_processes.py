"""Speed of the fused all-reduce with one process a GPU: compiles everything at once, runs the ranks, writes JSON.

python tests/gpu/bench_processes.py --size 4 --out FILE.json [--flashinfer trtllm_comm.so]
python tests/gpu/bench_processes.py --table FILE.json [--plot FILE.png]
"""

import argparse
import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.dist.compile_only import compile_all  # noqa: E402
from tests.support.ranks import run_ranks  # noqa: E402

HIDDEN = (4096, 5120, 6144, 7168, 8192)
ROWS = (1, 2, 4, 6, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int)
    parser.add_argument("--out")
    parser.add_argument("--table", help="print the table of this result and run nothing")
    parser.add_argument("--plot", help="with --table: draw it too; needs matplotlib")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache, run nothing")
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flashinfer", type=os.path.abspath, help="a compiled trtllm_allreduce_fusion")
    parser.add_argument("--host", help="a result whose rows of the host's own all-reduce are shown beside this one's")
    parser.add_argument("--no-nccl", action="store_true", help="NCCL refuses two ranks on one GPU")
    parser.add_argument("--seconds", type=float, default=150)
    options = parser.parse_args()
    if options.table:
        result = json.loads(Path(options.table).read_text())
        if options.plot:
            draw(result, options.plot)
        return show(result["rows"])
    start = time.monotonic()
    compile_all([(options.size, hidden, "bfloat16", "bfloat16") for hidden in options.hidden], "--both-paths")
    if options.compile_only:
        return
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    args = ["--hidden", *options.hidden, "--rows", *options.rows, "--rounds", options.rounds]
    args += ["--seconds", options.seconds] + (["--flashinfer", options.flashinfer] if options.flashinfer else [])
    args += [] if options.no_nccl else ["--nccl"]
    ended = run_ranks("bench_rank.py", options.size, *args, timeout_s=options.seconds + 20)
    failed = [rank for rank in ended if rank.status]
    for number, rank in enumerate(ended):
        if failed:
            print(f"--- rank {number}, status {rank.status}\n{rank.text[-3000:]}")
    lines = [line for line in ended[0].text.splitlines() if line.startswith(("RESULT ", "without ", "not timed"))]
    results = [line[7:] for line in lines if line.startswith("RESULT ")]  # one behind each H, of all so far
    rows = json.loads(results[-1]) if results else []
    result = {**circumstances(options), "rows": rows}
    if options.host:
        result["imported"] = imported(options.host, options.size)
    Path(options.out).write_text(json.dumps(result, indent=1))
    show(rows)
    missing = len(options.hidden) * len(options.rows) - len({(row["H"], row["T"]) for row in rows})
    wrong = [line for line in lines if line.startswith("not timed")]
    print("\n".join(line for line in lines if not line.startswith("RESULT ")))
    print(f"{options.out}: {missing} cells were not measured in {options.seconds:.0f} s" if missing else options.out)
    sys.exit(1 if failed or missing or wrong else 0)


def circumstances(options):
    import torch
    import triton

    commit = os.environ.get("FD_FUSION_COMMIT", "unknown")
    return {
        "device": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "ranks": options.size,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(os.path.basename(word) for word in sys.argv),  # no folder of that machine
        "flashinfer": os.path.basename(options.flashinfer or "") or None,
        "method": "CUDA-graph replays in turn; median over rounds of the slowest rank's time for a call",
    }


def imported(file, size):
    """The host's own all-reduce as it was measured elsewhere, with where that was: no run of this machine."""
    other = json.loads(Path(file).read_text())
    rows = [row for row in other["rows"] if row["name"].startswith("host") and row["N"] == size]
    about = {key: other[key] for key in ("device", "commit", "date", "method") if key in other}
    return {"from": os.path.basename(file), **about, "rows": rows}


def show(rows):
    """A markdown table, us a call: one line a cell."""
    names = sorted({row["name"] for row in rows})
    print("| H | T | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 2) + "|")
    for hidden, count in sorted({(row["H"], row["T"]) for row in rows}):
        by_name = {row["name"]: row["us"] for row in rows if (row["H"], row["T"]) == (hidden, count)}
        figures = " | ".join(f"{by_name[name]:.2f}" if name in by_name else "" for name in names)
        print(f"| {hidden} | {count} | {figures} |")


def draw(result, path):
    """us a call over T, both logarithmic; a panel for each H."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    sizes = sorted({row["H"] for row in rows})
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(3.2 * len(sizes), 3.6), sharey=True, squeeze=False)
    for hidden, panel in zip(sizes, panels[0]):
        for name in sorted({row["name"] for row in rows}):
            line = sorted((row["T"], row["us"]) for row in rows if (row["H"], row["name"]) == (hidden, name))
            if line:
                panel.plot(*zip(*line), marker="o", markersize=3, label=name, ls="-" if "triton" in name else "--")
        panel.set(title=f"H={hidden}", xlabel="T")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("us a call, slowest rank")
    panels[0][0].legend(fontsize=7)
    title = f"{result['ranks']} x {result['device']}, NVLink, bf16, commit {result['commit']}, {result['date'][:10]}"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
