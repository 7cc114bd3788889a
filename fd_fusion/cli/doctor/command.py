"""`python -m fd_fusion doctor`: check this machine, whether fusion can run on it, and what to do if it cannot.

Ends with one launch of the fused kernel on every rank, compared with the reference. Exit code: 0 fusion works, 1 only
the unfused path works, 2 something is broken.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from fd_fusion import __version__
from fd_fusion.cli.doctor import child as doctor_child
from fd_fusion.cli.doctor.checks import CheckResult, of_reason, run_checks
from fd_fusion.cli.doctor.machine import machine
from fd_fusion.cli.doctor.packages import packages
from fd_fusion.cli.messages import Parser, progress_line, to_json
from fd_fusion.cli.processes.ranks import RanksFailed, run_ranks
from fd_fusion.cli.processes.signals import ending_well
from fd_fusion.config import resolve

VERDICTS = {"works": 0, "unfused": 1, "broken": 2}
_SIGNS = {"ok": "ok  ", "note": "-   ", "warn": "WARN", "off": "OFF ", "broken": "BAD "}


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
    present = {one.name: one.state in ("ok", "warn") for one in found}
    children = ["framework", *(name for name in ("flashinfer", "fastdeploy") if present.get(name))]
    topics = ["machine", "config", *children, *["launch"] * (launch and size > 1)]

    def start(topic: str) -> str:
        show(f"checking {topic}, {1 + topics.index(topic)} of {len(topics)}")
        return topic

    with contextlib.ExitStack() as stack:
        sizes = [[size] if name == "framework" else [] for name in children]
        asked = [stack.enter_context(doctor_child.asking(name, *more)) for name, more in zip(children, sizes)]
        found += run_checks(start("machine"), machine)
        found += run_checks(start("config"), config)
        for name, answer in zip(children, asked):
            start(name)
            found += answer()
    if "launch" in topics:
        found += run_checks(start("launch"), lambda: _launch(size, found, show), "broken")
    return found


def config() -> Iterator[CheckResult]:
    """Check which source of the configuration wins in this shell."""
    try:
        resolved = resolve()
    except ValueError as error:
        yield CheckResult("config", "source", "broken", str(error), "fix the variable, or unset it")
        return
    if resolved.config is not None:
        data = {"source": resolved.source, "config": resolved.config.to_dict()}
        yield CheckResult(
            "config", "source", "ok", f"asked for by {resolved.source}: {resolved.config.to_dict()}", data=data
        )
        yield from _plugin(os.environ.get("FD_PLUGINS"))
    else:
        state = "off" if resolved.reason.code == "kill_switch" else "note"
        yield of_reason("config", "source", state, resolved.reason, source=resolved.source)


def _plugin(allowed: str | None) -> Iterator[CheckResult]:
    """Check whether a FastDeploy that is started from this shell, without `serve`, would load the plugin."""
    if "fd_fusion" in (allowed or "").split(","):
        return
    names = ",".join(name for name in (allowed, "fd_fusion") if name)
    remedy = f"for FastDeploy set FD_PLUGINS={names}, or start it by `python -m fd_fusion serve`, which sets it"
    if allowed is None:
        yield CheckResult(
            "config", "plugin", "warn", "FD_PLUGINS is unset: newer FastDeploys load no plugin then", remedy
        )
    else:
        yield CheckResult(
            "config", "plugin", "off", f"FD_PLUGINS={allowed!r} keeps fd_fusion out of FastDeploy", remedy
        )


def _launch(size: int, found: list[CheckResult], show: Callable[[str], None]) -> Iterator[CheckResult]:
    """Launch the kernel once on every rank and verify it, as real processes; on a CPU under Triton's interpreter."""
    by_name = {(one.topic, one.name): one for one in found}
    framework, triton = by_name.get(("framework", "import")), by_name.get(("backends", "triton"))
    if framework is None or framework.state != "ok" or triton is None or triton.state != "ok":
        who = "triton backend refused" if framework and framework.state == "ok" else "framework does not work"
        yield CheckResult("launch", "triton", "note", f"not tried: the {who}")
        return
    device = framework.data["device"]
    env = {"TRITON_INTERPRET": "1"} if device == "cpu" else {"CUDA_MODULE_LOADING": "EAGER"}
    gpus = min(size, framework.data["gpus"])
    where = "under the interpreter" if device == "cpu" else f"on {gpus} GPU{'s' * (gpus > 1)}"
    calls = len(doctor_child.LAUNCHED_ROWS[device])

    def watch(done: list[int]) -> bool:
        show(f"launching the kernel on {size} ranks, {min(done)} of {calls} calls")
        return False

    try:
        results = run_ranks("doctor.rank", size, {}, timeout_s=300, env=env, watch=watch)
    except RanksFailed as error:
        remedy = "fix what the sentence names; with `--no-run` this step is left out"
        yield CheckResult("launch", "triton", "broken", f"{size} ranks {where}: {error}", remedy, {"log": error.log})
        return
    worst, digests = max(one["worst"] for one in results), {one["digest"] for one in results}
    counted = all(one["counted"] for one in results)
    data = {"ranks": size, "device": device, "error_over_budget": worst, "bit_equal": len(digests) == 1}
    data["counted_on_device"] = counted
    faults = {
        f"error {worst:.2f} of its budget": not worst <= 1,
        "the ranks' bits differ": len(digests) > 1,
        "the device did not count the rows of the calls": not counted,
    }
    if fault := next((text for text, there in faults.items() if there), None):
        remedy = "do not use fusion on this machine; report it with this output"
        yield CheckResult("launch", "triton", "broken", f"{size} ranks {where}: wrong numbers: {fault}", remedy, data)
        return
    opened = max(one["opened_s"] for one in results)
    text = (
        f"{size} ranks {where}: right numbers (error {worst:.2f} of its budget), same bits; opened in {opened:.1f} s"
    )
    yield CheckResult("launch", "triton", "ok", text, data=data)


def judge(results: list[CheckResult]) -> dict[str, Any]:
    """Return the verdict as data. Keys and codes are stable; new checks may be added."""
    broken = [one for one in results if one.state == "broken"]
    off = [one for one in results if one.state == "off"]
    verdict = "broken" if broken else "unfused" if off else "works"
    on_cpu = any(one.topic == "framework" and one.data.get("device") == "cpu" for one in results)
    works = "fusion works on this machine" + (
        ", by the interpreter: there is no GPU, so nothing is gained" if on_cpu else ""
    )
    launched = any(one.topic == "launch" and one.state == "ok" for one in results)
    works += "" if launched else "; nothing was launched"
    sentence = {
        "works": works,
        "unfused": f"only the unfused path works on this machine: {off[0].text if off else ''}",
        "broken": f"broken: {broken[0].text if broken else ''}",
    }[verdict]
    warned = [one for one in results if one.state == "warn"]
    todo = list(dict.fromkeys(one.remedy for one in [*broken, *off, *warned] if one.remedy))
    return {
        "schema": 1,
        "fd_fusion": __version__,
        "verdict": verdict,
        "exit_code": VERDICTS[verdict],
        "sentence": sentence,
        "todo": todo,
        "checks": [one.to_dict() for one in results],
    }


def lines(outcome: dict[str, Any]) -> list[str]:
    """Return the report for people."""
    out, topic = [f"fd_fusion {outcome['fd_fusion']} doctor"], None
    for one in outcome["checks"]:
        if one["topic"] != topic:
            topic = one["topic"]
            out += ["", topic]
        out.append(f"  {_SIGNS[one['state']]} {one['text']}")
        if one["remedy"] and one["state"] in ("warn", "off", "broken"):
            out.append(f"       -> {one['remedy']}")
        if one["data"].get("log"):
            out += [f"       | {line}" for line in one["data"]["log"].splitlines()]
    out += ["", f"verdict: {outcome['sentence']}"]
    out += [f"what to do: {remedy}" for remedy in outcome["todo"]] or ["what to do: nothing"]
    return out
