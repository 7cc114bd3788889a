"""The table and the plot of `python examples/bench all-reduce`, from its JSON alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

GOALS = {2: 0.72, 4: 0.85, 8: 0.95}  # geometric mean of the ratio to FlashInfer's one-shot, by N


def ratios(result: dict[str, Any], size: int) -> list[float]:
    """Of the one-shot cells of N = size: our time over that of the fastest right build of FlashInfer."""
    return [cell["ratio"] for cell in result["cells"] if cell["N"] == size and "ratio" in cell]


def tables(result: dict[str, Any]) -> str:
    """Markdown: a table of goals, then every cell."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['device']}, {versions}, commit {result['commit']}, {result['date']}; `{result['command']}`.",
        "",
        "| N | cells | geometric mean of the ratio | goal | slowest cell |",
        "|---|---|---|---|---|",
    ]
    for size in sorted({cell["N"] for cell in result["cells"]}):
        if logs := [math.log(ratio) for ratio in ratios(result, size)]:
            mean = math.exp(sum(logs) / len(logs))
            lines.append(f"| {size} | {len(logs)} | {mean:.3f} | {GOALS.get(size, '')} | {math.exp(max(logs)):.3f} |")
    lines += ["", *_cells(result["cells"])]
    if "failed" in result:
        lines += ["", f"Did not end well, by N: {result['failed']}"]
    return "\n".join(lines)


def _cells(cells: list[dict[str, Any]]) -> list[str]:
    lines = ["| N | T | H | kernel | us | flushed us | KB pushed | wire us | ratio |", "|" + "---|" * 9]
    for cell in cells:
        for name, got in cell["kernels"].items():
            ratio = cell.get("ratio", "") if name == "triton" else ""
            times = got.get("us", "wrong"), got.get("flushed_us", "wrong")
            row = (cell["N"], cell["T"], cell["H"], name, *times, got["pushed_bytes"] >> 10, got["wire_us"], ratio)
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """Ratio over T, a panel for each N and a line for each H."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({cell["N"] for cell in result["cells"]})
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(4 * len(sizes), 3.5), sharey=True, squeeze=False)
    for size, panel in zip(sizes, panels[0]):
        cells = [cell for cell in result["cells"] if cell["N"] == size and "ratio" in cell]
        for hidden in sorted({cell["H"] for cell in cells}):
            line = [(cell["T"], cell["ratio"]) for cell in cells if cell["H"] == hidden]
            panel.plot(*zip(*line), marker="o", markersize=3, label=f"H={hidden}")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=f"N={size}", xlabel="T", ylim=(0.5, 1.1))
        panel.set_xscale("log", base=2)
        rows = sorted({cell["T"] for cell in cells})
        panel.set_xticks(rows, rows)
    panels[0][0].set_ylabel("time / FlashInfer one-shot")
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(f"Fused all-reduce + RMSNorm, virtual ranks on one {result['device']}, bf16", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
