"""Rank script: the pull of `tune`, under the interpreter, on calls of changing T; prints the worst error of each."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np

from fd_fusion import reference
from fd_fusion.cli.tune.pull import NORM_WARPS, Pull
from fd_fusion.frameworks.tensors import numbers, place, tensor
from fd_fusion.spec import OpSpec
from tests.support.ranks import this_group

H, EPS = 264, 1e-5
NORMED_ROWS = 40


def values(who, rows, dtype):
    drawn = np.random.default_rng([rows, who]).standard_normal((rows, H), np.float32)
    return reference.round_to(drawn, dtype).astype(np.float32)


def main(dtype):
    group = this_group()
    framework, device, arch = place(group.rank)
    spec = OpSpec(group.rank, group.size, H, dtype, eps=EPS, device=device, arch=arch, timeout_s=20)
    rows_of_calls = 1, 40, 603, 3, 601  # 600 rows take two turns of the programs, and of three ranks two-shot
    pull = Pull(spec, group, max(rows_of_calls))
    for rows in rows_of_calls:
        parts = [values(rank, rows, dtype) for rank in range(group.size)]
        residual, weight = values(100, rows, dtype), values(101, 1, dtype)[0]
        pull.write(tensor(framework, parts[group.rank], dtype, device))
        out = tensor(framework, np.zeros((rows, H), np.float32), dtype, device)
        pull.reduce(out)
        alone = np.abs(numbers(out) - sum(parts)).max() / np.abs(sum(parts)).max()
        # One program a row: more rows show nothing more of the norm, and take the interpreter some seconds.
        some = slice(min(rows, NORMED_ROWS))
        out, held = (tensor(framework, x[some], dtype, device) for x in (numbers(out), residual))
        pull.norm(out, held, tensor(framework, weight, dtype, device), NORM_WARPS[0])
        norm, total = reference.all_reduce_rms_norm([part[some] for part in parts], residual[some], weight, eps=EPS)
        errors = [np.abs(numbers(t) - true).max() / np.abs(true).max() for t, true in ((out, norm), (held, total))]
        print(f"T={rows}", *(f"{error:.1e}" for error in (alone, *errors)), flush=True)
    pull.close()


if __name__ == "__main__":
    main(sys.argv[1])
