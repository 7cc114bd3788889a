"""Print the tables of figures of README.md and of README.md beside this script, from the JSON files here; tests keep
them equal.
"""

import json
import math
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
GAINS = {2: (1, 64, 512), 4: (1, 32, 128, 512, 2048)}  # N -> T, at H = 4096
PATHS = {
    "triton one-shot": "one-shot",
    "triton two-shot": "two-shot",
    "triton two-shot, the residual stays": "it stays",
}
RIVALS = {"pull": "pull", "flashinfer": "FlashInfer", "symm": "torch symm. memory", "nccl": "NCCL"}
SHOWN = {"H": (2048, 4096, 8192), "T": (1, 16, 64, 128, 256, 512, 2048)}
STEPS = {
    "pull + norm": "pull",
    "flashinfer": "FlashInfer",
    "symm two-shot + norm": "torch symm. memory",
    "nccl + norm": "NCCL",
}
Cells = dict[tuple[int, int], dict[str, float]]


def load(name: str) -> dict:
    return json.loads((HERE / name).read_text())


def mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def shots(rows: list[dict]) -> Cells:
    """us a call by (H, T) and name, without what does less than all-reduce and norm."""
    cells: Cells = {}
    for row in rows:
        if row["name"].startswith(("triton", "flashinfer")) or row["name"].endswith("+ norm"):
            cells.setdefault((row["H"], row["T"]), {})[row["name"]] = row["us"]
    return cells


def best_of(rows: list[dict]) -> Cells:
    """us a call by (H, T) and library, the better one of its one-shot and two-shot."""
    return {
        cell: {name: min(us[key] for key in us if key.startswith(name)) for name in {key.split()[0] for key in us}}
        for cell, us in shots(rows).items()
    }


def over_best(us: dict[str, float]) -> float:
    return us["triton"] / min(us[name] for name in us if name != "triton")


def gains() -> list[str]:
    """Ours against every rival of the same run, losses included."""
    lines = head("N", "T", "ours", "ours, residual sent back", *RIVALS.values(), "ours / best other")
    for size, all_rows in GAINS.items():
        rows_of = load(f"rivals_n{size}.json")["rows"]
        cells, paths = best_of(rows_of), shots(rows_of)
        for rows in all_rows:
            us = cells[4096, rows]
            back = min(paths[4096, rows][name] for name in list(PATHS)[:2])
            times = " | ".join(f"{one:.1f}" for one in (us["triton"], back, *(us[name] for name in RIVALS)))
            lines.append(f"| {size} | {rows} | {times} | {over_best(us):.2f} |")
    return lines


def rivals() -> list[str]:
    """A part of the cells; `host` was imported from another run."""
    lines = head("N", "H", "T", *PATHS.values(), *RIVALS.values(), "ours / best other", "host (imported)")
    for size in (2, 4):
        result = load(f"rivals_n{size}.json")
        paths, host = shots(result["rows"]), shots(result["imported"]["rows"])
        for (hidden, rows), us in best_of(result["rows"]).items():
            if hidden in SHOWN["H"] and rows in SHOWN["T"]:
                own = [paths[hidden, rows].get(name, math.nan) for name in PATHS]
                times = " | ".join(f"{one:.1f}" for one in (*own, *(us[name] for name in RIVALS)))
                theirs = host.get((hidden, rows), {}).get("host custom + norm", math.nan)
                last = f"{over_best(us):.2f} | {theirs:.1f}"
                lines.append(f"| {size} | {hidden} | {rows} | {times} | {last} |".replace("nan", "-"))
    return lines


def means() -> list[str]:
    """Geometric means of ours over each rival, and in how many cells ours is the fastest."""
    lines = head("N", "T", "cells", "ours is the fastest in", *(f"ours / {name}" for name in RIVALS.values()))
    for size in (2, 4):
        cells = best_of(load(f"rivals_n{size}.json")["rows"])
        for low, high in ((1, 16), (32, 128), (256, 2048)):
            some = [us for (_, rows), us in cells.items() if low <= rows <= high]
            ratios = " | ".join(f"{mean([us['triton'] / us[name] for us in some]):.2f}" for name in RIVALS)
            ahead = sum(over_best(us) < 1 for us in some)
            lines.append(f"| {size} | {low} to {high} | {len(some)} | {ahead} | {ratios} |")
    return lines


def steps(by_model: bool = False) -> list[str]:
    """How much less time the layers of a decode step take with ours, in percent: least and most over T and models."""
    columns = (f"less than with {name}" for name in STEPS.values())
    lines = head("N", *["model"] * by_model, *columns, "more than with no reduction")
    for size in (2, 4):
        cells = load(f"decode_n{size}.json")["cells"]
        for model in dict.fromkeys(cell["model"] if by_model else "" for cell in cells):
            times = [cell["us"] for cell in cells if model in ("", cell["model"])]
            less = [[100 * (1 - us["ours"] / us[name]) for us in times] for name in STEPS]
            more = [100 * (us["ours"] / us["no reduction"] - 1) for us in times]
            figures = " | ".join(f"{min(some):.1f} to {max(some):.1f} %" for some in (*less, more))
            lines.append(f"| {size} |{f' {model} |' if model else ''} {figures} |")
    return lines


def one_gpu() -> list[str]:
    """Virtual ranks on one H100: Triton / FlashInfer one-shot over all cells of an N."""
    result = load("all_reduce_h100.json")
    lines = head("N", "cells", "Triton / FlashInfer, geometric mean", "worst cell", "best cell")
    for size in (2, 4, 8):
        ratios = [cell["ratio"] for cell in result["cells"] if cell["N"] == size and cell.get("ratio")]
        lines.append(f"| {size} | {len(ratios)} | {mean(ratios):.3f} | {max(ratios):.3f} | {min(ratios):.3f} |")
    return lines


def qk_norm() -> list[str]:
    """q and k norm on one H100, buffers beyond the L2 cache: against FastDeploy's kernel, and of the copy's rate."""
    result = load("qk_norm_h100.json")
    lines = head("heads", "T", "us", "FastDeploy's kernel us", "times faster", "% of copy")
    for cell in result["cells"]:
        if cell["way"] == "cold" and cell["T"] in (1, 64, 512, 2048, 16384) and cell["q"] in (32, 16, 96):
            share = 100 * cell["bytes"] / cell["us"] / 1e3 / result["copy_gbps"]
            faster = cell["reference_us"] / cell["us"]
            times = f"{cell['us']:.2f} | {cell['reference_us']:.2f} | {faster:.2f}"
            lines.append(f"| {cell['q']}/{cell['kv']} | {cell['T']} | {times} | {share:.0f} |")
    return lines


README = {"gains": gains, "steps": steps}  # README.md and README.zh.md
TABLES = {  # README.md beside this script
    "means": means,
    "rivals": rivals,
    "steps-by-model": partial(steps, by_model=True),
    "one-gpu": one_gpu,
    "qk-norm": qk_norm,
}


if __name__ == "__main__":
    for title, table in {**README, **TABLES}.items():
        print(f"\n{title}\n", *table(), sep="\n")
