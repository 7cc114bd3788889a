"""The real kernel under Triton's interpreter, as real processes over shared memory: values, bits, failures."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.kernels.all_reduce.error_page import ERROR_ABORTED, ERROR_TIMED_OUT, ERROR_TWO_STREAMS, read_error_page
from fd_fusion.reference import DTYPE_BYTES
from tests.kernels.all_reduce.kernel_rank import fill, inputs, region_bytes
from tests.support.tensors import from_bits

HERE = Path(__file__).parents[2]


def run(cases, timeout_s=100):
    """Run the cases, all of one size, in one process a rank. Returns each rank's results."""
    size = cases[0]["size"]
    folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="fd_fusion_test_"))
    ranks = []
    try:
        (folder / "cases.json").write_text(json.dumps(cases))
        memory = np.memmap(folder / "memory", np.uint8, "w+", shape=sum(map(region_bytes, cases)))
        start = 0
        for case in cases:
            fill(case, memory[start : start + region_bytes(case)])
            start += region_bytes(case)
        env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(HERE / "kernels/all_reduce/kernel_rank.py"), str(folder)]
        ranks = [subprocess.Popen([*command, str(rank)], env=env) for rank in range(size)]
        assert [rank.wait(timeout_s) for rank in ranks] == [0] * size
        return [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for path in folder.glob("*"):
            path.unlink()
        folder.rmdir()


def case(size, hidden_size, dtype="bfloat16", **more):
    base = {
        "size": size,
        "hidden_size": hidden_size,
        "dtype": dtype,
        "weight_dtype": dtype,
        "programs": 2,
        "slots": 5,
    }
    base |= {"rows": [1, 3, 5, 2], "two_shot": [False, True, False, True]}
    return base | more


def exact(case, step):
    """norm_out and residual_out in fp64, and how far off a plain computation of the contract may be."""
    dtype, size = case["dtype"], case["size"]
    with np.errstate(invalid="ignore"):  # the payload holds NaN on purpose
        parts = [from_bits(inputs(case, rank, step)[0], dtype).astype(np.float64) for rank in range(size)]
    _, residual, weight = inputs(case, 0, step)
    total = sum(parts)
    if case.get("residual", True):
        total = total + from_bits(residual, dtype)
    weight = from_bits(weight, case["weight_dtype"]).astype(np.float64) + case.get("weight_offset", 0.0)
    norm = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * weight
    return norm, total


def check_values(case, step, results, number):
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-20}[case["dtype"]]
    for name, want in zip(("norm", "residual"), exact(case, step)):
        got = from_bits(results[0][f"{number}.{step}.{name}"], case["dtype"])
        with np.errstate(invalid="ignore"):
            error = np.abs(got - want)
            # One rounding to the dtype, and fp32's own error, which cancellation makes relative to the summands.
            bound = 1.02 * unit * np.abs(want) + 2e-6 * (1 + np.abs(want)) + 1e-7
        finite = np.isfinite(want)
        assert (error <= bound)[finite].all(), (name, number, step, np.nanmax((error / bound)[finite]))
        assert (np.isnan(got) == np.isnan(want)).all() and (np.isinf(got) == np.isinf(want)).all()


def check(cases, timeout_s=100):
    return check_results(cases, run(cases, timeout_s))


def check_results(cases, results):
    """All ranks have the same bits, which are right, and nobody ran out of time."""
    for number, one in enumerate(cases):
        for step in range(len(one["rows"])):
            for name in ("norm", "residual"):
                bits = [rank[f"{number}.{step}.{name}"].tobytes() for rank in results]
                assert len(set(bits)) == 1, f"case {number} step {step}: ranks differ in {name}"
            check_values(one, step, results, number)
        assert all(read_error_page(rank[f"{number}.page"].tolist()) is None for rank in results)
    return results


WRAPS = [  # across the places where a counter of 32 bits would go wrong, and calls of more rows than there are slots
    case(2, 64, launches=2**31 - 2, rows=[2] * 5, two_shot=[False, True, False, False, True]),
    case(2, 64, launches=2**32 - 3, rows=[4] * 5, two_shot=[True, False, False, True, True]),
    case(2, 64, slots=3, rows=[3, 4, 7, 2, 3], two_shot=[True, False, True, False, False], payload="special"),
    case(2, 64, slots=4, programs=1, rows=[9, 4, 13, 2, 8], two_shot=[False, True, True, False, True]),  # rounds
]


def check_bits(cases):
    """`check`, and of the last case, all of whose calls begin with the same rows: T and path change no bit."""
    one = case(
        cases[0]["size"], 264, rows=[6, 1, 4, 6, 1], two_shot=[False, False, False, True, True], same_rows=True
    )
    results = check([*cases, one])[0]
    for name in ("norm", "residual"):
        for step, rows in enumerate(one["rows"]):
            got, whole = (results[f"{len(cases)}.{number}.{name}"] for number in (step, 0))
            assert (got == whole[:rows]).all(), (name, step)


def test_two_ranks():
    check_bits(
        [
            case(2, 64),
            case(2, 2880, "bfloat16", weight_dtype="float32", weight_offset=1.0),
            case(2, 136, "float16", residual=False),
            case(2, 100, "float32"),
            case(2, 48, "float32", weight_dtype="bfloat16", aliased=True),
            case(2, 72, "bfloat16", payload="special"),
            case(2, 64, "float16", payload="special", aliased=True),
            case(2, 64, "float32", payload="special"),
            *WRAPS,
        ]
    )


def test_three_ranks():
    check_bits([case(3, 72, payload="special", two_shot=[True, False, True, True])])


def test_a_residual_that_stays_with_its_owner():
    """The same bits of norm_out, and of residual_out in the rows that a rank owns; NaN in the others."""
    whole = case(3, 264, rows=[4, 6, 2], two_shot=[True, True, False])
    results = run([whole, whole | {"residual_stays": True}])
    for rank, mine in enumerate(results):
        for step, rows in enumerate(whole["rows"]):
            assert (mine[f"1.{step}.norm"] == mine[f"0.{step}.norm"]).all(), (rank, step)
            for row in range(rows):
                got, want = mine[f"1.{step}.residual"][row], mine[f"0.{step}.residual"][row]
                if whole["two_shot"][step] and row % 3 != rank:
                    want = np.full_like(want, 0x7FFF)
                assert (got == want).all(), (rank, step, row)


def test_four_ranks():
    check_bits([case(4, 64, "float32", weight_offset=1.0, rows=[3, 5], two_shot=[True, False])])


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_size(size, dtype):
    """All weights, with and without residual, aliased or not, at hidden sizes of real models."""
    check(
        [
            case(size, hidden, dtype, weight_dtype=weight, residual=residual, aliased=residual, payload=payload)
            for hidden, weight, residual, payload in (
                (2880, dtype, True, "special"),
                (4096, "float32", False, "random"),
                (5120, "bfloat16", True, "random"),
                (8, "float16", True, "random"),
            )
        ],
        timeout_s=600,
    )


def is_nan(results, number, step):
    outputs = [results[f"{number}.{step}.{name}"] for name in ("norm", "residual")]
    return all(np.isnan(from_bits(bits, "bfloat16")).all() for bits in outputs)


@pytest.mark.parametrize("two_shot", [False, True])
def test_a_missing_rank(two_shot):
    """The last rank never comes to call 1: the others write NaN, go on writing NaN at once, and one names it."""
    results = run([case(3, 64, rows=[2] * 3, two_shot=[two_shot] * 3, limit_s=2, absent=[2, 1])])
    pages = [read_error_page(rank["0.page"].tolist()) for rank in results]
    for rank, page in enumerate(pages[:2]):
        assert page["op"] == 1, (rank, page)
        assert np.isfinite(from_bits(results[rank]["0.0.norm"], "bfloat16")).all()
        assert is_nan(results[rank], 0, 1) and is_nan(results[rank], 0, 2)
    assert any(page["code"] == ERROR_TIMED_OUT for page in pages[:2]), pages
    assert any(2 in page["missing"] for page in pages[:2]), pages


def test_a_late_rank_and_a_second_stream():
    """Rank 1 comes after rank 0 has given up: it must not return finite numbers, though all words of two
    rows have come. And while rank 0 waits, its counter of launches moves, as if a second stream had called."""
    one = case(2, 64, rows=[5], two_shot=[False], late=[1, 0], late_s=2)
    results = run([one | {"limit_s": 0.5}, one | {"other_stream": [0, 0]}])
    pages = [[read_error_page(rank[f"{number}.page"].tolist()) for rank in results] for number in (0, 1)]
    assert pages[0][0]["code"] == ERROR_TIMED_OUT and pages[0][0]["missing"] == [1], pages
    assert pages[0][1]["code"] == ERROR_ABORTED, pages
    assert pages[1][0]["code"] == ERROR_TWO_STREAMS, pages
    assert is_nan(results[0], 0, 0) and is_nan(results[1], 0, 0) and is_nan(results[0], 1, 0)


def test_a_program_that_waits_for_a_neighbour_when_all_programs_have_begun():
    """The counter that has moved then is no sign of a second stream; and what was read is made unsent again."""
    command = [sys.executable, "-W", "ignore", str(HERE / "kernels/all_reduce/neighbour_sums.py")]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=env, timeout=60, capture_output=True, text=True)
    assert done.stdout == "3.0 None\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    "bad", [(1, 64, "float32"), (9, 64, "float32"), (2, 63, "float32"), (2, 0, "float32"), (2, 64, "int8")]
)
def test_what_has_no_plan(bad):
    with pytest.raises(ValueError):
        plans.plan_for(*bad)


@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_plans(size, dtype):
    """Slices cover the row, none is empty, and every thread has words of its own."""
    for hidden in (8, 24, 64, 1000, 2880, 4096, 5120, 6144, 7168, 8192, 12288, 16384, 65536):
        plan = plans.plan_for(size, hidden, dtype)
        rest = plan.words - (plan.split - 1) * plan.slice_words
        assert 0 < rest <= plan.slice_words and plan.slice_words % 32 == 0
        block = plans.constants(plan, weight_dtype=dtype, has_residual=True, two_shot=False)["BLOCK"]
        assert block >= plan.slice_words and block & (block - 1) == 0 and plan.units in (1, 2, 4)
        assert plan.num_warps & (plan.num_warps - 1) == 0 and plan.num_warps <= 32
        for room in (1 << 20, 4 << 20, 11184810, 32 << 20):  # no more than a workspace may have, and no less
            if plans.total_bytes(plan, 1) > room:
                continue
            slots = plans.slots_of(plan, workspace_bytes=room, limit=None)
            more = slots + 1 if slots < size else slots + size
            assert plans.total_bytes(plan, slots) <= room < plans.total_bytes(plan, more)
            assert slots < size or slots % size == 0
            for limit in (0, 1, 2, 7, slots, slots + 1):
                found = plans.slots_of(plan, workspace_bytes=room, limit=limit)
                assert found == min(slots, next(n for n in range(max(1, limit), limit + size + 1) if n % size == 0))


@pytest.mark.parametrize("size", plans.SIZES)
def test_rows_at_once(size):
    """As many as there are programs for; by two-shot every program owns as many of its rows as any other."""
    for hidden, slots, rows in itertools.product((1024, 4096, 8192), (1, 5, 24, 853), (1, 2, 4, 12, 66, 264)):
        plan = plans.plan_for(size, hidden, "bfloat16")
        plan = dataclasses.replace(plan, two_shot_slices=min(2, plan.split))
        assert plans.rows_at_once(plan, slots, programs=rows * plan.split, two_shot=False) == min(rows, slots)
        programs = rows * plan.split // plan.two_shot_slices
        found = plans.rows_at_once(plan, slots, programs=programs, two_shot=True)
        assert found == max(n for n in range(1, min(rows, slots) + 1) if math.gcd(n, size) == 1)


CALLS = list(itertools.product((1, 3, 7, 24, 840, 853), (1, 5, 131), (1, 2, 6, 8, 15, 49, 522, 1707, 2048)))


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_the_launches_of_a_call(size, two_shot):
    """None has more rows than there are slots, and no row is left out. A rank owns the same rows in every call: a
    residual that one call left with the owners is read by another, which may be cut otherwise."""
    plan = plans.plan_for(size, 64, "bfloat16")
    for slots, at_once, rows in CALLS:
        found = plans.launches(plan, slots, (min(slots, at_once), 0), rows, two_shot)
        assert [start for _, start, _, _ in found] == [0, *itertools.accumulate(one.rows for one in found)][:-1]
        assert sum(one.rows for one in found) == rows
        for one in found:
            assert 1 <= one.rows <= slots and one.rounds == 1
            assert one.programs == min(at_once, slots, one.rows)
            assert one.start % size == 0 or slots % size
        assert len(found) == -(-rows // slots), "as few as there are slots for"


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_a_call_in_rounds(size, two_shot):
    """No round has more rows than there are slots, and every program has a row in each, by two-shot one for each
    owner; they are as few as there are slots for."""
    plan, several = plans.plan_for(size, 64, "bfloat16"), 0
    for slots, at_once, rows in CALLS:
        at_once, rounds = min(slots, at_once), -(-rows // slots)
        found = plans.launch_in_rounds(plan, slots, at_once, rows, two_shot)
        fits = rows // rounds >= at_once * (size if two_shot else 1)
        assert (found is not None) == (
            1 < rounds <= plans.MOST_ROUNDS and fits and (not two_shot or math.gcd(at_once, size) == 1)
        )
        if found is not None:
            several += 1
            assert found == (at_once, 0, rows, rounds)
    assert several


def test_many_rounds_are_one_launch_where_every_program_has_enough_rows():
    plan = plans.plan_for(4, 4096, "bfloat16")
    assert plans.launch_in_rounds(plan, 853, 131, 2048, True) == (262, 0, 2048, 3)
    assert plans.launch_in_rounds(plan, 853, 131, 1024, True) is None, "some have 3 rows"
    assert plans.launches(plan, 853, (131, 131), 1024, True) == [(262, 0, 512, 1), (262, 512, 512, 1)]
    assert plans.launches(plan, 853, (131, 131), 2048, True) == [(262, 0, 2048, 3)]
    assert len(plans.launches(plan, 853, (131, 0), 2048, True)) == 3, "there is no kernel of rounds"
    assert plans.launch_in_rounds(plan, 853, 131, 1024, False) == (524, 0, 1024, 2)
    most = plans.MOST_ROUNDS * 8
    assert plans.launch_in_rounds(plan, 8, 1, most, True).rounds * plans.COUNTER_STEP < 1 << 31
    assert plans.launch_in_rounds(plan, 8, 1, most + 1, True) is None, "what it adds to the counter has 32 bits"
