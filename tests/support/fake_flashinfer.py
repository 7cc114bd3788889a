"""Writes a package tree `flashinfer` of the tests' own, whose compiled kernel is a Lamport kernel in Python.

The fake stands in for the build and for the entry only. Its kernel talks to the other ranks through the same
workspace as the real one, so a wrong address, a wrong offset or a wrong fill shows on a CPU.
"""

from pathlib import Path

KERNEL = '''
import ctypes, time
import numpy as np

CALLS, LOADS = [], []
NAMES = """allreduce_in world_size world_rank token_num hidden_dim workspace_ptrs launch_with_pdl use_oneshot
    trigger_completion_at_end fp32_acc pattern_code allreduce_out residual_in residual_out norm_out quant_out
    scale_out rms_gamma rms_eps scale_factor layout_code block_quant_group_size weight_bias""".split()

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

class load_module:
    def __init__(self, path):
        LOADS.append((path, time.time()))

    def trtllm_allreduce_fusion(self, *args):
        CALLS.append(dict(zip(NAMES, args)))
        run(CALLS[-1])
'''


MODULE = """
import os, pathlib, time
import torch

def get_trtllm_comm_module():
    time.sleep({build_s})
    base = os.environ.get("FLASHINFER_WORKSPACE_BASE") or os.path.expanduser("~")
    folder = pathlib.Path(base, ".cache/flashinfer/{version}/90a/cached_ops/trtllm_comm")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "trtllm_comm.so", "a") as file:
        file.write(f"with real torch: {{getattr(torch.Tensor, 'real', None) is True}}\\n")
"""


def write(folder: Path, version: str = "0.7.2", *, raises="", build_s=0) -> Path:
    """A release on disk, and a `tvm_ffi` that loads what it builds; `folder` is to be put on sys.path.

    Args: raises: an expression that is raised while flashinfer.comm is imported.
    """
    comm = folder / "flashinfer" / "comm"
    comm.mkdir(parents=True)
    (folder / "flashinfer" / "__init__.py").write_text(f'from . import utils\n__version__ = "{version}"\n')
    (folder / "flashinfer" / "utils.py").write_text("import torch\nimport torch.nn.functional as F\n")
    (comm / "trtllm_ar.py").write_text(MODULE.format(version=version, build_s=build_s))
    (comm / "__init__.py").write_text(f"raise {raises}\n" if raises else "from . import trtllm_ar\n")
    (info := folder / f"flashinfer_python-{version}.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {version}\n")
    (folder / "tvm_ffi.py").write_text(KERNEL)
    return folder


def write_torch(folder: Path) -> Path:
    """A package named torch that is not Paddle, for machines without the real one."""
    (folder / "torch" / "nn").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("from . import nn\n\nclass Tensor:\n    real = True\n")
    (folder / "torch" / "nn" / "__init__.py").write_text("from . import functional\n")
    (folder / "torch" / "nn" / "functional.py").write_text("")
    return folder
