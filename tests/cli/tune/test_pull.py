"""The pull that `tune` measures fusing against: right sums between processes, and 16-byte accesses on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import run_ranks

ROOT = Path(__file__).parents[3]
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fd_fusion.kernels import pull_all_reduce as kernels

case = {"N": SIZE, "DTYPE": kernels.tl.bfloat16, "UNIT": 8, "SIZE": kernels.BLOCK, "TWO_SHOT": SHOTS == 2}
names = kernels.pull_all_reduce.arg_names
types = {"own": "i64", "out": "i64", "sums": "i64"}
signature = {n: "constexpr" if n in case else types.get(n, "i32") for n in names}
source = ASTSource(kernels.pull_all_reduce, signature, case)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.NUM_WARPS})
print(made.asm["ptx"])
"""


@pytest.mark.parametrize("ranks, dtype, most", [(2, "bfloat16", 1e-2), (3, "float32", 1e-6)])
def test_sums_and_norms_are_right(ranks, dtype, most):
    ended = run_ranks("pull_rank.py", ranks, dtype, timeout_s=120, env={"TRITON_INTERPRET": "1"})
    for rank in ended:
        assert rank.status == 0, rank.text
        lines = [line.split() for line in rank.text.splitlines() if line.startswith("T=")]
        assert [line[0] for line in lines] == ["T=1", "T=40", "T=603", "T=3", "T=601"]
        assert max(float(error) for line in lines for error in line[1:]) < most, rank.text


@pytest.mark.parametrize("size, shots", [(2, 1), (4, 1), (4, 2)])
def test_every_rank_is_read_in_whole_vectors(size, shots):
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    code = COMPILE.replace("SIZE,", f"{size},", 1).replace("SHOTS", str(shots))
    ptx = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert ptx.returncode == 0, ptx.stderr
    vectors = re.findall(r"ld\.global\.v4\.b32", ptx.stdout)
    assert len(vectors) == size * shots and re.search(r"st\.global\.v4\.b32", ptx.stdout), ptx.stdout
    stores, ordered = (len(re.findall(what, ptx.stdout)) for what in (r"st\.global\.wt", r"\.release.*\.exch"))
    assert (stores, ordered) == (3 - shots, shots - 1) and "ld.volatile.global" in ptx.stdout
