"""`python -m fd_fusion doctor`: every probe on faked facts, the verdicts, and the whole command on this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import alive
from support.segments import left, none_left

from fd_fusion.cli.doctor import child as doctor_child
from fd_fusion.cli.doctor import command as doctor
from fd_fusion.cli.doctor.checks import CheckResult, result, run_checks
from fd_fusion.cli.doctor.machine import machine
from fd_fusion.cli.doctor.packages import packages
from fd_fusion.cli.processes import ranks

ROOT = Path(__file__).parents[3]
SANE = {"paddlepaddle-gpu": "3.3.0", "triton": "3.6.0", "fastdeploy-gpu": "2.6.0", "flashinfer-python": "0.6.12"}


def of(results, name):
    return next(one for one in results if one.name == name)


def installed(**changes):
    versions = {**SANE, **{name.replace("_", "-"): version for name, version in changes.items()}}
    return list(packages(versions.get, lambda module: "/src/FastDeploy" if "source" in changes else None))


def test_a_sane_installation():
    found = installed()
    assert {one.state for one in found} <= {"ok", "note"}
    assert of(found, "prometheus_client").text.endswith("metrics go to the log as JSON lines")


@pytest.mark.parametrize(
    "changes, name, state, text",
    [
        ({"paddlepaddle": "3.3.1"}, "paddle", "broken", "overwrite each other"),
        ({"paddlepaddle_gpu": "2.6.2"}, "paddle", "broken", "2.6.2 is older than 3.3"),
        ({"paddlepaddle_gpu": None}, "paddle", "broken", "cannot be imported"),
        ({"paddlepaddle_gpu": None, "torch": "2.11.0"}, "paddle", "warn", "cannot be imported"),
        ({"paddlepaddle_gpu": "0.0.0"}, "paddle", "ok", "0.0.0"),
        ({"triton": None}, "triton", "warn", "not installed"),
        ({"flashinfer_jit_cache": "0.6.11+cu130"}, "flashinfer", "warn", "different versions"),
        ({"flashinfer_jit_cache": "0.6.12+cu130", "flashinfer_cubin": "0.6.12"}, "flashinfer", "ok", "0.6.12"),
        ({"flashinfer_python": None}, "flashinfer", "note", "triton needs none of it"),
        ({"fastdeploy_gpu": None}, "fastdeploy", "note", "not installed"),
        ({"fastdeploy_gpu": None, "source": ""}, "fastdeploy", "ok", "from /src/FastDeploy, a source tree"),
    ],
    ids=str,
)
def test_packages(changes, name, state, text):
    found = of(installed(**changes), name)
    assert found.state == state and text in found.text


SMI = {
    "nvidia-smi --query": "GPU X, 81559, 80000, 580.10\nGPU X, 81559, 70000, 580.10",
    "nvidia-smi topo -p2p": " \tGPU0\tGPU1\t\n GPU0\tX\tOK\t\n GPU1\tOK\tX\t\n\nLegend:\n  X = Self\n",
    "nvidia-smi topo -m": "\x1b[4m\tGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t0-47\n"
    "GPU1\tNV18\t X \t0-47\n\nLegend:",
    "nvidia-smi conf-compute": "CC status: OFF",
    "nvcc": "Cuda compilation tools, release 13.0, V13.0.48",
    "ninja": "1.11.1",
}


def looked_at(**changes):
    answers = {**SMI, **{key.replace("_", " "): text for key, text in changes.items()}}

    def tool(*command):
        return next((text for key, text in answers.items() if " ".join(command).startswith(key)), None)

    return list(machine(tool))


def test_two_gpus_with_nvlink():
    found = looked_at()
    assert {one.state for one in found} == {"ok"}
    assert of(found, "p2p").data["matrix"] == {"GPU0": ["X", "OK"], "GPU1": ["OK", "X"]}
    assert of(found, "nvlink").data["matrix"] == {"GPU0": ["X", "NV18"], "GPU1": ["NV18", "X"]}
    assert of(found, "gpus").data["gpus"][1] == {"name": "GPU X", "total_mib": 81559, "free_mib": 70000}


def test_what_is_wrong_with_a_machine():
    pcie, no_peer = (
        SMI["nvidia-smi topo -m"].replace("NV18", "SYS"),
        SMI["nvidia-smi topo -p2p"].replace("\tOK", "\tCNS"),
    )
    changes = {
        "nvidia-smi topo -m": pcie,
        "nvidia-smi topo -p2p": no_peer,
        "nvidia-smi conf-compute": "CC status: ON",
    }
    found = looked_at(**changes)
    for name, text in (
        ("p2p", "GPU0-GPU1"),
        ("nvlink", "SYS only"),
        ("confidential_computing", "is on"),
    ):
        assert of(found, name).state == "warn" and text in of(found, name).text


def test_a_machine_without_any_tool():
    found = list(machine(lambda *_: None))
    assert of(found, "gpus").state == "note" and of(found, "toolkit").state == "note"


def test_a_probe_that_fails_is_a_sentence():
    def probe():
        yield result("first", "ok", "fine")
        raise OSError("no such thing")

    first, second = run_checks("t", probe)
    assert first.topic == second.topic == "t"
    assert first.name == "first" and second.name == "probe" and second.state == "warn"
    assert second.text == "t could not be checked: OSError: no such thing"


@pytest.mark.parametrize("states, code", [(["ok", "warn"], 0), (["ok", "off"], 1), (["off", "broken"], 2)], ids=str)
def test_verdicts(states, code):
    outcome = doctor.judge(
        [
            CheckResult("t", str(i), state, f"is {state}", f"fix {i}" if state != "ok" else "")
            for i, state in enumerate(states)
        ]
    )
    assert outcome["exit_code"] == code
    assert outcome["verdict"] == ["works", "unfused", "broken"][code]
    assert outcome["todo"] == ["fix 1"] if states[0] == "ok" else ["fix 1", "fix 0"], "the worst first"
    assert doctor.lines(outcome)[-1] == f"what to do: {outcome['todo'][-1]}"


@pytest.mark.parametrize(
    "name, value, state",
    [("FD_FUSION_DISABLE", "1", "off"), ("FD_FUSION_CONFIG", "{", "broken"), ("FD_X", "", "note")],
)
def test_the_source_of_the_configuration(monkeypatch, name, value, state):
    monkeypatch.setenv(name, value)
    assert next(doctor.config()).state == state


def fake(folder, name, text, version="1.0"):
    """A package of one module, with metadata, that a child process finds."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_framework_that_ends_its_process(on_path):
    fake(on_path, "paddle", "import os; os.abort()")
    (found,) = doctor_child.ask("framework", 2)
    assert found.state == "broken" and "ends its process" in found.text


def test_a_framework_that_does_not_import(on_path):
    fake(on_path, "paddle", "raise ImportError('libfoo.so: cannot open shared object file')")
    assert (
        doctor_child.ask("framework", 2)[0].text
        == "Paddle cannot be imported: libfoo.so: cannot open shared object file"
    )


def test_a_framework_whose_gpu_does_not_answer_is_broken(on_path):
    fake(on_path, "paddle", "__version__ = '3.3.1'\ndef is_compiled_with_cuda():\n    raise OSError('error 719')")
    (found,) = told = doctor_child.ask("framework", 2)
    assert found.state == "broken" and "OSError: error 719" in found.text
    told += doctor._launch(2, told, None)
    assert told[1].text == "not tried: the framework does not work" and doctor.judge(told)["exit_code"] == 2


def test_a_framework_that_does_not_come_to_an_end_is_broken(on_path):
    fake(on_path, "paddle", "import time; time.sleep(60)")
    (found,) = doctor_child.ask("framework", 2, timeout_s=1)
    assert found.state == "broken" and "was not done within 1 s" in found.text


def test_a_launch_that_cannot_be_started_is_broken(monkeypatch):
    monkeypatch.setattr(doctor_child, "asking", lambda *_: contextlib.nullcontext(list))
    monkeypatch.setattr(doctor, "_launch", lambda *_: 1 / 0)
    launch = doctor.find(2, launch=True, show=(shown := []).append)[-1]
    assert launch.topic == "launch" and launch.state == "broken" and launch.remedy
    count = len(shown)
    assert shown[0] == f"checking machine, 1 of {count}" and shown[-1] == f"checking launch, {count} of {count}"


def test_a_build_for_cpus_among_gpus(on_path, monkeypatch):
    smi = on_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho GPU 0: GPU X\necho GPU 1: GPU X")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(on_path), prepend=os.pathsep)
    fake(on_path, "paddle", "__version__ = '3.3.1'\ndef is_compiled_with_cuda(): return False")
    told = doctor_child.ask("framework", 2)
    assert of(told, "gpus").state == "off" and "sees none of this machine's GPUs (2)" in of(told, "gpus").text


def test_without_triton_nothing_fuses_on_a_cpu(monkeypatch):
    monkeypatch.setattr(doctor_child.importlib.util, "find_spec", lambda name: None)
    found = of(list(doctor_child._backends(doctor_child.spec_for(2, "cpu", None))), "any")
    assert found.state == "off" and found.remedy == 'pip install "triton>=3.3"'


@pytest.mark.parametrize(
    "plugins, state", [(None, "warn"), ("", "off"), ("another", "off"), ("another,fd_fusion", None)]
)
def test_asked_for_by_the_variable_where_no_plugin_would_be_loaded(monkeypatch, plugins, state):
    """Without FD_PLUGINS the newest FastDeploys load no plugin; with one that leaves us out none does."""
    monkeypatch.delenv("FD_FUSION_DISABLE", raising=False)
    monkeypatch.delenv("FD_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("FD_PLUGINS", plugins)
    monkeypatch.setenv("FD_FUSION_CONFIG", "{}")
    found = [one for one in doctor.config() if one.name == "plugin"]
    assert [one.state for one in found] == ([state] if state else [])
    assert not found or "FD_PLUGINS=" in found[0].remedy
    monkeypatch.delenv("FD_FUSION_CONFIG")
    assert not [one for one in doctor.config() if one.name == "plugin"], "nobody asked"


@pytest.mark.parametrize("found", [True, False])
def test_whether_fastdeploys_own_loading_finds_us(on_path, monkeypatch, found):
    """The host is the tests' own, with FastDeploy's way of loading plugins."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(on_path), str(ROOT / "tests/host")]))
    monkeypatch.setenv("FD_PLUGINS", "fd_fusion" if found else "another")
    monkeypatch.setenv("FD_CUSTOM_AR_MAX_SIZE_MB", "4")
    info = on_path / "fd_fusion-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fd_fusion\nVersion: 9\n")
    plugin = "fd_fusion = fd_fusion.hosts.fastdeploy.plugin:register"
    (info / "entry_points.txt").write_text(f"[fastdeploy.model_register_plugins]\n{plugin}\n")
    told = doctor_child.ask("fastdeploy")
    assert of(told, "plugin").state == ("ok" if found else "off"), told
    assert found or "FD_PLUGINS=fd_fusion" in of(told, "plugin").remedy
    assert "Glm4MoeDecoderLayer" in of(told, "decoders").data["decoders"]
    own = of(told, "custom_all_reduce")
    assert own.data == {"max_size_mb": 4, "compiled": False} and "FD_CUSTOM_AR_MAX_SIZE_MB is 4" in own.text


def command(*args, env=None, timeout_s=400):
    full = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    argv = [sys.executable, "-W", "ignore", "-m", "fd_fusion", "doctor", *args]
    return subprocess.run(argv, env=full, capture_output=True, text=True, timeout=timeout_s)


def test_the_whole_command_on_this_machine():
    before = left()
    done = command("--json")
    outcome = json.loads(done.stdout)
    assert done.returncode == outcome["exit_code"] == 0, done.stdout
    assert set(outcome) == {"schema", "fd_fusion", "verdict", "exit_code", "sentence", "todo", "checks"}
    keys = {"topic", "name", "state", "text", "remedy", "data"}
    assert outcome["schema"] == 1 and all(set(one) == keys for one in outcome["checks"])
    launch = next(one for one in outcome["checks"] if one["topic"] == "launch")
    assert launch["state"] == "ok" and launch["data"]["bit_equal"] and launch["data"]["error_over_budget"] <= 1
    assert launch["data"]["counted_on_device"]
    assert none_left(before)


def test_without_the_launch_and_disabled():
    done = command("--no-run", env={"FD_FUSION_DISABLE": "1"})
    assert done.returncode == 1 and not done.stderr
    assert "verdict: only the unfused path works on this machine: FD_FUSION_DISABLE is set" in done.stdout


def test_bad_arguments():
    done = command("--nproc", "99")
    assert done.returncode == 2 and "give 1 to 8" in done.stderr


RANK = """
import sys, os, signal, time, pathlib
from fd_fusion.cli.processes.ranks import rank_main
def run(job, group):
    pathlib.Path(job["pids"], str(group.rank)).write_text(str(os.getpid()))
    if group.rank == 1:
        {fault}
    time.sleep(60)
sys.exit(rank_main(run))
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Ranks whose rank 1 does what is given. Afterwards none of them is left."""
    pids = tmp_path / "pids"
    pids.mkdir()

    def start(fault, **job):
        script = tmp_path / "faulty.py"
        script.write_text(RANK.format(fault=fault))
        monkeypatch.setattr(
            ranks, "_command", lambda module, folder, rank: [sys.executable, script, folder, str(rank)]
        )
        return ranks.run_ranks("faulty", 2, {"pids": str(pids), **job}, timeout_s=job.get("timeout_s", 30))

    yield start
    for pid in pids.iterdir():
        assert not _runs(pid), "a rank is left"


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 died of SIGKILL"),
        ("os._exit(3)", "rank 1 died with exit code 3"),
        ("raise ValueError('no such thing')", "rank 1 failed: no such thing"),
    ],
)
def test_a_rank_that_dies_is_named(faulty, fault, sentence):
    with pytest.raises(ranks.RanksFailed) as caught:
        faulty(fault)
    assert str(caught.value) == sentence, "and not that rank 0, which goes on, was not done in time"


def test_a_stopped_rank_is_named(faulty):
    with pytest.raises(ranks.RanksFailed, match=r"^rank 1 was stopped: no rank made a step for 3 s$"):
        faulty("os.kill(os.getpid(), signal.SIGSTOP)", timeout_s=3)


STEPS = "progress = __import__('fd_fusion.cli.processes.ranks').cli.processes.ranks.Progress(); "
STEPS += "[(progress.step(), time.sleep(0.4)) for _ in range(10)]"


def test_the_time_limit_is_of_a_step_and_the_rank_behind_is_named(faulty):
    started = time.monotonic()
    with pytest.raises(ranks.RanksFailed, match=r"^rank 0 was not done: no rank made a step for 3 s$"):
        faulty(STEPS, timeout_s=3)
    assert time.monotonic() - started > 9 * 0.4 + 3, "the steps of rank 1 count"


SEGMENT = (
    "from fd_fusion.comm import posix_shm; handle = posix_shm.PosixShm().allocate(4096)[1]; "
    "pathlib.Path(job['segment']).write_text(str(posix_shm._path(handle))); os._exit(3)"
)


def test_the_shared_memory_of_a_rank_that_dies_is_removed(faulty, tmp_path):
    """It still has its name: the other ranks had not mapped it yet."""
    with pytest.raises(ranks.RanksFailed):
        faulty(SEGMENT, segment=str(tmp_path / "segment"))
    assert not Path((tmp_path / "segment").read_text()).exists()


def test_ranks_that_are_not_done_in_time(faulty):
    with pytest.raises(ranks.RanksFailed, match=r"ranks 0, 1 were not done: no rank made a step for 1.5 s"):
        faulty("pass", timeout_s=1.5)


def test_ranks_end_with_a_killed_parent(tmp_path):
    code = RANK.format(fault="pass")
    (tmp_path / "faulty.py").write_text(code)
    parent = (
        "import sys\nfrom fd_fusion.cli.processes import ranks\n"
        f"ranks._command = lambda m, f, r: [sys.executable, {str(tmp_path / 'faulty.py')!r}, f, str(r)]\n"
        f"ranks.run_ranks('faulty', 2, {{'pids': {str(tmp_path)!r}}}, timeout_s=60)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", parent], env=env)
    try:
        pids = [tmp_path / str(rank) for rank in range(2)]
        _until(lambda: all(pid.exists() and pid.read_text() for pid in pids))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _until(lambda: not any(map(_runs, pids)))


def _runs(file):
    """Whether the rank that wrote its id there runs. It may have been killed before it wrote it."""
    pid = file.read_text()
    return bool(pid) and alive(int(pid))


def _until(condition, timeout_s=150):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def fake_flashinfer(folder, text):
    fake(folder, "flashinfer", text, version="0.6.12")
    (folder / "flashinfer-0.6.12.dist-info").rename(folder / "flashinfer_python-0.6.12.dist-info")
    (folder / "flashinfer_python-0.6.12.dist-info/METADATA").write_text("Name: flashinfer-python\nVersion: 0.6.12\n")


@pytest.mark.parametrize(
    "text, says",
    [
        ("raise OSError('libcudart.so.12 is gone')", "OSError: libcudart.so.12 is gone"),
        ("import os; os.abort()", "it ended its process (exit code -6)"),
    ],
)
def test_a_broken_flashinfer_is_one_sentence(on_path, monkeypatch, text, says):
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(on_path))  # nothing is compiled there
    fake_flashinfer(on_path, text)
    (found,) = doctor_child.ask("flashinfer")
    assert found.state == "warn" and says in found.text and found.remedy


def test_imports_that_hang_are_waited_for_at_once(monkeypatch):
    """All three hanging took three times the limit."""
    given = []

    class Hanging(contextlib.nullcontext):
        def kill(self):
            pass

        def communicate(self, timeout):
            given.append(timeout)
            clock[0] += timeout
            raise subprocess.TimeoutExpired("python", timeout)

    clock = [100.0]
    monkeypatch.setattr(doctor_child.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(doctor_child.subprocess, "Popen", lambda *args, **kwargs: Hanging(Hanging()))
    with doctor_child.asking("framework", 2) as first, doctor_child.asking("flashinfer") as second:
        (broken,), (warn,) = first(), second()
    assert given == [120, 1] and (broken.state, warn.state) == ("broken", "warn")
    assert "was not done within 120 s" in broken.text and "was not done within 120 s" in warn.text


def test_an_import_that_hangs_does_not_hold_up_a_sigterm(on_path):
    touch = f"import os, pathlib, time; pathlib.Path({str(on_path / 'in')!r}).write_text(str(os.getpid()))"
    fake_flashinfer(on_path, f"{touch}; time.sleep(100)")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(on_path), str(ROOT)])}
    process = subprocess.Popen([sys.executable, "-m", "fd_fusion", "doctor", "--no-run"], env=env)
    try:
        _until(lambda: (on_path / "in").exists() and (on_path / "in").read_text())
        process.terminate()
        assert process.wait(timeout=60) == 143
        _until(lambda: not _runs(on_path / "in"))
    finally:
        process.kill()
        process.wait()
