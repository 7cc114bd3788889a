"""The tables and the plot of `python examples/bench qk-norm`, from its JSON alone."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

WAYS = {
    "cold": "Cold: buffers of 256 MiB together",
    "warm": "Warm: 8 buffers, in the L2 cache",
    "gemm": "Gemm: behind the GEMM that makes the input; times less that of the GEMM alone",
}


def tables(result: dict[str, Any]) -> str:
    """Markdown: one table of goals, one of host time, one of every cell for each way."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['device']}, {versions}, commit {result['commit']}, {result['date']}, "
        f"programmatic dependent launch {'on' if result['pdl'] else 'off'}; `{result['command']}`.",
        "",
        f"Device copy of 256 MiB: {result['copy_gbps']:.0f} GB/s, read and written.",
        *_goals(result),
        "",
        "Host us a call: " + ", ".join(f"{name} {us}" for name, us in result["host_us"].items()) + ".",
    ]
    for way in WAYS:
        cells = [cell for cell in result["cells"] if cell["way"] == way]
        if cells:
            lines += ["", f"{WAYS[way]}:", "", *_table(cells, result["copy_gbps"])]
    return "\n".join(lines)


def percent(cell: dict[str, Any], copy_gbps: float, key: str = "us") -> float:
    """Of the rate of the 256 MiB copy."""
    return 100 * cell["bytes"] / cell[key] / 1e3 / copy_gbps


def speed_up(cell: dict[str, Any], key: str = "us") -> float:
    """Against the reference; behind a GEMM of the pairs, whose small difference alone would say little."""
    gemm = cell.get("gemm_us", 0)
    return (gemm + cell["reference_us"]) / (gemm + cell[key])


def _goals(result: dict[str, Any]) -> list[str]:
    if "reference_us" not in result["cells"][0]:
        return []
    lines = [
        "",
        "| way | times faster, T 64-2048 | T < 64 | T > 2048 | slowest cell, ours / reference |",
        "|---|---|---|---|---|",
    ]
    spans = ((64, 2048), (1, 63), (2049, 1 << 30))
    for way, key in itertools.product(WAYS, ("us", "no_pdl_us")):
        cells = [cell for cell in result["cells"] if cell["way"] == way]
        means = []
        for low, high in spans:
            some = [math.log(speed_up(cell, key)) for cell in cells if low <= cell["T"] <= high]
            means.append(f"{math.exp(statistics.mean(some)):.3f}" if some else "")
        worst = min(cells, key=lambda cell, key=key: speed_up(cell, key))
        where = f"{1 / speed_up(worst, key):.3f} ({worst['q']}/{worst['kv']}, T={worst['T']})"
        name = way if key == "us" else f"{way}, without PDL"
        lines.append(f"| {name} | {' | '.join(means)} | {where} |")
    return lines


def _table(cells: list[dict[str, Any]], copy_gbps: float) -> list[str]:
    """A row for each (heads, T)."""
    names = [n for n in ("gemm_us", "us", "no_pdl_us", "reference_us", "touch_us", "same_copy_us") if n in cells[0]]
    compared = "reference_us" in names
    head = [
        "heads",
        "T",
        *(n.replace("touch", "load and store").replace("_us", " us").replace("_", " ") for n in names),
    ]
    rated = ("us", "touch_us") if cells[0]["way"] != "gemm" else ()
    head += (["times faster" if rated else "pair: times faster"] if compared else []) + [
        "% of copy",
        "load and store: % of copy",
    ][: len(rated)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for c in cells:
        row = [f"{c['q']}/{c['kv']}", str(c["T"]), *(f"{c[n]:.2f}" for n in names)]
        row += [f"{speed_up(c):.2f}"] if compared else []
        row += [f"{percent(c, copy_gbps, key):.1f}" for key in rated]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """Two panels: how many times faster than the reference, and percent of the copy rate, by T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    heads = list(dict.fromkeys((cell["q"], cell["kv"]) for cell in result["cells"]))
    for color, (q, kv) in enumerate(heads):
        for way, style in zip(WAYS, ("-", "--", ":")):
            cells = [c for c in result["cells"] if (c["q"], c["kv"], c["way"]) == (q, kv, way)]
            rows = [c["T"] for c in cells]
            look = {"color": f"C{color}", "linestyle": style, "label": f"{q}/{kv} {way}{' pair' * (way == 'gemm')}"}
            if cells and "reference_us" in cells[0]:
                left.plot(rows, [speed_up(c) for c in cells], **look)
            if way == "cold":
                right.plot(rows, [percent(c, result["copy_gbps"]) for c in cells], **look)
                moved = [percent(c, result["copy_gbps"], "touch_us") for c in cells]
                right.plot(rows, moved, color=f"C{color}", linestyle=":", linewidth=1)
    left.axhline(1, color="black", linewidth=0.8)
    left.set(xscale="log", xlabel="T", ylabel="times faster than the reference", title="bf16, D=128, in place")
    right.set(xscale="log", xlabel="T", ylabel="% of the copy rate", title="cold; dotted: loads and stores alone")
    left.legend(fontsize=7, ncol=2)
    right.legend(fontsize=7)
    figure.suptitle(f"{result['device']}, commit {result['commit']}, {result['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
