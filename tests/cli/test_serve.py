"""`fd_fusion serve` and the contract host's api server: argument, environment, plugin, profile, tokens, SIGTERM."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from support.processes import alive
from support.segments import left, none_left

from fd_fusion.cli import serve
from fd_fusion.config import ENV_CONFIG
from fd_fusion.hosts.fastdeploy import log as fastdeploy_log
from fd_fusion.hosts.fastdeploy.log import mark_of
from fd_fusion.reasons import because

HERE = Path(__file__).parents[1]
ENTRY_POINTS = (
    "[fastdeploy.model_register_plugins]\n"
    "fd_fusion = fd_fusion.hosts.fastdeploy.plugin:register\n"
    "[fastdeploy.reasoning_parser_plugins]\nsomebody = somebody:parser\n"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder in which fd_fusion, and somebody else's plugin, look installed."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "fd_fusion-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fd_fusion\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two models: of three layers, and under `small` of one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    code = (
        "import sys; from hosting import write_checkpoint; write_checkpoint(sys.argv[1], 'Glm4MoeForCausalLM'); "
        "write_checkpoint(sys.argv[1] + '/small', 'Qwen2ForCausalLM', num_hidden_layers=1)"
    )
    env = {**os.environ, "PYTHONPATH": f"{HERE / 'host'}", "FD_LOG_DIR": str(folder)}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)], check=True, env=env, capture_output=True
    )
    return folder


def run(command, site, folder, timeout_s=90, **variables):
    """(exit code, stderr) of a server that logs under `folder`."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (site, HERE.parent, HERE / "host"))),
        "FD_LOG_DIR": str(folder),
        "PADDLE_DISTRI_BACKEND": "gloo",
        "PYTHONWARNINGS": "ignore",
        **variables,
    }
    with subprocess.Popen(
        [sys.executable, *command], env=env, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            _, err = server.communicate(timeout=timeout_s)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
    return server.returncode, err


def tokens_of(folder):
    return [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stock_tokens(site, checkpoint, tmp_path_factory):
    """What the host says without us: installed, but not asked for."""
    folder = tmp_path_factory.mktemp("stock")
    code, err = run(["-m", serve.SERVER, "--model", checkpoint, "--tensor-parallel-size", "2"], site, folder)
    assert code == 0, err
    assert not (folder / "fd_fusion.log").exists(), "nobody asked, so nothing is said"
    return tokens_of(folder)


SERVE = ["-m", "fd_fusion", "serve"]


def test_serve_turns_fusion_on(site, checkpoint, stock_tokens, tmp_path):
    """No plugin is loaded unless FD_PLUGINS names it; the flag says no and the config says yes; then SIGTERM."""
    config = '{"timeout_s": 20}'
    command = [*SERVE, "--fusion-config", config, "--model", checkpoint, "--tensor-parallel-size", "2"]
    before = left()
    code, err = run(
        [*command, "--num-gpu-blocks-override", "9"],
        site,
        tmp_path,
        HOST_UNSET_PLUGINS="none",
        HOST_LAZY_MODELS="1",
        HOST_PUBLISHES_IN_POST_PROCESS="1",
    )
    assert code == 0, err + "".join(log.read_text()[-3000:] for log in tmp_path.glob("workerlog.0"))
    log = (tmp_path / "fd_fusion.log").read_text()
    assert "fd_fusion: on: 6 sites, paddle" in err and "config from --fusion-config" in err, err + log
    assert tokens_of(tmp_path) == stock_tokens
    assert none_left(before), "nothing is left in shared memory"


def test_killed_ranks_leave_nothing(site, checkpoint, tmp_path):
    """The engine ends its ranks by SIGTERM to their process group: no atexit, no hang, nothing left."""
    command = ["-m", serve.SERVER, "--model", checkpoint / "small", "--tensor-parallel-size", "2"]
    command += ["--stop-after-steps", "3"]
    before = left()
    variables = {
        "HOST_LINGER": "1",
        "FD_FUSION_CONFIG": '{"backend": "triton", "max_token_num": 4}',
        "TRITON_INTERPRET": "1",
    }
    run(command, site, tmp_path, FD_PLUGINS="fd_fusion", **variables)  # its own time limit says that nothing hangs
    assert "2 sites, triton" in (tmp_path / "fd_fusion.log").read_text() and len(tokens_of(tmp_path)) == 3
    pids = [int(file.read_text()) for file in tmp_path.glob("pid.*")]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a rank outlived SIGTERM"
        time.sleep(0.1)
    assert none_left(before)


def test_the_environment(monkeypatch, site):
    monkeypatch.syspath_prepend(str(site))
    given = {"HOME": "/h"}
    env = serve.environment(given, '{"backend": "triton"}')
    assert json.loads(env[ENV_CONFIG]) == {"backend": "triton"} and env[serve.ENV_SOURCE] == "--fusion-config"
    assert {"fd_fusion", "somebody"} <= set(env["FD_PLUGINS"].split(",")) and given == {"HOME": "/h"}
    assert serve.environment({"FD_PLUGINS": "other"}, None)["FD_PLUGINS"] == "other,fd_fusion"
    assert serve.environment({"FD_PLUGINS": "fd_fusion"}, None)["FD_PLUGINS"] == "fd_fusion"
    assert ENV_CONFIG not in serve.environment({}, None)
    assert serve.environment({ENV_CONFIG: "{}"}, '{"strict": true}')[ENV_CONFIG] == '{"strict": true}'


@pytest.mark.parametrize("config", ["{", '{"no_such": 1}', "[]", '{"backend": "cuda"}'])
def test_a_malformed_config_is_an_error_before_anything_starts(config, capsys):
    assert serve.main(["--fusion-config", config, "--model", "m"]) == 2
    assert capsys.readouterr().err.startswith("fd_fusion: ")


def test_a_missing_host_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    assert serve.main(["--model", "m"]) == 2
    assert "FastDeploy is not installed" in capsys.readouterr().err


def test_outcome():
    head = "INFO 2026-01-01 00:00:00,000 1 "
    assert serve.outcome(["something else"]) is None
    on = "fd_fusion 0.1.0: 94 sites, triton <= 256 rows, workspace 32 MB, group [0..3], config from --fusion-config"
    assert serve.outcome([head + on]).startswith("94 sites, triton")
    off = f"{head}fd_fusion 0.1.0: Glm4MoeForCausalLM: off: FD_FUSION_DISABLE is set"
    assert serve.outcome(["x", off]) == "off: FD_FUSION_DISABLE is set"
    draft = f"{head}fd_fusion 0.1.0: Glm4MTPForCausalLM: off: {because('draft_model', model='Glm4MTPForCausalLM')}"
    assert serve.outcome([draft]) is None, "the model itself is still to be bound"
    assert serve.outcome([head + on, draft]).startswith("94 sites")


class _Server:
    """A server that lives until it is asked `polls` times."""

    def __init__(self, polls):
        self.polls = polls

    def poll(self):
        self.polls -= 1
        return None if self.polls > 0 else 0


def test_the_watcher_tells_two_servers_in_one_folder_apart(tmp_path, capsys):
    log = tmp_path / "fd_fusion.log"
    log.write_text(f"fd_fusion 0.1.0: 92 sites{mark_of('7-a')}\nfd_fusion 0.1.0: 91 sites\n")
    serve._watch(log, {}, _Server(9), 0.05, mark_of("8-a"))
    assert "warning" in capsys.readouterr().err
    with log.open("a") as lines:
        lines.write(
            f"fd_fusion 0.1.0: M: off: here is why{mark_of('8-a')}\nfd_fusion 0.1.0: 90 sites{mark_of('7-a')}\n"
        )
    serve._watch(log, {}, _Server(9), 0.05, mark_of("8-a"))
    assert capsys.readouterr().err == "fd_fusion: off: here is why\n"


@pytest.mark.parametrize("same", [False, True], ids=["passed on", "the very logger"])
def test_a_rank_says_which_server_it_is_of(same, monkeypatch):
    lines = []
    target = fastdeploy_log.logger if same else logging.Logger("of the host")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    utils = types.SimpleNamespace(get_logger=lambda *_: target)
    monkeypatch.setitem(sys.modules, "fastdeploy", types.SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "fastdeploy.utils", utils)
    monkeypatch.setattr(fastdeploy_log.logger, "handlers", [])
    monkeypatch.setattr(fastdeploy_log.logger, "filters", [])
    monkeypatch.setattr(fastdeploy_log.logger, "level", logging.INFO)
    target.addHandler(handler)
    fastdeploy_log.log_to_host()
    fastdeploy_log.logger.warning("%d sites", 3)
    monkeypatch.setenv(fastdeploy_log.ENV_RUN, "7-a")
    fastdeploy_log.log_to_host()
    fastdeploy_log.logger.warning("%d sites", 4)
    fastdeploy_log.logger.warning("fd_fusion metrics %s", "{}")
    assert lines == ["3 sites", "4 sites [server 7-a]", "fd_fusion metrics {}"]


COUNTS = """
import os, signal, time
came = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda got, _: came.append(got))
print(os.getpid(), os.getpgrp(), flush=True)
while not came:
    time.sleep(0.02)
time.sleep(0.2)
print(*map(int, came), flush=True)
"""
SERVES = """
import sys
from fd_fusion.cli import serve
serve.SERVER, serve._plugin_names = "counts", lambda: [serve.PLUGIN]
serve.importlib.util.find_spec = lambda name: name
sys.exit(serve.main([]))
"""


@pytest.mark.parametrize("how", ["a terminal's Ctrl-C", "killed"])
def test_the_server_gets_one_signal(how, tmp_path):
    """A terminal sends SIGINT to every process of its group. Where we are killed, the server is asked to end."""
    (tmp_path / "counts.py").write_text(COUNTS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(HERE.parent)]), "FD_FUSION_DISABLE": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVES], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as ours:
        server, its_group = map(int, ours.stdout.readline().split())
        try:
            assert its_group != ours.pid, "the terminal's own SIGINT would come beside the one that is passed on"
            if how == "killed":
                ours.kill()
            else:
                os.killpg(ours.pid, signal.SIGINT)
            deadline = time.monotonic() + 20
            while alive(server) and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
        out = ours.stdout.read()
    assert out == f"{int(signal.SIGTERM if how == 'killed' else signal.SIGINT)}\n"


def test_the_watcher_warns_when_no_rank_speaks(tmp_path, capsys):
    serve._watch(tmp_path / "fd_fusion.log", {}, _Server(9), within_s=0.05)
    assert "warning: no rank has logged" in capsys.readouterr().err


def test_the_watcher_ignores_lines_of_an_earlier_run(tmp_path, capsys):
    log = tmp_path / "fd_fusion.log"
    log.write_text("fd_fusion 0.1.0: 6 sites, old\n")
    serve._watch(log, {log.resolve(): log.stat().st_size}, _Server(9), within_s=0.05)
    assert "warning" in capsys.readouterr().err


def test_the_watcher_finds_the_file_of_another_day(tmp_path, capsys):
    """The name is a link to the file of the day, and the earlier one was longer."""
    log, earlier, today = (tmp_path / f"fd_fusion.log{day}" for day in ("", ".2026-01-01", ".2026-01-02"))
    earlier.write_text("fd_fusion 0.1.0: 6 sites, old\n" * 9)
    log.symlink_to(earlier.name)
    told = {log.resolve(): log.stat().st_size}
    today.write_text("fd_fusion 0.1.0: 6 sites, new\n")
    log.unlink()
    log.symlink_to(today.name)
    serve._watch(log, told, _Server(9), within_s=0.05)
    assert "on: 6 sites, new" in capsys.readouterr().err
