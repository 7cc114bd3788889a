"""The rank scripts of the FastDeploy integration, over the contract host: real processes, gloo, no GPU."""

import os

import pytest
from support.launch import ranks

# A source tree of FastDeploy in place of the contract host: its engine, ops and configs need their own environment.
needs_the_contract_host = pytest.mark.skipif(
    "FASTDEPLOY_SRC" in os.environ, reason="the seeded configs are those of the contract host"
)
pytestmark = needs_the_contract_host


def run(script, nproc, folder, *args, **variables):
    return ranks(script, nproc, folder, *args, env={"FD_LOG_DIR": str(folder / "fd"), **variables})


def test_every_decoder_on_two_ranks(tmp_path):
    first, second = run("fastdeploy_models.py", 2, tmp_path)
    assert len(first) == 8 and first == second, "both ranks bind the same pairs and give the same numbers"


def test_four_ranks(tmp_path):
    results = run("fastdeploy_models.py", 4, tmp_path, "Glm4MoeForCausalLM", "Ernie4_5_MoeForCausalLM")
    assert all(result == results[0] for result in results)


def test_the_kernels_under_the_interpreter(tmp_path):
    """All-reduce + residual + RMSNorm and the norms of q and k by the real kernels, as two processes on a CPU."""
    variables = {"TEST_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    first, second = run("fastdeploy_models.py", 2, tmp_path, "Glm4MoeForCausalLM", **variables)
    assert first == second


def test_residuals_that_stay_with_their_owners_on_four_ranks(tmp_path):
    """By two-shot; the last norm's residual is whole."""
    variables = {"TEST_BACKEND": "triton", "TRITON_INTERPRET": "1", "TEST_TWO_SHOT": "2"}
    first, *others = run("fastdeploy_models.py", 4, tmp_path, "Glm4MoeForCausalLM", **variables)
    assert all(other == first for other in others)
    assert [(len(found["sites"]), found["staying"]) for found in first.values()] == [(6, [5, None])]


def test_layers_in_fp8_take_what_the_kernel_quantised(tmp_path):
    results = run("fastdeploy_fp8.py", 2, tmp_path, TRITON_INTERPRET="1")
    assert all(result["done"] for result in results)


def test_a_silent_rank_is_an_error_before_its_step_is_published(tmp_path):
    first, _ = run("fastdeploy_timeout.py", 2, tmp_path, TRITON_INTERPRET="1")
    assert 4.9 < first["waited"] < 40, "after timeout_s = 5, and not after ten times that"


def test_two_replicas_of_two_ranks_never_meet(tmp_path):
    results = run("fastdeploy_dp.py", 4, tmp_path)
    assert [result["replica"] for result in results] == [0, 0, 1, 1]
    assert results[0]["fused"] == results[1]["fused"] != results[2]["fused"]


def test_seeded_bugs_are_caught_before_anything_is_fused(tmp_path):
    found = run("fastdeploy_bugs.py", 2, tmp_path)
    assert all(set(result) == set(found[0]) and len(result) == 5 for result in found)


@pytest.mark.parametrize(
    "case",
    [
        "biases half_precision call_forms",
        "untouched experts_apart draft",
        "order upstream_flag upstream_flag_without_upstream deterministic named_backend",
        "cleared_and_reloaded traced",
    ],
)
def test_layers(case, tmp_path):
    assert all(result["done"] for result in run("fastdeploy_layers.py", 2, tmp_path, *case.split()))
