"""`bench decode`: its arithmetic anywhere; the whole of it, by the interpreter, where torch is."""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from bench.decode_report import median_interval, paired, sentence, tables

ROOT = Path(__file__).parents[3]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def test_differences_are_those_of_the_same_round():
    """A drift that all ways share is larger than what they differ by, and is gone from the differences."""
    drift = [0, 100, 300, -200, 50]
    ours = [time for step in drift for time in (10 + step, 12 + step)]
    other = [time for step in drift for time in (13 + step, 13 + step)]
    found = paired({"other": other, "ours": ours}, "ours")
    assert found["more"] == {"other": [2, 2, 2]}
    assert found["us"] == {"other": 63, "ours": 61}


@pytest.mark.parametrize("count", [3, 6, 15, 40])
def test_the_interval_holds_the_median_in_95_of_100(count):
    generator, held, runs = random.Random(count), 0, 4000
    for _ in range(runs):
        _, low, high = median_interval([generator.gauss(0, 100) for _ in range(count)])
        held += low <= 0 <= high
    few = 1 - 2**-count * 2  # of so few values all of them are the interval, and that is not enough
    assert held / runs > min(0.945, few - 0.015)
    assert count < 7 or held / runs < 0.99


def result(**more):
    us = {"no reduction": 100.0, "ours": 104.0, "ours again": 104.1, "pull + norm": 110.0, "nccl + norm": 120.0}
    cell = {
        "model": "GLM-4.5-Air",
        "layers": 6,
        "T": 1,
        "us": us,
        "more": {"pull + norm": [6.0, 5.5, 6.4]},
        "head_us": 9,
    }
    tokens = {"batches": [1, 4], "steps": 8, "same_tokens": True, "same_bits": True, "same_on_all_ranks": True}
    about = {"device": "GPU", "versions": {}, "commit": "abc", "date": "today", "command": "bench", "ranks": 2}
    made = {"mode": "gpu", "cells": [cell], "tokens": {"GLM": {**tokens, "different_tokens": 9}}, "without": []}
    return {**about, **made, **more}


def test_the_sentence_says_what_is_gained_and_what_is_left():
    text = sentence(result())
    assert "5.5 to 5.5 % less than with pull + norm" in text and "4.0 to 4.0 % more than with no reduction" in text


def test_the_table_shows_differences_with_their_interval_and_what_is_missing():
    text = tables(result(without=["symm: no such thing"]))
    assert "| GLM-4.5-Air | 1 | 6.0 (5.5 to 6.4) |" in text and "Not measured: symm: no such thing" in text
    assert "are the same, bit for bit," in text


def test_one_rival_or_none_is_a_sentence_too():
    alone = result()
    del alone["cells"][0]["us"]["pull + norm"], alone["cells"][0]["us"]["nccl + norm"]
    assert sentence(alone).endswith("the layers of a step take 4.0 to 4.0 % more than with no reduction at all.")


@pytest.mark.skipif(not HAS_TORCH, reason="no torch here")
@pytest.mark.parametrize(
    "wrong, said",
    [
        (("--ranks", "1"), "reduces nothing"),
        (("--models", "nosuch"), "a config.json"),
        (("--rows", "x"), "give numbers"),
        (("--rounds", "0"), "begin at 1"),
        (("--output", "/nowhere/out.json"), "/nowhere/out.json"),
        (("--render", "/nowhere/in.json"), "/nowhere/in.json"),
    ],
)
def test_what_no_rank_could_run_is_said_before_any_is_started(wrong, said):
    command = [sys.executable, "examples/bench", "decode", *wrong]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_tokens_that_differ_are_said():
    wrong = result()
    wrong["tokens"]["GLM"]["same_bits"] = False
    assert "NOT the same" in tables(wrong)


@pytest.mark.skipif(not HAS_TORCH, reason="no torch here")
def test_a_config_json_is_a_model(tmp_path):
    from bench.decode_model import MODELS, shape_of

    config = {"hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8}
    config |= {"head_dim": 128, "intermediate_size": 10944, "vocab_size": 151552, "model_type": "glm4_moe"}
    config |= {
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path / "config.json")) == MODELS["GLM-4.5-Air"]
    with pytest.raises(ValueError, match="config"):
        shape_of("no such model")


@pytest.mark.skipif(not HAS_TORCH, reason="no torch here")
def test_on_a_cpu_everything_runs_and_says_that_times_mean_nothing(tmp_path):
    command = [sys.executable, "examples/bench", "decode", "--output", str(tmp_path / "out.json"), "--rows", "1,2"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "these times mean nothing" in done.stdout
    made = json.loads((tmp_path / "out.json").read_text())
    ways = {"no reduction", "ours", "ours again", "ours, stock q/k norm", "pull + norm", "gloo + norm"}
    assert [cell["T"] for cell in made["cells"]] == [1, 2]
    for cell in made["cells"]:
        assert set(cell["us"]) == ways and set(cell["more"]) == ways - {"ours"}
        assert all(math.isfinite(us) and us > 0 for us in cell["us"].values())
    tokens = made["tokens"]["tiny"]
    assert tokens["same_tokens"] and tokens["same_bits"] and tokens["same_on_all_ranks"] and made["without"] == []


@pytest.mark.skipif(not HAS_TORCH, reason="no torch here")
def test_an_fp8_model_is_right_by_every_way(tmp_path):
    options = ["--fp8", "--rows", "1", "--output", str(tmp_path / "out.json")]
    command = [sys.executable, "examples/bench", "decode", *options]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((tmp_path / "out.json").read_text())
    (cell,) = made["cells"]
    ways = {"no reduction", "ours", "ours again", "ours, quantised behind", "pull + norm", "gloo + norm"}
    assert ways <= set(cell["us"]) and "--fp8" in made["command"]
    assert made["without"] == [] and made["tokens"] == {}, "numbers are compared; the bits are elsewhere"
