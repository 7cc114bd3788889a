"""FP8 out of the all-reduce kernel under the interpreter: every bit as `reference.quantise` has it for the norm."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fd_fusion import reference
from fd_fusion.kernels.all_reduce import plan as plans
from tests.kernels.all_reduce.test_kernel import case, check, check_results, is_nan, run
from tests.support.tensors import from_bits


def fp8(size, hidden, formula, output="both", dtype="bfloat16", **more):
    return case(size, hidden, dtype, fp8=[output, formula], **more)


def check_codes(one, number, results, norms=None):
    """All ranks have the same bits, and they are the contract's for the norm: this case's, or that of `norms`."""
    for step in range(len(one["rows"])):
        norm = from_bits((norms or results)[0][f"{number if norms is None else 0}.{step}.norm"], one["dtype"])
        want = reference.quantise(norm, one["fp8"][1], one.get("static_scale", 1.0))
        for rank in results:
            codes, scales = (rank[f"{number}.{step}.{name}"] for name in ("codes", "scales"))
            np.testing.assert_array_equal(codes, want[0], err_msg=f"case {number} step {step}")
            if one["fp8"][1] == "static":
                assert (scales == -7).all(), "no scale is written"
            else:
                np.testing.assert_array_equal(scales.view(np.uint32), want[1].view(np.uint32))


TWO_RANKS = [
    fp8(2, 256, "multiply"),
    fp8(2, 384, "multiply_pow2", scales="by column", weight_dtype="float32", weight_offset=1.0),
    fp8(2, 128, "divide", dtype="float16", scales="by column", slots=2, rows=[1, 3, 5, 4]),  # several rounds
    fp8(2, 640, "divide_7", residual=False),
    fp8(2, 384, "multiply", tiny=True, rows=[2], two_shot=[False]),
    fp8(2, 384, "multiply_pow2", tiny=True, rows=[2], two_shot=[True]),
    fp8(2, 384, "divide", tiny=True, rows=[2], two_shot=[False]),
    fp8(2, 256, "static", static_scale=0.011, aliased=True),
    fp8(2, 256, "multiply", payload="special", rows=[1, 3], two_shot=[False, True]),
    fp8(2, 256, "divide", payload="special", dtype="float16", rows=[1, 3], two_shot=[True, False]),
]


def test_two_ranks():
    """Both paths, several T, both orders of the scales; Inf and NaN too."""
    results = check(TWO_RANKS)
    for number, one in enumerate(TWO_RANKS):
        check_codes(one, number, results)


def test_codes_alone_are_those_of_a_call_that_writes_the_norm_too():
    whole = case(3, 256, rows=[1, 4], two_shot=[False, True])
    alone = fp8(3, 256, "multiply", "codes", rows=[1, 4], two_shot=[False, True])
    results = run([whole, alone])
    check_results([whole], results)
    check_codes(alone, 1, results, norms=results)
    for rank in results:
        for step in (0, 1):
            assert (rank[f"1.{step}.norm"] == 0x1234).all(), "the norm is not written"
            np.testing.assert_array_equal(rank[f"1.{step}.residual"], rank[f"0.{step}.residual"])


@pytest.mark.parametrize("two_shot", [False, True])
def test_a_missing_rank(two_shot):
    """A call that fails gives NaN in the codes too."""
    one = fp8(2, 256, "multiply", rows=[2] * 3, two_shot=[two_shot] * 3, limit_s=3, absent=[1, 1])
    results = run([one])
    assert np.isfinite(from_bits(results[0]["0.0.norm"], "bfloat16")).all()
    for step in (1, 2):
        assert is_nan(results[0], 0, step) and (results[0][f"0.{step}.codes"] == 0x7F).all()


def test_divisions_of_a_gpu_give_the_same_bits_for_every_half():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, Path(__file__).with_name("fp8_division.py"), "-1", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("quotients") == 12


@pytest.mark.parametrize("size", range(2, 9))
def test_slices_have_whole_groups(size):
    """And cover the row; none is empty where they were not without FP8."""
    for hidden in range(128, 16385, 128):
        plan, plain = (plans.plan_for(size, hidden, "bfloat16", fp8=fp8) for fp8 in (True, False))
        assert plans.refuses_fp8(plan) is None
        assert plan.slice_words % 64 == 0 and plan.slice_words * plan.split >= plan.words
        assert plan.split == plain.split and 0 <= plan.slice_words - plain.slice_words < 64
        block = plans.constants(plan, weight_dtype="bfloat16", has_residual=True, two_shot=False)["BLOCK"]
        assert block >= plan.slice_words
        if hidden in (2048, 4096, 5120, 6144, 7168, 8192):
            assert (plan.split - 1) * plan.slice_words < plan.words
    assert "128" in plans.refuses_fp8(plans.plan_for(size, 2880, "bfloat16", fp8=True))
    assert "float16" in plans.refuses_fp8(plans.plan_for(size, 4096, "float32", fp8=True))
