"""The memory of a tensor as a NumPy array, so that a formula can change it in place as a kernel does."""

import ctypes

import ml_dtypes
import numpy as np

_TYPES = {"int32": np.int32, "int64": np.int64, "bool": np.bool_, "float32": np.float32}
_TYPES |= {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


def view(tensor):
    """The memory of a contiguous tensor, in its shape."""
    dtype = np.dtype(_TYPES[str(tensor.dtype).rpartition(".")[2]])
    count = int(np.prod(tensor.shape))
    if count == 0:
        return np.zeros(tensor.shape, dtype)
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(tensor.data_ptr())
    return np.frombuffer(buffer, dtype=dtype).reshape(tensor.shape)


def flat(tensor):
    """The same as one row."""
    return view(tensor).reshape(-1)
