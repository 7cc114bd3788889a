"""What the fused all-reduce leaves of the link: variants of the kernel and a plain push of the bytes, in one run.

python tests/gpu/bench_link.py --size 2 --out FILE.json [--two-shot] [--hidden 4096 8192] [--rows 1 128 512 2048]

Groups of variants run in child processes with a limit on their time each, every one with the kernel as it is and the
yardstick in it; what a group has measured is kept when another fails. --asked "PDL + two ahead" ...: one more group.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.gpu.bench_processes import circumstances  # noqa: E402
from tests.support.ranks import run_ranks  # noqa: E402

BASE = "as it is"
GROUPS = {
    "two_shot": [
        "the residual stays",
        "the residual stays + and no NaN elsewhere",
        "PDL",
        "two ahead",
    ],  # with --two-shot
    "ahead": ["PDL", "one ahead", "two ahead", "all ahead"],
    "device": ["a quarter of the device", "all of the device", "eight warps"],
    "details": ["poll, sleep 50 ns", "poll, sleep 200 ns", "cleared twice", "outputs streamed"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--out", required=True)
    parser.add_argument("--groups", nargs="*", default=list(GROUPS)[1:])
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--two-shot", action="store_true")
    parser.add_argument("--seconds", type=int, default=50, help="for each group")
    parser.add_argument(
        "--asked", nargs="+", default=[], help='a group of one\'s own; " + " between what is combined'
    )
    options = parser.parse_args()
    if options.asked:
        GROUPS["asked"] = options.asked
        options.groups = [*options.groups, "asked"]
    options.flashinfer = None
    args = ["--rows", *options.rows, "--rounds", options.rounds] + ["--two-shot"] * options.two_shot
    compile_all(options, args)
    rows, failed = [], {}
    for group in options.groups:
        hidden = ["--hidden", *options.hidden]
        start, variants = time.monotonic(), [BASE, *GROUPS[group]]
        ended = run_ranks(
            "link_rank.py", options.size, *hidden, *args, "--variants", *variants, timeout_s=options.seconds
        )
        for line in ended[0].text.splitlines():
            if line.startswith("RESULT "):
                rows += [row | {"group": group} for row in json.loads(line[7:])]
            elif line.startswith("WRONG "):
                print(line)
        if any(rank.status for rank in ended):
            failed[group] = [rank.status for rank in ended]
            for number, rank in enumerate(ended):
                print(f"--- {group}, rank {number}, status {rank.status}\n{rank.text[-2500:]}")
        print(f"{group}: {time.monotonic() - start:.0f} s", flush=True)
        Path(options.out).write_text(json.dumps({**circumstances(options), "failed": failed, "rows": rows}, indent=1))
    show(rows)
    sys.exit(1 if failed or not rows else 0)


def compile_all(options, args):
    """All at once, into Triton's cache."""
    script, start = str(ROOT / "tests/dist/link_rank.py"), time.monotonic()
    jobs = []
    for hidden in options.hidden:
        for variant in [BASE, *(name for group in options.groups for name in GROUPS[group])]:
            one = [sys.executable, "-W", "ignore", script, "--size", str(options.size), *map(str, args)]
            jobs.append(subprocess.Popen([*one, "--hidden", str(hidden), "--variants", variant], cwd=ROOT))
    for job in jobs:
        job.wait(timeout=120)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)


def show(rows):
    """us a call: a line for each variant, a column for each cell; the base and the yardstick once a group."""
    cells = sorted({(row["H"], row["T"]) for row in rows})
    print("| group | variant | " + " | ".join(f"{h}, {t}" for h, t in cells) + " |")
    print("|---" * (len(cells) + 2) + "|")
    for group, name in dict.fromkeys((row["group"], row["name"]) for row in rows):
        mine = {(row["H"], row["T"]): row["us"] for row in rows if (row["group"], row["name"]) == (group, name)}
        print(f"| {group} | {name} | " + " | ".join(f"{mine[c]:.2f}" if c in mine else "" for c in cells) + " |")
    for hidden, count in cells:
        nbytes = next(row["bytes_pushed"] for row in rows if (row["H"], row["T"]) == (hidden, count))
        ours = [row for row in rows if (row["H"], row["T"]) == (hidden, count) and "plain" not in row["name"]]
        best = min(ours, key=lambda row: row["us"])
        print(
            f"{hidden}, {count}: {nbytes} bytes a rank; fastest {best['name']}: {nbytes / best['us'] / 1e3:.0f} GB/s"
        )


if __name__ == "__main__":
    main()
