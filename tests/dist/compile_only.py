"""Fill Triton's cache for a list of kernels, so that ranks only load them: no group, one process.

compile_only.py [--both-paths] N,H,DTYPE,WEIGHT_DTYPE ...
"""

import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from fd_fusion.backends import triton as backend
from fd_fusion.cli.tune.pull import compile_kernels
from fd_fusion.comm.group import Group
from fd_fusion.spec import OpSpec


def compile_all(kernels, *flags):
    """One process for each of these (N, H, dtype, weight dtype), all at once.

    They load no more of torch than they use: with all of it, so many contexts have filled a GPU.
    """
    command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), *flags]
    env = {**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
    for process in [subprocess.Popen([*command, ",".join(map(str, kernel))], env=env) for kernel in kernels]:
        process.wait(timeout=150)


def main(kernels, two_shot_rows):
    import torch

    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    device = {"device": "gpu", "arch": 10 * major + minor}
    for kernel in kernels:
        size, hidden, dtype, weight_dtype = kernel.split(",")
        size = int(size)
        spec = OpSpec(0, size, int(hidden), dtype, weight_dtypes=(weight_dtype,), two_shot_rows=two_shot_rows, **device)
        compile_kernels(spec)
        backend.TritonOp(spec, Group("compile", 0, size, tuple(range(size)), None))


if __name__ == "__main__":
    both = sys.argv[1] == "--both-paths"  # whatever the plan says
    main(sys.argv[1 + both :], 1 if both else None)
