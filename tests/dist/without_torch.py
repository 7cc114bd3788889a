"""Rank script, GPU with torch: the triton backend while nothing can import torch, as it is where Paddle is alone.

A stand-in for Paddle offers the few names that the backend asks of it, made of torch's functions. What it proves
is Triton's driver object: Triton compiles, loads and launches here with no torch to import.
"""

import os
import sys
from types import ModuleType, SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import triton_calls as calls

from tests.support import tensors
from tests.support.all_reduce_cases import Case, judge


def without_torch(group, options):
    import torch

    case = Case(group.size, 5, options.hidden)
    inputs = [tensors.tensor(bits, case.dtype, "gpu") for bits in (case.partial(group.rank), *case.common())]
    torch.empty(0, device="cuda")
    paddle = ModuleType("paddle")
    paddle.cuda = SimpleNamespace(
        current_device=torch.cuda.current_device,
        set_device=torch.cuda.set_device,
        get_device_capability=torch.cuda.get_device_capability,
    )
    paddle._C = SimpleNamespace(_cuda_getCurrentRawStream=torch._C._cuda_getCurrentRawStream)
    paddle.to_tensor = lambda values: SimpleNamespace(
        astype=lambda name: torch.from_numpy(values.copy()).to(getattr(torch, name)).cuda()
    )
    paddle.empty = lambda shape, dtype: torch.empty(shape, dtype=dtype, device="cuda")
    paddle.bfloat16 = torch.bfloat16
    hidden = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] == "torch"}
    sys.modules.update(dict.fromkeys(hidden), torch=None, paddle=paddle)
    op = calls.open_op(group, case, options)
    outputs = op.finish(*inputs, case.eps, 0.0)
    op.check()
    assert sys.modules["torch"] is None
    sys.modules.update(hidden)
    bits = [tensors.bits_of(out, case.dtype) for out in outputs]
    assert judge(case, *bits) <= 1
    calls.digest.update(bits[0].tobytes())
    op.close()


if __name__ == "__main__":
    calls.without_torch = without_torch
    calls.main()
