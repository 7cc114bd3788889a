"""What the QK norm hands to Triton on a GPU, without one: types to compile for, constants, and each launch."""

import inspect
from types import SimpleNamespace

import pytest

from fd_fusion.backends import qk_rms_norm as backend
from fd_fusion.frameworks.triton_launch import Loaded, interpreting

D = 64


def fake(shape, address, dtype="bfloat16"):
    """A contiguous tensor on a GPU, as far as a launch reads it."""
    stride = (shape[1], 1) if len(shape) == 2 else (1,)
    calls = {"stride": lambda: stride, "data_ptr": lambda: address, "is_contiguous": lambda: True}
    return SimpleNamespace(shape=shape, dtype=dtype, ndim=len(shape), is_cuda=True, **calls)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("address, divisor", [(4096, 16), (4098, 2)])
def test_a_kernel_on_a_gpu_gets_its_arguments_in_the_order_of_its_signature(monkeypatch, pdl, address, divisor):
    made, launched = [], []

    def prepare(kernel, like, constants, device):
        made.append((kernel, like, constants, device))
        return Loaded(lambda *args: launched.append(args), 1)

    monkeypatch.setattr(backend, "prepare", prepare)
    # Triton is imported once in a process, and later tests run its interpreter.
    monkeypatch.setattr(backend, "interpreting", lambda device: interpreting("cpu"))
    monkeypatch.setattr(backend, "require_mode", lambda device: None)
    monkeypatch.setattr(backend, "uses_pdl", lambda: pdl)
    backend.launcher.cache_clear()
    try:
        qkv, weight = fake((5, 4 * D), address), fake((D,), 8192, "float32")
        backend.qk_rms_norm(qkv, weight, weight, q_heads=2, kv_heads=1, head_dim=D, eps=1e-6)
    finally:
        backend.launcher.cache_clear()
    ((kernel, like, constants, device),) = made
    names = list(inspect.signature(kernel.fn).parameters)
    assert device == "gpu" and constants["PDL"] == pdl and constants.get("launch_pdl", False) == pdl
    assert names[len(like) :] == [name for name in names if name in constants], "constants are the tail"
    assert [str(one.dtype) for one in like[:5]] == ["bfloat16"] * 3 + ["float32"] * 2
    assert {one.data_ptr() for one in like[:5]} == {*like[6:]} == {divisor}
    rows = -(-5 * 3 // constants["HEADS"])
    assert launched == [(rows, address, address, address, 8192, 8192, 5, 4 * D, 0, 0)]
