"""Tensors of Paddle or torch: what goes in comes out, in every dtype."""

import numpy as np
import paddle
import pytest

from fd_fusion.frameworks import tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numbers_go_in_and_out(dtype):
    values = np.array([[-0.0, 1.5], [-3.0, 256.0]], np.float32)
    made = tensors.tensor(paddle, values, dtype, "cpu")
    values[0, 0] = 7.0
    assert tensors.dtype_name(made) == tensors.dtype_name(made.dtype) == dtype
    got = tensors.numbers(made)
    assert got.dtype == np.float32 and got.tolist() == [[0.0, 1.5], [-3.0, 256.0]] and np.signbit(got[0, 0])


def test_a_dtype_without_a_framework_keeps_its_name():
    assert tensors.dtype_name("bfloat16") == "bfloat16"


def test_on_a_cpu_there_is_one_place_and_nothing_to_wait_for():
    assert tensors.devices(paddle) == ("cpu", None, 0)
    tensors.synchronize(paddle)
