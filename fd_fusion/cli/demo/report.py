"""The demo's judgement: what the runs differ by, whether that is within budget, and the lines for people."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from fd_fusion import __version__
from fd_fusion.cli.demo.config import DecoderConfig
from fd_fusion.cli.demo.reference import Truth, difference
from fd_fusion.reasons import TABLE
from fd_fusion.reference import budget

RUNS = ("stock", "bound", "apart")  # the last: bound, quantised behind the kernel
NEAR_TIE = 1e-5  # a gap between router scores that float32 may close


def judge(
    config: DecoderConfig, nproc: int, device: str, truth: Truth, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Compare the ranks' results with each other and with the truth. Everything in the answer is plain data.

    The budget is that of the package's tests: twice the error of a plain float32 run, and one unit in the last place.
    """
    runs = [run for run in RUNS if run in results[0]]
    logits = {run: [_unpack(result[run]["logits"], truth) for result in results] for run in runs}
    largest = float(np.abs(truth.logits).max())
    allowed = float(budget(truth.plain_error, config.dtype, largest)) if np.isfinite(largest) else np.nan
    errors = {run: max(difference(one, truth.logits, config) for one in logits[run]) for run in runs}
    equal = {run: all(one.tobytes() == logits[run][0].tobytes() for one in logits[run]) for run in runs}
    weights = {when: all(result["weights"][when] for result in results) for when in ("bound", "unbound")}
    report = results[0]["report"]
    calls = sum((Counter(site["calls"]) for site in report["sites"]), Counter())
    outcome = {
        "version": __version__,
        "nproc": nproc,
        "device": device,
        "decoder": dataclasses.asdict(config),
        "report": report,
        "calls": dict(calls),
        "difference": {**errors, "plain": truth.plain_error},
        "budget": allowed,
        "step_ms": {run: max(float(np.median(result[run]["ms"][1:])) for result in results) for run in runs},
        "prefill_ms": {run: max(result[run]["ms"][0] for result in results) for run in runs},
        "ranks_bit_equal": equal,
        "weights_unchanged": weights,
        "router_margin": truth.margin if np.isfinite(truth.margin) else None,
    }
    if config.quantised:
        outcome["same_apart"] = logits["bound"][0].tobytes() == logits["apart"][0].tobytes()
    return {**outcome, "agree": not _faults(outcome)}


def _unpack(text: str, truth: Truth) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.float32).reshape(truth.logits.shape)


def lines(outcome: dict[str, Any]) -> list[str]:
    """Return the lines that the demo prints."""
    faults = _faults(outcome)
    return [
        _headline(outcome["decoder"], outcome["nproc"], outcome["device"]),
        "",
        *_sites(outcome["report"]),
        "",
        *_numbers(outcome),
        "",
        f"verdict: the numbers do not agree: {'; '.join(faults)}" if faults else "verdict: the numbers agree",
    ]


def _headline(decoder: dict[str, Any], nproc: int, device: str) -> str:
    dense = min(decoder["first_k_dense_replace"], decoder["num_hidden_layers"])
    moe = decoder["num_hidden_layers"] - dense
    dtype = "FP8 and bfloat16" if decoder["quantised"] else "float32"
    return (
        f"{nproc} rank{'s' * (nproc > 1)}, {dtype} on {device.upper()}: {dense} dense and {moe} MoE "
        f"layers, H={decoder['hidden_size']}, {decoder['num_attention_heads']} heads, "
        f"{decoder['num_key_value_heads']} kv heads of {decoder['head_dim']}, {decoder['n_routed_experts']} experts, "
        f"top {decoder['num_experts_per_tok']}; embedding, router and lm_head whole on every rank"
    )


def _sites(report: dict[str, Any]) -> list[str]:
    """Return one line a pair: its backend and limit, or why it is off; and one for the q and k norms."""
    rows = []
    for site in report["sites"]:
        limit = "any number of rows" if site["limit"] is None else f"up to {site['limit']} rows"
        rows.append((site["name"], site["backend"], limit))
    rows += [(one["name"], "stock", _why(one["reason"])) for one in report["rejected"]]
    if report["off"]:
        rows.append(("every pair", "stock", f"{report['off']['text']}; {report['off']['remedy']}"))
    width = max(len(name) for name, _, _ in rows)
    norms = Counter(("triton", "one kernel") for _ in report["qk_fused"])
    norms.update(("stock", f"{why['text']}; {why['remedy']}") for why in report["qk_stock"].values())
    lines = [f"site  {name:<{width}}  {backend:<10}  {rest}" for name, backend, rest in rows]
    return lines + [f"norm  {f'{n} of q and k':<{width}}  {by:<10}  {how}" for (by, how), n in norms.items()]


def _why(reason: dict[str, Any]) -> str:
    remedy = reason["remedy"]
    return reason["text"] + ("" if remedy == TABLE["one_rank"].remedy else f"; {remedy}")


def _numbers(outcome: dict[str, Any]) -> list[str]:
    error, equal = outcome["difference"], outcome["ranks_bit_equal"]
    out = [f"{'run':<12}{'|logits - fp64|':>16}  {'prefill ms':>10}  {'a step ms':>9}  same bits on all ranks"]
    for run in equal:
        times = f"{outcome['prefill_ms'][run]:>10.2f}  {outcome['step_ms'][run]:>9.2f}"
        out.append(f"{run:<12}{error[run]:>16.2e}  {times}  {_yes(equal[run])}")
    plain = f"one process, NumPy; the budget is {outcome['budget']:.2e}"
    calls = ", ".join(f"{code} {count}" for code, count in sorted(outcome["calls"].items())) or "none 0"
    same, margin = outcome["weights_unchanged"], outcome["router_margin"]
    out += [
        f"{'plain bf16' if 'same_apart' in outcome else 'plain fp32':<12}{error['plain']:>16.2e}  {plain}",
        f"calls finished: {calls}",
        f"weights: same keys and bits bound: {_yes(same['bound'])}, unbound again: {_yes(same['unbound'])}",
    ]
    if "same_apart" in outcome:
        in_kernel = any(site["fp8"] not in (None, "apart") for site in outcome["report"]["sites"])
        bits = f"quantised in the kernel, and apart from it: same bits: {_yes(outcome['same_apart'])}"
        out.append(f"{bits if in_kernel else 'quantised in no kernel'}; errors are those of the median token")
    elif margin is not None:
        near = " - so near a tie that float32 may route otherwise; try another --seed" if margin < NEAR_TIE else ""
        out.append(f"router: smallest gap between a chosen expert and the next is {margin:.1e}{near}")
    return out


def _yes(flag: bool) -> str:
    return "yes" if flag else "NO"


def _faults(outcome: dict[str, Any]) -> list[str]:
    """Return why the numbers do not agree. With a budget that is no number, nothing agrees."""
    if not np.isfinite(outcome["budget"]):
        return ["the exact result, or the same in float32, holds NaN or Inf; check the weights"]
    equal, error = outcome["ranks_bit_equal"], outcome["difference"]
    faults = [f"the {run} run is out of budget" for run in equal if not error[run] <= outcome["budget"]]
    faults += [f"the ranks' bits differ in the {run} run" for run, same in equal.items() if not same]
    if not outcome.get("same_apart", True):
        faults += ["quantised behind the kernel, the bits are others than quantised in it"]
    return faults + [
        f"weights changed when {when}" for when, same in outcome["weights_unchanged"].items() if not same
    ]
