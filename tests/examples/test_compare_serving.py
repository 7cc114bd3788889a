"""examples/compare_serving.sh and serve.sh, against a stub server."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = f"{sys.executable} {ROOT / 'tests/host/stub_server.py'}"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def compare(tmp_path, **variables):
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm" / "fd_task_queue_2.sock").touch()  # another server's
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PORT": free_port(),
        "OUT": str(tmp_path / "result.json"),
        "REQUESTS": "12",
        "MAX_TOKENS": "20",
        "START_S": "30",
        "MODEL": "stub",
        "SOCKETS": str(tmp_path / "shm"),
        **variables,
    }
    script = str(ROOT / "examples/compare_serving.sh")
    return subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=90)


def test_on_against_off(tmp_path):
    servers = {"SERVER_OFF": f"{STUB} --delay-ms 3", "SERVER_ON": f"{STUB} --delay-ms 1 --parts-ways"}
    result = compare(tmp_path, **servers, FD_FUSION_TEST_TOKEN="a-secret")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "result.json").read_text()
    assert "a-secret" not in text + result.stdout, "a launcher's log holds the whole environment"
    data = json.loads(text)
    assert [row["concurrency"] for row in data["rows"]] == [1, 8, 64]
    for row in data["rows"]:
        assert row["requests"] == max(12, row["concurrency"])
        assert row["same_texts"] == row["requests"] - 1 and row["first_parts_at_character"] > 0
        assert row["ttft_ms"]["off"]["p50"] > 0
    assert data["rows"][0]["speedup"] > 1.2, "the faster server is seen to be faster"
    assert data["command"] and data["date"] and "fd_fusion stub: 0 sites" in data["fusion_said"][0]
    assert "| 64 |" in result.stdout
    assert [path.name for path in (tmp_path / "shm").iterdir()] == ["fd_task_queue_2.sock"]


def test_a_server_that_dies_is_an_error_with_its_last_words(tmp_path):
    result = compare(tmp_path, SERVER_OFF=STUB, SERVER_ON=f"{STUB} --no-such-argument", CONCURRENCY="1")
    assert result.returncode != 0 and "no-such-argument" in result.stderr
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "step, expected",
    [
        ("serve", "-m fd_fusion serve --fusion-config {} --model M --tensor-parallel-size 2 --port 7 --more"),
        (
            "rollback",
            "-m fastdeploy.entrypoints.openai.api_server --model M --tensor-parallel-size 2 --port 7 --more",
        ),
        ("install", "-m fd_fusion --help"),
    ],
)
def test_the_steps_of_serve_sh(step, expected, tmp_path):
    """What the script runs: `python` and `pip` are ours, and say their arguments."""
    for name in ("python", "pip"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0 $* DISABLE=$FD_FUSION_DISABLE" >> "$CALLS"\n')
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
    env.update(MODEL="M", TP="2", PORT="7")
    subprocess.run(["bash", str(ROOT / "examples/serve.sh"), step, "--more"], env=env, check=True, timeout=20)
    said = calls.read_text()
    assert expected in said
    assert ("DISABLE=1" in said) == (step == "rollback")
    assert step != "install" or "pip install --no-deps ." in said


def test_serve_sh_status_and_help(tmp_path):
    (tmp_path / "fd_fusion.log").write_text("INFO fd_fusion 0.1.0: 6 sites, triton\n")
    script, env = str(ROOT / "examples/serve.sh"), {**os.environ, "FD_LOG_DIR": str(tmp_path)}
    shown = subprocess.run(["bash", script, "status"], env=env, capture_output=True, text=True, check=True)
    assert "6 sites, triton" in shown.stdout
    shown = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert shown.returncode == 2 and "rollback" in shown.stdout
