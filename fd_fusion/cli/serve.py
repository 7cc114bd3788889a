"""`python -m fd_fusion serve --fusion-config '<json>' <the api server's own arguments>`: FastDeploy with fusion on.

No patch of the host is needed: our argument is taken out, put into the environment, which the host hands on to every
rank, and the host's api server is run with the rest. A line of the ranks' log has the outcome; this command
shows that line, or warns when none comes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from fd_fusion.cli.messages import Parser, say
from fd_fusion.cli.processes.signals import not_ignored
from fd_fusion.cli.processes.tied import PARENT
from fd_fusion.config import ENV_CONFIG, ENV_DISABLE, FusionConfig, resolve
from fd_fusion.hosts.fastdeploy.log import ENV_RUN, mark_of
from fd_fusion.hosts.fastdeploy.plugin import ENV_SOURCE
from fd_fusion.reasons import because

SERVER = "fastdeploy.entrypoints.openai.api_server"
PLUGIN = "fd_fusion"
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_DRAFT = str(because("draft_model", model=""))
_OUTCOME = re.compile(r"fd_fusion \S+: (?:\w+: )?(?P<outcome>\d+ sites?\b.*|off: .*)")


def main(argv: list[str]) -> int:
    """Run the api server. Returns its exit code; 2 for a malformed config or a missing package."""
    ours, rest = _parser().parse_known_args(argv)
    try:
        env = environment(os.environ, ours.fusion_config)
    except ValueError as error:
        return say(error, 2)
    if importlib.util.find_spec("fastdeploy") is None:
        return say("FastDeploy is not installed; install it first, then fd_fusion with pip install --no-deps", 2)
    if PLUGIN not in _plugin_names():
        return say(
            "fd_fusion is importable but not installed, so FastDeploy cannot see it: pip install --no-deps .", 2
        )
    log = Path(env.get("FD_LOG_DIR", "log")) / "fd_fusion.log"
    # FastDeploy makes a file a day, and the name a link to it: lines of before are in that file.
    before = {log.resolve(): log.stat().st_size} if log.exists() else {}
    run = f"{os.getpid()}-{time.time_ns() // 10**6:x}"
    server = _start(rest, {**env, ENV_RUN: run})
    how = (log, before, server, ours.bound_within_s, mark_of(run))
    watcher = threading.Thread(target=_watch, args=how, daemon=True)
    if resolve(environ=env).source == ENV_DISABLE:
        say(f"off: {ENV_DISABLE} is set")
    else:
        watcher.start()
    code = server.wait()
    if watcher.is_alive():
        watcher.join(timeout=1)
    return code if code >= 0 else 128 - code  # as a shell does for a signal


def _start(argv: list[str], env: dict[str, str]) -> subprocess.Popen:
    """Start the api server, which gets our signals once, and is asked to end where this process is killed.

    It has a session of its own, so that a terminal's Ctrl-C comes to us alone. A second one would end it at once,
    with requests under way.
    """
    numbers = not_ignored(*_PASSED_ON)
    early: list[int] = []  # signals that came before there was a server
    for number in numbers:
        signal.signal(number, lambda got, _: early.append(got))
    command = [sys.executable, "-m", "fd_fusion.cli.processes.tied", "--term", sys.executable, "-m", SERVER, *argv]
    server = subprocess.Popen(command, env={**env, PARENT: str(os.getpid())}, start_new_session=True)
    for number in numbers:
        signal.signal(number, lambda got, _: server.send_signal(got))
    for number in early:
        server.send_signal(number)
    return server


def environment(environ: Mapping[str, str], fusion_config: str | None) -> dict[str, str]:
    """Return the server's environment: the config and its source, and the plugins that FastDeploy may load.

    One version of FastDeploy loads every plugin when FD_PLUGINS is unset, another loads none. So that no other
    plugin is lost, an unset one becomes the name of every installed plugin, and a set one gets ours.
    Raises: ValueError: a malformed config.
    """
    env = dict(environ)
    if fusion_config is not None:
        FusionConfig.from_json(fusion_config)
        env[ENV_CONFIG], env[ENV_SOURCE] = fusion_config, "--fusion-config"
    allowed = env.get("FD_PLUGINS")
    names = _plugin_names() if allowed is None else allowed.split(",")
    env["FD_PLUGINS"] = ",".join(dict.fromkeys([*(name for name in names if name), PLUGIN]))
    return env


def outcome(lines: list[str]) -> str | None:
    """Return the outcome in the lines of fd_fusion.log: the last one that a rank wrote.

    A draft model is loaded, with a line that it is off, before the model itself is bound.
    """
    found = [match["outcome"] for match in map(_OUTCOME.search, lines) if match and _DRAFT not in match["outcome"]]
    return found[-1] if found else None


def _plugin_names() -> list[str]:
    points = (point for package in distributions() for point in package.entry_points)
    return sorted({point.name for point in points if point.group.startswith("fastdeploy.")})


def _watch(log: Path, before: Mapping[Path, int], server: subprocess.Popen, within_s: float, mark: str = "") -> None:
    """Wait for the outcome in `log`, behind the first `before` bytes of a file that was there already.

    Another server may write to it too: only lines that end with `mark` are ours.
    """
    deadline = time.monotonic() + within_s
    while server.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # not yet, or a rank is putting the link anew
            with open(file := log.resolve(), errors="replace") as lines:
                lines.seek(before.get(file, 0))
                ours = [line.removesuffix(mark) for line in lines.read().splitlines() if line.endswith(mark)]
                line = outcome(ours)
            if line:
                say(line if line.startswith("off") else f"on: {line}")
                return
        if time.monotonic() > deadline:
            say(
                f"warning: no rank has logged within {within_s:g} s whether fusion is on. Search for 'fd_fusion' in "
                f"{log} and in workerlog.0 beside it; FD_PLUGINS must hold {PLUGIN!r} where the ranks run"
            )
            return
        time.sleep(0.2)


def _parser() -> Parser:
    parser = Parser(
        prog="fd-fusion serve",
        description="Run FastDeploy's api server with fusion on. Every other argument is handed on to it.",
        epilog=f"Without --fusion-config, {ENV_CONFIG} decides. Roll back: run the api server itself, without this "
        "command, or set FD_FUSION_DISABLE=1.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--fusion-config", "--fusion_config", metavar="JSON", help="""for example '{}' or '{"backend": "triton"}'"""
    )
    parser.add_argument(
        "--bound-within-s",
        type=float,
        default=1800,
        metavar="S",
        help="warn if no rank has logged by then whether fusion is on (default: %(default)g)",
    )
    return parser
