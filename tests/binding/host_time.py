"""The host's time of one pair in an eager forward, its launch left out; run, this file prints it."""

import sys
import timeit
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import paddle

sys.path.insert(0, str(Path(__file__).parents[2]))

from fd_fusion.backends import triton as backend
from fd_fusion.binding.pairs import Pair
from fd_fusion.comm.group import Group
from fd_fusion.frameworks import triton_launch
from fd_fusion.hosts.own_layers import OwnStock
from fd_fusion.layers.rms_norm import RMSNorm
from fd_fusion.site import ForwardCount, Site
from fd_fusion.spec import OpSpec

SIZE, ROWS, H = 2, 16, 4096
GROUP = Group("host", 0, SIZE, tuple(range(SIZE)), None)


def op_with(launch_of, weight_dtypes=("bfloat16",), fp8=(), **instead):
    """The triton backend as it is open on a GPU, but for its memory and its kernels: `launch_of(constants)`.

    instead: other functions in the place of those of `triton_launch`, by name.
    """

    def prepare(kernel, like, constants, device):
        return triton_launch.Loaded(launch_of(constants), 2)

    device = {"device": "gpu", "arch": 90}
    spec = OpSpec(0, SIZE, H, "bfloat16", weight_dtypes=weight_dtypes, fp8=fp8, timeout_s=1.0, **device)
    functions = dict.fromkeys(("require_mode", "load_kernel"), mock.Mock())
    functions |= {"prepare": prepare, "uses_pdl": lambda: False, **instead}
    with (
        mock.patch.object(backend, "CudaIpc", lambda: SimpleNamespace(multiprocessors=lambda: 132)),
        mock.patch.multiple(triton_launch, **functions),
    ):
        op = backend.TritonOp(spec, GROUP)
    op._own = 0, 0
    return op


def pair_of(norm, weight_dtype):
    return Pair("o_proj -> norm", GROUP, H, "bfloat16", weight_dtype, OwnStock(None, norm))


def pair_and_step():
    """A proven Site and one turn of it: hand over, finish."""
    op = op_with(lambda constants: lambda *args: None)
    pair = pair_of(RMSNorm(H, dtype="bfloat16"), "bfloat16")
    site = Site(pair.name, op, pair.stock, hooks=pair.hooks, forwards=ForwardCount())
    site.end_proof(True)
    partial, residual = (paddle.ones([ROWS, H], dtype="bfloat16") for _ in range(2))

    def step():
        return site.finish(site.hand_over(partial), residual)

    return site, step


def two_outputs():
    """What no pair can do without: two new tensors, by the cheapest way there is."""
    x = paddle.ones([ROWS, H], dtype="bfloat16")
    make = getattr(paddle._C_ops, "empty_like", None)
    if make is None:
        return lambda: (paddle.empty_like(x), paddle.empty_like(x))
    return lambda: (make(x, x.dtype, x.place), make(x, x.dtype, x.place))


class Plain:
    """How fast Python itself is here: as many calls as a pair makes."""

    kept, other = {"a": 1}, 2

    def call(self, first, second):
        return self.kept["a"] if first is second else self.other

    def calls(self):
        for _ in range(24):
            self.call(1, 2)
            self.call(1, 1)


def measure(rounds=240, number=50):
    """(us of a pair, us of its two outputs alone, us of plain calls): the least of many rounds, taken in turn."""
    _, step = pair_and_step()
    parts = [timeit.Timer(step), timeit.Timer(two_outputs()), timeit.Timer(Plain().calls)]
    times = [[part.timeit(number) for part in parts] for _ in range(rounds)]
    return tuple(min(column) / number * 1e6 for column in zip(*times))


if __name__ == "__main__":
    with paddle.no_grad():
        print("host time of a pair: {:.2f} us, of it two outputs {:.2f}; 48 plain calls: {:.2f}".format(*measure()))
