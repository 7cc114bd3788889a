"""`python -m fd_fusion demo`: the runs agree with the truth, and whatever goes wrong is told in one sentence."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from support.launch import ranks as rank_script
from support.processes import alive, commands, rank_pid, state

from fd_fusion import __main__
from fd_fusion.cli.demo import checkpoint as demo_checkpoint
from fd_fusion.cli.demo import command as demo
from fd_fusion.cli.demo import report as demo_report
from fd_fusion.cli.demo.config import DecoderConfig
from fd_fusion.cli.demo.reference import Truth
from fd_fusion.cli.messages import to_json

ROOT = Path(__file__).parents[3]


def start(tmp_path, *args, **variables):
    """The demo as a process of its own, its temporary folder inside `tmp_path`."""
    command = [sys.executable, "-m", "fd_fusion", "demo", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path)


def left_behind(tmp_path):
    """Run folders, and processes that have one on their command line."""
    return [
        *tmp_path.glob("fd_fusion_*"),
        *(words for _, words in commands() if f"{tmp_path}/fd_fusion_" in str(words)),
    ]


# --- the main job ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("nproc", "extra"), [(1, []), (2, ["--max-token-num", "4"]), (4, ["--steps", "2"])])
def test_the_runs_agree(nproc, extra, tmp_path):
    job = {"PADDLE_NNODES": "2", "PADDLE_MASTER": "10.0.0.1:9", "PADDLE_TRAINER_ID": "1"}  # of a job around us
    process = start(tmp_path, "--nproc", str(nproc), "--json", *extra, **job)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, out + err
    data = json.loads(out)
    assert err == "" and data["agree"]
    assert len(re.findall(r"^site  ", "\n".join(demo_report.lines(data)), re.M)) == 6
    assert max(data["difference"].values()) <= data["budget"] < 1e-4
    assert data["ranks_bit_equal"] == {"stock": True, "bound": True}
    assert data["weights_unchanged"] == {"bound": True, "unbound": True}
    if nproc == 1:
        assert {one["reason"]["code"] for one in data["report"]["rejected"]} == {"one_rank"}
        assert data["calls"] == {}
    elif nproc == 2:
        assert data["calls"] == {"fused": 6 * 4, "too_many_rows": 6}, "four steps fused, the prefill not"
        assert {site["limit"] for site in data["report"]["sites"]} == {4}
    else:
        assert data["calls"] == {"fused": 6 * 3}
    assert not left_behind(tmp_path)


@pytest.mark.timeout(300)
def test_a_quantised_model(tmp_path):
    """Codes of the kernel give the logits that a quantiser behind it gives, near an exact decoder that quantises."""
    process = start(tmp_path, "--quantised", "--backend", "triton", "--steps", "2", "--prompt-len", "3", "--json")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, out + err
    data = json.loads(out)
    assert [site["fp8"] for site in data["report"]["sites"]] == ["multiply"] * 5 + [None], "the last norm is not"
    assert data["same_apart"] and data["ranks_bit_equal"] == dict.fromkeys(("stock", "bound", "apart"), True)
    assert max(data["difference"].values()) <= data["budget"] < 1, "of logits of one"
    assert data["calls"] == {"fused": 6 * 3}
    shown = "\n".join(demo_report.lines(data))
    assert "2 ranks, FP8 and bfloat16 on CPU" in shown and "apart from it: same bits: yes" in shown
    data["same_apart"] = False
    assert "the bits are others than quantised in it" in demo_report.lines(data)[-1]


def test_json_has_these_keys(tmp_path):
    truth, results = made_up()
    outcome = demo_report.judge(DecoderConfig(), 2, "cpu", truth, results)
    expected = "version nproc device decoder report calls difference budget step_ms prefill_ms ranks_bit_equal"
    assert list(outcome) == [*expected.split(), "weights_unchanged", "router_margin", "agree"]
    assert outcome["agree"]


def made_up():
    """A truth, and results of two ranks that hit it exactly."""
    logits = np.linspace(-1, 1, 8).reshape(2, 4).astype(np.float32)
    report = {
        "sites": [{"name": "a -> b", "backend": "paddle", "limit": None, "calls": {"fused": 2}}],
        "rejected": [],
    }
    run = {"logits": logits.tobytes().hex(), "ms": [2.0, 1.0]}
    weights = {"bound": True, "unbound": True}
    result = {
        "report": {**report, "off": None, "qk_fused": [], "qk_stock": {}},
        "weights": weights,
        "stock": run,
        "bound": run,
    }
    return Truth([0, 1], logits.astype(np.float64), 1e-7, 0.1), [result, json.loads(json.dumps(result))]


@pytest.mark.parametrize("fault", ["far", "nan", "rank", "weights"])
def test_the_verdict_sees(fault):
    truth, results = made_up()
    wrong = np.frombuffer(bytes.fromhex(results[0]["bound"]["logits"]), np.float32).copy()
    wrong[3] = {"far": wrong[3] + 1e-5, "nan": np.nan, "rank": np.nextafter(wrong[3], 2)}.get(fault, wrong[3])
    for result in results[1:] if fault == "rank" else results:
        result["bound"] = {**result["bound"], "logits": wrong.tobytes().hex()}
    if fault == "weights":
        results[1]["weights"]["bound"] = False
    outcome = demo_report.judge(DecoderConfig(), 2, "cpu", truth, results)
    assert not outcome["agree"]
    says = {
        "far": "bound run is out of budget",
        "nan": "bound run is out of budget",
        "rank": "bits differ in the bound",
    }
    assert says.get(fault, "weights changed when bound") in demo_report.lines(outcome)[-1]


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_truth_that_is_no_number_agrees_with_nothing(number):
    """A checkpoint that holds NaN: every error is NaN, and so is the budget."""
    truth, results = made_up()
    truth.logits[1, 2] = number
    results[0]["bound"] = results[1]["bound"] = results[0]["stock"] = results[1]["stock"] = {
        "logits": truth.logits.astype(np.float32).tobytes().hex(),
        "ms": [2.0, 1.0],
    }
    outcome = demo_report.judge(
        DecoderConfig(), 2, "cpu", dataclasses.replace(truth, plain_error=float(number)), results
    )
    last = demo_report.lines(outcome)[-1]
    assert not outcome["agree"] and last.startswith("verdict: the numbers do not agree: ")
    assert "the exact result, or the same in float32, holds NaN or Inf; check the weights" in last
    text = to_json(outcome)
    assert "NaN" not in text and "Infinity" not in text and json.loads(text)["difference"]["bound"] is None


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--nproc", "17"], "--nproc 17: give a number from 1 to 16"),
        (["--nproc", "0"], "--nproc 0"),
        (["--nproc", "3"], "num_attention_heads = 8 is not a multiple of --nproc 3"),
        (["--nproc", "8"], "num_key_value_heads = 4 is not a multiple of --nproc 8"),
        (["--hidden-size", "33"], "hidden_size = 33 is not a multiple of --nproc 2"),
        (["--hidden-size", "34", "--backend", "triton"], "H=34 of float32 is not a whole number of 16-byte units"),
        (["--heads", "6"], "num_attention_heads = 6 is not a multiple of num_key_value_heads"),
        (["--top-k", "9"], "num_experts_per_tok = 9 is above n_routed_experts = 8"),
        (["--head-dim", "30"], "rotary part, 15, is odd"),
        (["--layers", "0"], "num_hidden_layers is 0; give an integer from 1"),
        (["--steps", "0"], "--steps 0"),
        (["--max-token-num", "0"], "max_token_num = 0"),
        (["--timeout-s", "0"], "timeout_s = 0"),
        (["--backend", "triton", "--hidden-size", "34", "--heads", "2", "--kv-heads", "2"], "H=34 of float32"),
        (["--quantised", "--hidden-size", "320"], "--quantised: hidden_size = 320 and 128 rows of weights on a rank"),
        (["--quantised", "--intermediate-size", "288"], "144 rows of weights on a rank are not whole blocks of 128"),
        (["--checkpoint", "/no/such/folder"], "config.json cannot be read"),
        (["--checkpoint", "/no/such/folder", "--heads", "4"], "--checkpoint brings its own sizes"),
    ],
)
def test_a_bad_argument_gets_one_sentence(args, says, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_ranks", None)  # nothing is started
    assert demo.main(args) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("fd_fusion: ") and err.count("\n") == 1 and not out


def test_gpus_that_are_not_there_get_one_sentence(tmp_path):
    process = start(tmp_path, "--device", "gpu")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1 and not out
    assert "--device gpu: Paddle sees 0 GPUs, and each of 2 ranks needs its own" in err.splitlines()[0], err


GOOD = DecoderConfig().to_json()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[1]", "config.json holds a list, expected an object"),
        ("[" * 100_000, "config.json cannot be read"),
        ("{", "config.json cannot be read"),
        ({**GOOD, "rms_norm_eps": "small"}, "rms_norm_eps is 'small'; give a number"),
        ({**GOOD, "rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({**GOOD, "rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({**GOOD, "rope_theta": None}, "rope_theta is None"),
        ({**GOOD, "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({**GOOD, "norm_topk_prob": "no"}, "norm_topk_prob is 'no'; give true or false"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_checkpoint_that_is_none_gets_one_sentence(config, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run_ranks", None)
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    assert demo.main(["--checkpoint", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("fd_fusion: ") and err.count("\n") == 1 and not out


def test_a_full_temporary_folder_gets_one_sentence(capsys, monkeypatch, tmp_path):
    """safetensors tells it with an error of its own."""

    def save_file(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(demo, "run_ranks", None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo_checkpoint, "save_file", save_file)
    assert __main__.main(["demo", "--hidden-size", "32"]) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and "TMPDIR" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_or_old_package_gets_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_ranks", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.2.2")
    assert demo.main([]) == 1
    assert "Paddle 3.2.2 is older than 3.3. Remedy: install Paddle 3.3 or newer" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else "there")
    assert demo.main(["--backend", "triton"]) == 1
    assert 'ip install "triton' in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main([]) == 1
    assert 'ip install "paddlepaddle>=3.3"' in capsys.readouterr().err


def working_folder(tmp_path, steps=4):
    """The folder of the ranks' files once every rank has run some forwards, or None."""
    files = list(tmp_path.glob("fd_fusion_*/progress.?"))
    return files[0].parent if len(files) == 2 and all(int(file.read_text()) >= steps for file in files) else None


def begun(process, tmp_path):
    """Wait until every rank has run some forwards; returns the folder of the ranks' files."""
    end = time.monotonic() + 150
    while time.monotonic() < end and process.poll() is None:
        if folder := working_folder(tmp_path):
            return folder
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.timeout(300)
def test_a_killed_rank_is_named(tmp_path):
    process = start(tmp_path, "--steps", "40", "--hidden-size", "64", "--timeout-s", "10")
    os.kill(rank_pid(begun(process, tmp_path), 1), signal.SIGKILL)
    out, err = process.communicate(timeout=60)  # that no rank made a step would be said after 100 s
    assert process.returncode == 1 and "rank 1 died of SIGKILL" in err and "Traceback" not in err and not out
    assert not left_behind(tmp_path)


@pytest.mark.timeout(300)
def test_ctrl_c_leaves_nothing(tmp_path):
    process = start(tmp_path, "--steps", "40", "--hidden-size", "64")
    while not list(tmp_path.glob("fd_fusion_*/log.1")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "fd_fusion: interrupted\n")
    assert not left_behind(tmp_path)


DYING = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_lives_until_its_last_thread_has_gone():
    """Its locks are held until then, so a look at its segments before would leave them."""
    process = subprocess.Popen([sys.executable, "-c", DYING])
    try:
        while state(process.pid) != "Z":
            assert process.poll() is None
            time.sleep(0.02)
        assert alive(process.pid)
        process.kill()
        while alive(process.pid):
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(300)
def test_seeded_bugs_are_caught(tmp_path):
    results = rank_script("seeded_bug.py", 2, tmp_path)
    assert results[0].keys() == results[1].keys()
    codes = {
        "forgets_to_reduce": ["nothing_handed_over"],
        "flag_says_no": ["residual_differs"],
        "reduces_after": ["outputs_differ"],
    }
    for result in results:
        healthy = result.pop("healthy")
        assert healthy["sites"] == 4 and healthy["stock"] <= 1 and healthy["bound"] <= 1
        for name, got in result.items():
            assert got["stock"] > 100 and got["bound"] > 100, f"{name}: the truth must show it"
            assert got["as_stock"], f"{name}: bind must not make it another model"
        for name, code in codes.items():
            assert result[name]["sites"] == 0 and set(code) <= set(result[name]["codes"]), result[name]
        # The stock model reduces twice by itself, with our hand-over or without: bound it is that model.
        assert result["reduces_twice"]["sites"] == 4 and not result["reduces_twice"]["codes"]
        assert result["reduces_before"]["sites"] == 3 and result["reduces_before"]["codes"] == ["reduced_inside"]


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "says"), [([], 0, "demo "), (["--version"], 0, "fd_fusion "), (["x"], 2, "x")]
)
def test_the_command_line(args, code, says):
    run = subprocess.run([sys.executable, "-m", "fd_fusion", *args], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == code and says in run.stdout + run.stderr and "Traceback" not in run.stderr


COMMANDS = ["patch", "demo", "doctor", "tune --hidden-size 256", "serve", "reasons"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_working_folder_that_was_deleted(command, capsys, monkeypatch, tmp_path):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert __main__.main(command.split()) == 2
    assert capsys.readouterr().err == ("fd_fusion: the working folder is not there any more; change to one that is\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_system_refuses_is_one_sentence(command, capsys, monkeypatch):
    """Whatever a command does not know of: no memory for a process, a full disk, a folder of somebody else."""

    def main(argv):
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr(__main__, "_module", lambda command: types.SimpleNamespace(main=main))
    assert __main__.main(command.split()) == 2
    assert capsys.readouterr().err == "fd_fusion: [Errno 28] No space left on device: '/some/file'\n"


def test_a_full_place_for_the_output():
    with open("/dev/full", "wb") as full:
        argv = [sys.executable, "-m", "fd_fusion", "reasons"]
        run = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (2, "fd_fusion: [Errno 28] No space left on device\n")


def test_nobody_reads_the_output():
    """`| head -1` that has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        argv = [sys.executable, "-m", "fd_fusion", "reasons"]
        run = subprocess.run(argv, stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT)
    assert (run.returncode, run.stderr) == (141, b"")


def test_a_closed_stdout():
    run = subprocess.run(["sh", "-c", f"'{sys.executable}' -m fd_fusion reasons >&-"], capture_output=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["demo", "--json", "file"], 2, "unrecognized arguments: file; `fd-fusion demo --help` lists"),
        (["tune", "--hidden-size", "257"], 2, "H=257 of bfloat16 is not a whole number of 16-byte units"),
        (["tune", "--hidden-size", "256", "--nproc", "9"], 2, "give 2 to 8 ranks"),
        (["demo"], 1, "in sys.modules; install it, for example"),
    ],
    ids=str,
)
def test_one_sentence_of_error(tmp_path, args, code, says):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['numpy'] = None" if args == ["demo"] else "")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    argv = [sys.executable, "-m", "fd_fusion", *(arg.format(tmp=tmp_path) for arg in args)]
    run = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert run.returncode == code and says in run.stderr and run.stderr.count("\n") == 1, run.stderr
