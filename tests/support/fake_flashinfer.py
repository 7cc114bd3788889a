"""Writes a package tree `flashinfer` of the tests' own: the outside of one release, and a Lamport kernel in Python.

The fake stands in for the interface only. Its kernel talks to the other ranks through the same workspace as the
real one, so a wrong address, a wrong offset or a wrong fill shows on a CPU.
"""

from pathlib import Path

from fd_fusion.backends.flashinfer.calls import BASE

KERNEL = '''
import ctypes, time
import numpy as np

CALLS, BUILDS = [], []

def at(address, count, dtype):
    """`count` numbers at an address of this process."""
    return np.frombuffer((ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(int(address)), dtype)

def run(a):
    """One-shot, float32, on CPU addresses: push to every rank, poll the own buffer until no element is -0.0."""
    n, me, rows, h = a["world_size"], a["world_rank"], a["token_num"], a["hidden_dim"]
    table = a["workspace_ptrs"].numpy()
    assert len(table) == 3 * n + 1 and a["pattern_code"] == 1
    control = at(table[3 * n], 5, np.int32)
    control[0] = 1
    flag, size = int(control[2]), int(control[3])
    lamport = [at(table[2 * n + r] + flag % 3 * size, n * rows * h, np.int32) for r in range(n)]
    x = a["allreduce_in"].numpy().reshape(-1).view(np.int32).copy()
    x[x == -(2**31)] = 0
    for r in range(n):
        lamport[r][me * rows * h : (me + 1) * rows * h] = x
    at(table[2 * n + me] + (flag + 2) % 3 * size, int(control[4]), np.int32)[:] = -(2**31)
    while (lamport[me] == -(2**31)).any():
        time.sleep(0.001)
    total = lamport[me].view(np.float32).reshape(n, rows, h).sum(0, dtype=np.float32)
    total = total + a["residual_in"].numpy()
    scale = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + a["rms_eps"])
    weight = a["rms_gamma"].numpy() + (a.get("weight_bias") or 0.0)
    a["residual_out"].set_value(total)
    a["norm_out"].set_value((total * scale * weight).astype(np.float32))
    control[2], control[4], control[0] = (flag + 1) % 3, n * rows * h, 0
'''

MODULE = """
import functools, time
import torch
from . import kernel

@functools.cache
def get_trtllm_comm_module():
    kernel.BUILDS.append(time.time())
    time.sleep({build_s})

def trtllm_allreduce_fusion({parameters}):
    call = dict(locals())
    kernel.CALLS.append(call)
    {body}

def lazy():
    import torch
    from torch import nn
    return torch
"""


def write(folder: Path, version: str = "0.7.2", *, extra=(), runs=False, raises="", build_s=0, base=BASE) -> Path:
    """A release on disk; `folder` is to be put on sys.path.

    Args:
        extra: parameters after the 21 of every release, each with the default None.
        runs: calls really reduce, in float32 on CPU tensors; otherwise they are only recorded.
        raises: an expression that is raised while flashinfer.comm is imported.

    While it is imported it calls `builtins.during_import`, if a test has put a function there.
    """
    comm = folder / "flashinfer" / "comm"
    comm.mkdir(parents=True)
    (folder / "flashinfer" / "__init__.py").write_text(f'from . import utils\n__version__ = "{version}"\n')
    (folder / "flashinfer" / "utils.py").write_text("import torch\nimport torch.nn.functional as F\n")
    parameters = ", ".join([*base, *(f"{name}=None" for name in extra)])
    body = "kernel.run(call)" if runs else "pass"
    (comm / "kernel.py").write_text(KERNEL)
    (comm / "trtllm_ar.py").write_text(MODULE.format(parameters=parameters, body=body, build_s=build_s))
    lines = ["from . import trtllm_ar", "import builtins", 'getattr(builtins, "during_import", int)()']
    lines.append(f"raise {raises}" if raises else "")
    lines.append("from .trtllm_ar import trtllm_allreduce_fusion")
    (comm / "__init__.py").write_text("\n".join(lines) + "\n")
    return folder


def write_torch(folder: Path) -> Path:
    """A package named torch that is not Paddle, for machines without the real one."""
    (folder / "torch" / "nn").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("from . import nn\n\nclass Tensor:\n    real = True\n")
    (folder / "torch" / "nn" / "__init__.py").write_text("from . import functional\n")
    (folder / "torch" / "nn" / "functional.py").write_text("")
    return folder
