"""Rows split over programs that exchange their sums: values, bits, failures. See split_programs.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fd_fusion.kernels.all_reduce.error_page import ERROR_TIMED_OUT, read_error_page
from tests.kernels.all_reduce.test_fp8 import check_codes
from tests.kernels.all_reduce.test_kernel import case, check_results, is_nan
from tests.support.tensors import from_bits

HERE = Path(__file__).parents[2]


def split(size, split, hidden, dtype="bfloat16", **more):
    usual = {"programs": 1, "slots": 3, "rows": [1, 3], "two_shot": [True, False]}
    return case(size, hidden, dtype, split=split, **{**usual, **more})


MISSING = {"rows": [1, 1, 1], "two_shot": [False] * 3, "limit_s": 0.2}
CASES = {  # a slice is 32 words, of two halves or one float
    "2 of two, short": split(2, 2, 72, weight_dtype="float32", weight_offset=1.0),
    "3 of two, short": split(2, 3, 200, rows=[2, 1], two_shot=[False, True]),
    "2 of two, empty": split(2, 2, 32, "float32", rows=[2, 1, 1], two_shot=[False, False, True], launches=2**32 - 3),
    "4 of two, empty": split(2, 4, 192, rows=[2]),
    "2 of three, empty": split(3, 2, 64, rows=[2]),
    "4 of three, short": split(3, 4, 200, "float16", rows=[2, 1], two_shot=[False, True]),
    "2 of two, FP8": split(2, 2, 512, fp8=["both", "multiply"], scales="by column"),
    "3 of two, short, FP8": split(2, 3, 640, fp8=["both", "multiply"], rows=[2, 1]),  # five groups
    "4 of three, short, FP8": split(
        3, 4, 896, "float16", fp8=["both", "divide"], rows=[2, 1], two_shot=[False, True]
    ),
    "4 of three, two by two-shot, FP8": split(
        3, 4, 896, slices=2, fp8=["both", "multiply"], rows=[3, 2], two_shot=[True, False]
    ),
    "2 of two, both by two-shot": split(2, 2, 72, slices=2, rows=[3, 2, 3], two_shot=[True, False, True]),
    "4 of three, two by two-shot": split(
        3, 4, 200, "float16", slices=2, rows=[1, 3, 2], two_shot=[False, True, True]
    ),
    "2 of two, rounds": split(
        2, 2, 72, slots=4, programs=2, rows=[8, 2, 9], two_shot=[False, True, False], launches=2**32 - 3
    ),
    "2 of two, rounds by two-shot": split(2, 2, 72, slots=4, rows=[8, 2, 5], two_shot=[True, False, True]),
    "no rank": split(2, 2, 72, absent=[1, 1], **MISSING),
    "no program": split(2, 2, 72, absent_program=[0, 1, 1], **MISSING),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of each case the results of each rank, numbered as of a list of one case."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "cases.json").write_text(json.dumps(list(CASES.values())))
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "kernels/all_reduce/split_programs.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    ranks = [dict(np.load(folder / f"{rank}.npz")) for rank in range(3)]

    def of(number, size):
        own = f"{number}."
        return [{f"0.{key[len(own) :]}": one[key] for key in one if key.startswith(own)} for one in ranks[:size]]

    return {name: of(number, one["size"]) for number, (name, one) in enumerate(CASES.items())}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("no")])
def test_programs_that_share_a_row(name, results):
    """One-shot and two-shot, rows that are pushed ahead, a last slice that is short, or empty."""
    check_results([CASES[name]], results[name])
    if "fp8" in CASES[name]:
        check_codes(CASES[name], 0, results[name])


@pytest.mark.parametrize("name, one, missing", [("no rank", 0, 1), ("no program", 1, 0)])
def test_programs_that_share_a_row_when_one_is_missing(name, one, missing, results):
    """Nobody waits for ever, and each rank that was there says why."""
    pages = [read_error_page(rank["0.page"].tolist()) for rank in results[name]]
    assert pages[one]["code"] == ERROR_TIMED_OUT and pages[one]["missing"] == [missing], pages
    assert name == "no rank" or pages[0] is not None, "a program waited for its neighbour, and said nothing"
    got = results[name][one]
    assert np.isfinite(from_bits(got["0.0.norm"], "bfloat16")).all()
    assert np.isnan(from_bits(got["0.1.norm"], "bfloat16")).all() and is_nan(got, 0, 2)
