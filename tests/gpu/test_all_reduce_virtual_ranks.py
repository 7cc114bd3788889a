"""The all-reduce kernel on one GPU, N virtual ranks in one process: values, bits, failures, 100,000 replays.

Each case is a child process under a limit on its time: a mistake in a spinning kernel is a hang.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {  # name of a function below, its arguments, seconds
    "values-2-bf16": ("values", 2, 4096, "bfloat16", 90),
    "values-2-fp32": ("values", 2, 2880, "float32", 90),
    "values-3-fp16": ("values", 3, 5120, "float16", 90),
    "values-6-fp32": ("values", 6, 1024, "float32", 90),
    "values-7-bf16": ("values", 7, 7168, "bfloat16", 90),
    "values-8-bf16": ("values", 8, 8192, "bfloat16", 90),
    "values-small": ("values", 5, 8, "float16", 90),
    "missing": ("missing_rank", 2, 4096, 90),
    "missing-two-shot": ("missing_rank", 3, 4096, 90),
    "two-streams": ("two_streams", 90),
    "replays-2": ("replays", 2, 4096, 300),
    "replays-8": ("replays", 8, 7168, 300),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    env = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'examples'}"
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, env={**os.environ, **env}, timeout=CASES[name][-1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def values(size, hidden_size, dtype):
    """Right values, equal bits on all ranks, on both paths, for every T, with fewer programs than rows."""
    plan = plan_for(size, hidden_size, dtype)
    ranks = VirtualRanks(plan, 3)
    whole = Case(size, 8, hidden_size, dtype)
    cases = [whole, *(whole.part(start, stop) for start, stop in ((0, 1), (3, 8), (6, 8), (2, 3)))]
    # One rounding, which over many elements makes half a unit; fp32 counts its own arithmetic. A few elements may all
    # be rounded by nearly a whole one.
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 5e-7}[dtype]
    bound = 0.6 * unit if hidden_size >= 1024 else unit + 2e-7
    summed = whole.x[0].float()
    for x in (*whole.x[1:], whole.residual):
        summed = summed + x.float()
    summed = summed.to(whole.residual.dtype)
    for two_shot in (False, True, False):
        for case in cases:
            capture(size, [ranks.prepare(case, two_shot)]).replay()
            torch.cuda.synchronize()
            assert not any(ranks.failures()), ranks.failures()
            assert max(case.errors()) <= bound, (two_shot, case.rows, case.errors())
            rows = slice(case.start, case.start + case.rows)
            assert torch.equal(case.norm_out[0], whole.norm_out[0][rows]), (two_shot, case.rows)
            assert torch.equal(case.residual_out[0], summed[rows]), (two_shot, case.rows)


def missing_rank(size, hidden_size):
    """The last rank does not come: all raise, also the one that is merely late, and in every later call."""
    ranks = VirtualRanks(plan_for(size, hidden_size, "bfloat16"), 4, limit_ns=200_000_000)
    case = Case(size, 2, hidden_size, "bfloat16")
    launch = ranks.prepare(case, two_shot=size > 2)
    for rank in range(size - 1):
        with torch.cuda.stream(torch.cuda.Stream()):
            launch(rank)
    torch.cuda.synchronize()
    launch(size - 1)
    torch.cuda.synchronize()
    found = ranks.failures()
    assert all(found), found
    blamed = [error["missing"] for error in found if error["code"] == ERROR_TIMED_OUT]
    assert blamed and all(ranks == [size - 1] for ranks in blamed), found  # not who waits for it too
    assert found[size - 1]["code"] == ERROR_ABORTED, found
    capture(size, [launch]).replay()
    torch.cuda.synchronize()
    assert all(out.isnan().all() for out in (*case.norm_out, *case.residual_out))


def two_streams():
    """Rank 0 waits; meanwhile its counter moves, as if another stream had used the workspace."""
    ranks = VirtualRanks(plan_for(2, 4096, "bfloat16"), 1)
    case = Case(2, 1, 4096, "bfloat16")
    launch = ranks.prepare(case)
    one = torch.full((1,), 7 * plans.COUNTER_STEP, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        launch(0)
    time.sleep(0.01)
    with torch.cuda.stream(torch.cuda.Stream()):
        ranks.local[0][plans.COUNTER].copy_(one[0])
    torch.cuda.synchronize()
    assert ranks.failures()[0]["code"] == ERROR_TWO_STREAMS, ranks.failures()
    assert case.norm_out[0].isnan().all()


def replays(size, hidden_size, count=100_000):
    """Calls of changing T on both paths in one graph, again and again: the same bits to the end."""
    ranks = VirtualRanks(plan_for(size, hidden_size, "bfloat16"), 2)
    cases = [Case(size, rows, hidden_size, "bfloat16", seed=rows) for rows in (1, 3, 7, 2)]
    graph = capture(size, [ranks.prepare(case, path) for case, path in zip(cases, (False, True, True, False))])
    first = None
    for number in range(count):
        graph.replay()
        if number in (0, count // 2, count - 1):
            torch.cuda.synchronize()
            outputs = [out.clone() for case in cases for out in (*case.norm_out, *case.residual_out)]
            first = first or outputs
            assert all(map(torch.equal, first, outputs)), number
            assert all(max(case.errors()) < 2.5e-3 for case in cases)
            assert not any(ranks.failures()), ranks.failures()


if __name__ == "__main__":
    import time

    import torch
    from bench.virtual_ranks import Case, VirtualRanks, capture

    from fd_fusion.kernels.all_reduce import plan as plans
    from fd_fusion.kernels.all_reduce.error_page import ERROR_ABORTED, ERROR_TIMED_OUT, ERROR_TWO_STREAMS
    from fd_fusion.kernels.all_reduce.plan import plan_for

    function, *arguments, _ = CASES[sys.argv[1]]
    globals()[function](*arguments)
