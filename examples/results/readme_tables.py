"""Print the tables of figures of README.md and of README.md beside this script, from the JSON files here; tests keep
them equal.
"""

import json
import math
from pathlib import Path

HERE = Path(__file__).parent
NVLINK_ROWS = (1, 8, 32, 64, 128, 512)
GAINS = {2: (1, 64, 512), 4: (1, 32, 128, 256, 1024)}  # N -> T, at H = 4096


def load(name: str) -> dict:
    return json.loads((HERE / name).read_text())


def over_nvlink(size: int) -> dict[tuple[int, int], dict[str, float]]:
    """us a call by (H, T) and library, the better one of its one-shot and two-shot."""
    return best_of(f"all_reduce_nvlink_n{size}.json")


def best_of(name: str) -> dict[tuple[int, int], dict[str, float]]:
    """The same of any such file. A name without a norm (`host custom`) is not a rival: it does less."""
    cells: dict[tuple[int, int], dict[str, float]] = {}
    for row in load(name)["rows"]:
        if row["name"] == "host custom":
            continue
        best = cells.setdefault((row["H"], row["T"]), {})
        name = row["name"].split()[0]
        best[name] = min(row["us"], best.get(name, math.inf))
    return cells


def gains() -> list[str]:
    """Ours against every rival that was measured in the same run, losses included, and FlashInfer for two ranks."""
    lines = [
        "| N | T | ours | host | FlashInfer | NCCL | ours / best other |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, all_rows in GAINS.items():
        cells = best_of(f"all_reduce_rivals_n{size}.json")
        for rows in all_rows:
            us = cells[4096, rows]
            if "flashinfer" not in us:  # two ranks: of another run on the same kind of machine
                us["flashinfer"] = over_nvlink(size)[4096, rows]["flashinfer"]
            ratio = us["triton"] / min(us[name] for name in us if name != "triton")
            times = " | ".join(f"{us[name]:.1f}" for name in ("triton", "host", "flashinfer", "nccl"))
            lines.append(f"| {size} | {rows} | {times} | {ratio:.2f} |")
    return lines


def rivals() -> list[str]:
    """All that was measured beside ours on 2026-11-26; a rival that a cell lacks was not timed there."""
    names = ("triton one-shot", "triton two-shot", "host", "symm", "flashinfer", "nccl")
    lines = [
        "| N | H | T | one-shot | two-shot | host | torch symm. memory | FlashInfer | NCCL | ours / best other |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in (2, 4):
        name = f"all_reduce_rivals_n{size}.json"
        paths = {(row["H"], row["T"], row["name"]): row["us"] for row in load(name)["rows"]}
        for (hidden, rows), us in best_of(name).items():
            ours = {path: paths[hidden, rows, path] for path in names[:2] if (hidden, rows, path) in paths}
            times = " | ".join(f"{us[key]:.1f}" if key in us else "-" for key in names[2:])
            ratio = us["triton"] / min(us[key] for key in us if key != "triton")
            shots = " | ".join(f"{ours[path]:.1f}" if path in ours else "-" for path in names[:2])
            lines.append(f"| {size} | {hidden} | {rows} | {shots} | {times} | {ratio:.2f} |")
    return lines


def headline() -> set[str]:
    """The ratios that the text quotes: Triton over FlashInfer and NCCL + norm, geometric means up to T = 16."""
    found = set()
    for size in (2, 4):
        for other in ("flashinfer", "nccl"):
            ratios = [us["triton"] / us[other] for (_, rows), us in over_nvlink(size).items() if rows <= 16]
            found.add(f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}")
    return found


def nvlink() -> list[str]:
    """Processes over NVLink: time of a call, and what is slower is shown too."""
    lines = [
        "| N | H | T | Triton us | FlashInfer us | NCCL + norm us | Triton / best other |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in (2, 4):
        for (hidden, rows), us in over_nvlink(size).items():
            if hidden in (4096, 8192) and rows in NVLINK_ROWS:
                ratio = us["triton"] / min(us["flashinfer"], us["nccl"])
                times = " | ".join(f"{us[name]:.1f}" for name in ("triton", "flashinfer", "nccl"))
                lines.append(f"| {size} | {hidden} | {rows} | {times} | {ratio:.2f} |")
    return lines


def one_gpu() -> list[str]:
    """Virtual ranks on one H100: Triton / FlashInfer one-shot over all cells of an N."""
    result = load("all_reduce_h100.json")
    lines = ["| N | cells | Triton / FlashInfer, geometric mean | worst cell | best cell |", "|---|---|---|---|---|"]
    for size in (2, 4, 8):
        ratios = [cell["ratio"] for cell in result["cells"] if cell["N"] == size and cell.get("ratio")]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"| {size} | {len(ratios)} | {mean:.3f} | {max(ratios):.3f} | {min(ratios):.3f} |")
    return lines


def qk_norm() -> list[str]:
    """q and k norm on one H100, buffers beyond the L2 cache: against FastDeploy's kernel, and of the copy's rate."""
    result = load("qk_norm_h100.json")
    lines = ["| heads | T | us | FastDeploy's kernel us | times faster | % of copy |", "|---|---|---|---|---|---|"]
    for cell in result["cells"]:
        if cell["way"] == "cold" and cell["T"] in (1, 64, 512, 2048, 16384) and cell["q"] in (32, 16, 96):
            share = 100 * cell["bytes"] / cell["us"] / 1e3 / result["copy_gbps"]
            faster = cell["reference_us"] / cell["us"]
            times = f"{cell['us']:.2f} | {cell['reference_us']:.2f} | {faster:.2f}"
            lines.append(f"| {cell['q']}/{cell['kv']} | {cell['T']} | {times} | {share:.0f} |")
    return lines


README = {"gains": gains}  # README.md and README.zh.md
TABLES = {"rivals": rivals, "nvlink": nvlink, "one-gpu": one_gpu, "qk-norm": qk_norm}  # README.md beside this script


if __name__ == "__main__":
    for title, table in {**README, **TABLES}.items():
        print(f"\n{title}\n", *table(), sep="\n")
