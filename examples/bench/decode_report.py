"""Figures, tables and the picture of `bench decode`, from its JSON alone. "flashinfer": its one-shot, without PDL."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

ORDER = ("no reduction", "ours", "ours again", "ours, quantised behind", "ours, stock q/k norm", "flashinfer",
         "pull + norm", "symm one-shot + norm", "symm two-shot + norm", "nccl + norm", "gloo + norm")  # fmt: skip
DRAWN = ("ours", "flashinfer", "pull + norm", "nccl + norm")


def paired(us: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """From the times of each way, two a round in the order A B B A: the median by way, and the median of its paired
    differences from `ours` with their 95 % interval."""
    rounds = {name: _by_round(times) for name, times in us.items()}
    more = {}
    for name, times in rounds.items():
        if name != ours:
            more[name] = median_interval([a - b for a, b in zip(times, rounds[ours])])
    return {"us": {name: round(statistics.median(times), 2) for name, times in rounds.items()}, "more": more}


def _by_round(times: list[float]) -> list[float]:
    """The mean of the two times of a round, which lie as far from the middle of the round, one before, one behind."""
    assert len(times) % 2 == 0
    return [(one + two) / 2 for one, two in zip(times[::2], times[1::2])]


def median_interval(values: list[float]) -> list[float]:
    """[median, low, high]: order statistics between which the true median lies with at least 95 %; of too few values
    all of them."""
    ordered, count = sorted(values), len(values)
    outside, below = 0.0, 0
    while below < count // 2:
        outside += math.comb(count, below) / 2 ** (count - 1)
        if outside > 0.05:
            break
        below += 1
    low = max(0, below - 1)
    return [round(value, 2) for value in (statistics.median(ordered), ordered[low], ordered[count - 1 - low])]


def tables(result: dict[str, Any]) -> str:
    """Markdown: the sentence, us a layer by each way, paired differences, tokens."""
    about = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{result['ranks']} x {result['device']}"
    lines = [f"{where}, {about}, commit {result['commit']}, {result['date']}; `{result['command']}`."]
    if result["mode"] == "cpu":
        lines = ["Triton's interpreter on a CPU: a check of the machinery, these times mean nothing."]
    elif result["cells"]:
        lines += ["", sentence(result)]
    lines += ["", *times(result["cells"]), "", *differences(result["cells"]), ""]
    lines += [_tokens(name, one) for name, one in result["tokens"].items()]
    lines += [f"Not measured: {what}" for what in result["without"]]
    return "\n".join(lines + ([f"It did not end well: {result['failed']}"] if "failed" in result else []))


def times(cells: list[dict[str, Any]]) -> list[str]:
    names = [name for name in ORDER if any(name in cell["us"] for cell in cells)]
    lines = ["| model | T | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for cell in cells:
        figures = [f"{cell['us'][name]:.1f}" if name in cell["us"] else "" for name in names]
        lines.append(f"| {cell['model']} | {cell['T']} | " + " | ".join(figures) + " |")
    return lines


def differences(cells: list[dict[str, Any]]) -> list[str]:
    """us a layer more than ours, with the 95 % interval."""
    names = [name for name in ORDER if any(name in cell["more"] for cell in cells)]
    lines = ["| model | T | " + " | ".join(f"{name}, more" for name in names) + " |", "|---" * (len(names) + 2) + "|"]
    for cell in cells:
        shown = [cell["more"].get(name) for name in names]
        figures = ["" if one is None else f"{one[0]:.1f} ({one[1]:.1f} to {one[2]:.1f})" for one in shown]
        lines.append(f"| {cell['model']} | {cell['T']} | " + " | ".join(figures) + " |")
    return lines


def sentence(result: dict[str, Any]) -> str:
    """What a user gains on this machine, and what is left."""
    cells = result["cells"]
    rows = sorted({cell["T"] for cell in cells})
    parts = []
    for name in ("pull + norm", "flashinfer", "nccl + norm"):
        less = [100 * (1 - cell["us"]["ours"] / cell["us"][name]) for cell in cells if name in cell["us"]]
        if less:
            parts.append(f"{min(less):.1f} to {max(less):.1f} % less than with {name}")
    above = [100 * (cell["us"]["ours"] / cell["us"]["no reduction"] - 1) for cell in cells]
    parts += [f"{min(above):.1f} to {max(above):.1f} % more than with no reduction at all"]
    return f"With {rows[0]} to {rows[-1]} sequences the layers of a step take {', and '.join(parts)}."


def _tokens(name: str, one: dict[str, Any]) -> str:
    same = one["same_tokens"] and one["same_bits"] and one["same_on_all_ranks"]
    batches = ", ".join(map(str, one["batches"]))
    verdict = "the same, bit for bit," if same else "NOT the same"
    return (
        f"{name}: {one['steps']} greedy tokens of each sequence are {verdict} when the fused op reduces {batches} of "
        f"{one['batches'][-1]} rows; the GEMMs run all rows each time ({one['different_tokens']} different tokens)."
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """A stacked bar a layer: the model, and on it what the reduction costs by each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = result["cells"]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    measured = sorted({cell["T"] for cell in cells})
    shown = [rows for rows in (1, 16, 64) if rows in measured] or measured[:3]
    size = (3.2 * len(shown), 2.6 * len(models))
    figure, panels = pyplot.subplots(len(models), len(shown), figsize=size, squeeze=False)
    for model, line in zip(models, panels):
        for rows, panel in zip(shown, line):
            for cell in (one for one in cells if (one["model"], one["T"]) == (model, rows)):
                _bars(panel, cell)
            panel.set_title(f"{model}, T={rows}", fontsize=9)
        line[0].set_ylabel("us a layer")
    where = f"{result['ranks']} x {result['device']}, bf16, commit {result['commit']}, {result['date'][:10]}"
    figure.suptitle(f"A decode step: the model (grey), and what its two reductions a layer cost; {where}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _bars(panel: Any, cell: dict[str, Any]) -> None:
    bound = cell["us"]["no reduction"]
    names = [name for name in DRAWN if name in cell["us"]]
    for place, name in enumerate(names):
        cost = cell["us"][name] - bound
        panel.bar(place, bound, color="lightgrey")
        panel.bar(place, max(0, cost), bottom=bound, color="tab:green" if name == "ours" else "tab:red")
        panel.text(place, bound + max(0, cost), f"+{cost:.1f}", ha="center", va="bottom", fontsize=7)
    panel.set_xticks(range(len(names)), [name.replace(" + norm", "\n+ norm") for name in names], fontsize=7)
    panel.set_ylim(0, 1.12 * max(cell["us"][name] for name in names))
