"""The real kernel under Triton's interpreter, as real processes over shared memory: values, bits, failures."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from kernel_rank import fill, from_bits, inputs, region_bytes

from fd_fusion.kernels import plan as plans

HERE = Path(__file__).parent


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
        command = [sys.executable, "-W", "ignore", str(HERE / "kernel_rank.py"), str(folder)]
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
    rows = more.pop("rows", [1, 3, 5, 2])
    base = {
        "size": size,
        "hidden_size": hidden_size,
        "dtype": dtype,
        "weight_dtype": dtype,
        "rows": rows,
        "programs": 3,
    }
    base["two_shot"] = [False, True, False, True] if size == 2 else [True, False, True, True]
    return {**base, **more}


def exact(case, step):
    """norm_out and residual_out in fp64, and how far off a plain computation of the contract may be."""
    dtype, size = case["dtype"], case["size"]
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


def check(cases):
    with np.errstate(all="ignore"):
        results = run(cases)
    for number, one in enumerate(cases):
        for step in range(len(one["rows"])):
            for name in ("norm", "residual"):
                bits = [rank[f"{number}.{step}.{name}"].tobytes() for rank in results]
                assert len(set(bits)) == 1, f"case {number} step {step}: ranks differ in {name}"
            check_values(one, step, results, number)
        assert all(plans.read_error_page(rank[f"{number}.page"].tolist()) is None for rank in results)
    return results


def test_two_ranks():
    check(
        [
            case(2, 64),
            case(2, 2880, "bfloat16", weight_dtype="float32", weight_offset=1.0),
            case(2, 136, "float16", residual=False),
            case(2, 100, "float32"),
            case(2, 48, "float32", weight_dtype="bfloat16", aliased=True),
            case(2, 72, "bfloat16", payload="special"),
            case(2, 64, "float16", payload="special", aliased=True),
            case(2, 64, "float32", payload="special"),
            case(2, 64, epoch=2**31 - 2, rows=[2] * 5, two_shot=[False, True, False, False, True]),
            case(2, 64, epoch=2**32 - 3, rows=[4] * 5, two_shot=[True, False, False, True, True]),
        ]
    )
