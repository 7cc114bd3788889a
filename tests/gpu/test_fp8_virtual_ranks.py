"""FP8 out of the all-reduce kernel on one GPU, N virtual ranks in one process: every bit as the contract has it.

Each case is a child process under a limit on its time: a mistake in a spinning kernel is a hang.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {  # N, H, formula, OUTPUT, two-shot
    "2": (2, 4096, "multiply", "both", False),
    "2-split": (2, 5120, "multiply", "both", False),
    "4-two-shot": (4, 5120, "divide", "both", True),
    "4-two-slices": (4, 4096, "multiply", "both", True),
    "8": (8, 7168, "multiply_pow2", "both", False),
    "8-two-shot": (8, 8192, "multiply", "both", True),
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
    done = subprocess.run(command, env={**os.environ, **env}, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(size, hidden, formula, output, two_shot):
    """Codes and scales of every rank, in both orders of the scales, with fewer programs than rows."""
    ranks = VirtualRanks(plan_for(size, hidden, "bfloat16", fp8=True), 3)
    for rows, by_column in ((1, False), (7, True)):
        case = Case(size, rows, hidden, "bfloat16", seed=rows)
        codes = [torch.full((rows, hidden), 0xA5, dtype=torch.uint8, device="cuda") for _ in range(size)]
        shape = (hidden // 128, rows + 3) if by_column else (rows, hidden // 128)
        scales = [torch.full(shape, -7.0, device="cuda") for _ in range(size)]
        strides = (1, rows + 3) if by_column else (hidden // 128, 1)
        constants = plans.constants(ranks.plan, weight_dtype="bfloat16", has_residual=True, two_shot=two_shot,
                                    fp8=(output, formula))  # fmt: skip
        grid = plans.grid(ranks.plan, ranks.programs, rows, two_shot)

        def arguments(rank, case=case, codes=codes, scales=scales, strides=strides):
            return (*ranks.arguments(case, rank), codes[rank].data_ptr(), scales[rank].data_ptr(), *strides, 1.0)

        all_reduce_rms_norm_fp8.warmup(*arguments(0), grid=grid, **constants)._init_handles()
        launch = all_reduce_rms_norm_fp8[grid]
        capture(size, [lambda rank, a=arguments, c=constants, g=launch: g(*a(rank), **c)]).replay()
        torch.cuda.synchronize()
        assert not any(ranks.failures()), ranks.failures()
        assert max(case.errors()) < 3e-3, case.errors()
        want_codes, want_scales = quantise(case.norm_out[0].float().cpu().numpy(), formula)
        for rank in range(size):
            got = (scales[rank].T if by_column else scales[rank])[:rows].cpu().numpy()
            assert (codes[rank].cpu().numpy() == want_codes).all(), (rows, rank)
            assert (got.view("uint32") == want_scales.view("uint32")).all(), (rows, rank)


if __name__ == "__main__":
    import torch
    from bench.virtual_ranks import Case, VirtualRanks, capture

    from fd_fusion.kernels.all_reduce import plan as plans
    from fd_fusion.kernels.all_reduce.kernel_fp8 import all_reduce_rms_norm_fp8
    from fd_fusion.kernels.all_reduce.plan import plan_for
    from fd_fusion.reference import quantise

    for name in sys.argv[1:]:
        run(*CASES[name])
        print(f"{name}: right", flush=True)
