"""`python -m fd_fusion doctor`: check this machine, whether fusion can run on it, and what to do if it cannot.

Ends with one launch of the fused kernel on every rank, compared with the reference. Exit code: 0 fusion works, 1 only
the unfused path works, 2 something is broken.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from fd_fusion import __version__
from fd_fusion.cli.doctor import child as doctor_child
from fd_fusion.cli.doctor.checks import STATES, CheckResult, of_reason, result, run_checks
from fd_fusion.cli.doctor.machine import machine
from fd_fusion.cli.doctor.packages import packages
from fd_fusion.cli.messages import Parser, progress_line, to_json
from fd_fusion.cli.processes.ranks import RanksFailed, run_ranks
from fd_fusion.cli.processes.signals import ending_well
from fd_fusion.config import resolve

VERDICTS = {"works": 0, "unfused": 1, "broken": 2}


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.nproc not in range(1, 9):
        _parser().error(f"--nproc {args.nproc}: give 1 to 8")
    with ending_well(), progress_line("checking packages") as show:
        results = find(args.nproc, launch=not args.no_run, show=show)
    outcome = judge(results)
    print(to_json(outcome, 2) if args.json else "\n".join(lines(outcome)))
    return outcome["exit_code"]


def _parser() -> Parser:
    parser = Parser(
        prog="fd-fusion doctor",
        description=__doc__.partition("\n")[0],
        epilog="exit code: 0 fusion works on this machine, 1 only the unfused path works, 2 something is broken",
    )
    parser.add_json()
    parser.add_argument("--nproc", type=int, default=2, help="ranks of the launch (default: 2)")
    parser.add_argument("--no-run", action="store_true", help="leave the launch of the fused kernel out")
    return parser


def find(size: int, *, launch: bool, show: Callable[[str], None] = lambda text: None) -> list[CheckResult]:
    """Run all checks, topic by topic; imports in child processes, at the same time. `show` gets the topic, n of m."""
    found = run_checks("packages", packages)
    installed = {one.name for one in found if one.state in ("ok", "warn")}
    topics = {"machine": partial(run_checks, "machine", machine), "config": partial(run_checks, "config", config)}
    with contextlib.ExitStack() as stack:
        topics["framework"] = stack.enter_context(doctor_child.asking("framework", size))
        for name in ("flashinfer", "fastdeploy"):
            if name in installed:
                topics[name] = stack.enter_context(doctor_child.asking(name))
        if launch and size > 1:
            topics["launch"] = lambda: run_checks("launch", lambda: _launch(size, found, show), "broken")
        for number, (topic, check) in enumerate(topics.items(), 1):
            show(f"checking {topic}, {number} of {len(topics)}")
            found += check()
    return found


def config() -> Iterator[CheckResult]:
    """Check which source of the configuration wins in this shell."""
    try:
        resolved = resolve()
    except ValueError as error:
        yield result("source", "broken", str(error), "fix the variable, or unset it")
        return
    if resolved.config is None:
        state = "off" if resolved.reason.code == "kill_switch" else "note"
        yield of_reason("source", state, resolved.reason, source=resolved.source)
        return
    data = {"source": resolved.source, "config": resolved.config.to_dict()}
    yield result("source", "ok", f"asked for by {data['source']}: {data['config']}", **data)
    yield from _plugin(os.environ.get("FD_PLUGINS"))


def _plugin(allowed: str | None) -> Iterator[CheckResult]:
    """Check whether a FastDeploy that is started from this shell, without `serve`, would load the plugin."""
    if "fd_fusion" in (allowed or "").split(","):
        return
    names = ",".join(name for name in (allowed, "fd_fusion") if name)
    remedy = f"for FastDeploy set FD_PLUGINS={names}, or start it by `python -m fd_fusion serve`, which sets it"
    state, text = "off", f"FD_PLUGINS={allowed!r} keeps fd_fusion out of FastDeploy"
    if allowed is None:
        state, text = "warn", "FD_PLUGINS is unset: newer FastDeploys load no plugin then"
    yield result("plugin", state, text, remedy)


def _launch(size: int, found: list[CheckResult], show: Callable[[str], None]) -> Iterator[CheckResult]:
    """Launch the kernel once on every rank and verify it, as real processes; on a CPU under Triton's interpreter."""
    working = {(one.topic, one.name): one for one in found if one.state == "ok"}
    framework = working.get(("framework", "import"))
    if framework is None or ("backends", "triton") not in working:
        who = "triton backend refused" if framework else "framework does not work"
        yield result("triton", "note", f"not tried: the {who}")
        return
    device, gpus = framework.data["device"], min(size, framework.data["gpus"])
    env = {"TRITON_INTERPRET": "1"} if device == "cpu" else {"CUDA_MODULE_LOADING": "EAGER"}
    where = f"{size} ranks " + ("under the interpreter" if device == "cpu" else f"on {gpus} GPU{'s' * (gpus > 1)}")
    what, calls = f"launching the kernel on {size} ranks", len(doctor_child.LAUNCHED_ROWS[device])
    how = {"timeout_s": 300, "env": env, "watch": lambda done: show(f"{what}, {done} of {calls} calls")}
    try:
        ranks = run_ranks("doctor.rank", size, {}, **how)
    except RanksFailed as error:
        remedy = "fix what the sentence names; with `--no-run` this step is left out"
        yield result("triton", "broken", f"{where}: {error}", remedy, log=error.log)
        return
    yield _verified(ranks, where, device)


def _verified(ranks: list[dict[str, Any]], where: str, device: str) -> CheckResult:
    worst, opened_s = (max(one[key] for one in ranks) for key in ("worst", "opened_s"))
    same, counted = len({one["digest"] for one in ranks}) == 1, all(one["counted"] for one in ranks)
    data = {"ranks": len(ranks), "device": device, "error_over_budget": worst, "bit_equal": same}
    data["counted_on_device"] = counted
    faults = {
        f"error {worst:.2f} of its budget": not worst <= 1,
        "the ranks' bits differ": not same,
        "the device did not count the rows of the calls": not counted,
    }
    if fault := next((text for text, there in faults.items() if there), None):
        remedy = "do not use fusion on this machine; report it with this output"
        return result("triton", "broken", f"{where}: wrong numbers: {fault}", remedy, **data)
    right = f"right numbers (error {worst:.2f} of its budget), same bits"
    return result("triton", "ok", f"{where}: {right}; opened in {opened_s:.1f} s", **data)


def judge(results: list[CheckResult]) -> dict[str, Any]:
    """Return the verdict as data. Keys and codes are stable; new checks may be added."""
    broken, off, warned = ([one for one in results if one.state == state] for state in ("broken", "off", "warn"))
    if broken:
        verdict, sentence = "broken", f"broken: {broken[0].text}"
    elif off:
        verdict, sentence = "unfused", f"only the unfused path works on this machine: {off[0].text}"
    else:
        verdict, sentence = "works", "fusion works on this machine"
        if any(one.topic == "framework" and one.data.get("device") == "cpu" for one in results):
            sentence += ", by the interpreter: there is no GPU, so nothing is gained"
        if not any(one.topic == "launch" and one.state == "ok" for one in results):
            sentence += "; nothing was launched"
    return {
        "schema": 1,
        "fd_fusion": __version__,
        "verdict": verdict,
        "exit_code": VERDICTS[verdict],
        "sentence": sentence,
        "todo": list(dict.fromkeys(one.remedy for one in [*broken, *off, *warned] if one.remedy)),
        "checks": [asdict(one) for one in results],
    }


def lines(outcome: dict[str, Any]) -> list[str]:
    """Return the report for people."""
    out, topic = [f"fd_fusion {outcome['fd_fusion']} doctor"], None
    for one in outcome["checks"]:
        if one["topic"] != topic:
            topic = one["topic"]
            out += ["", topic]
        out.append(f"  {STATES[one['state']]} {one['text']}")
        if one["remedy"] and one["state"] in ("warn", "off", "broken"):
            out.append(f"       -> {one['remedy']}")
        if one["data"].get("log"):
            out += [f"       | {line}" for line in one["data"]["log"].splitlines()]
    out += ["", f"verdict: {outcome['sentence']}"]
    out += [f"what to do: {remedy}" for remedy in outcome["todo"]] or ["what to do: nothing"]
    return out
