"""Bits in, bits out: the tests' numbers as tensors of Paddle, or of torch where there is no Paddle."""

import importlib.util

import numpy as np

from fd_fusion import reference

HAS_PADDLE = importlib.util.find_spec("paddle") is not None
_BITS = {"float32": np.int32, "bfloat16": np.int16, "float16": np.int16}


def to_bits(values, dtype):
    """fp32 numbers rounded to `dtype`, as the integers of their bits."""
    rounded = reference.round_to(np.ascontiguousarray(values, np.float32), dtype)
    if dtype == "bfloat16":
        return (np.ascontiguousarray(rounded, np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    return rounded.view(_BITS[dtype])


def from_bits(bits, dtype):
    if dtype == "bfloat16":
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype).astype(np.float32)


def tensor(bits, dtype, device="cpu"):
    """A new tensor with these bits on "cpu" or "gpu"."""
    if HAS_PADDLE:
        import paddle

        made = paddle.to_tensor(bits).view(dtype)  # to_tensor copies
        return made.cuda() if device == "gpu" else made
    import torch

    made = torch.from_numpy(bits.copy()).view(getattr(torch, dtype))
    return made.cuda() if device == "gpu" else made


def bits_of(made, dtype):
    """The bits of a tensor as a NumPy array of integers."""
    name = np.dtype(_BITS[dtype]).name
    if HAS_PADDLE:
        return made.view(name).numpy()
    import torch

    return made.view(getattr(torch, name)).cpu().numpy()


def synchronize(device):
    if device == "cpu":
        return
    if HAS_PADDLE:
        import paddle

        paddle.device.synchronize()
    else:
        import torch

        torch.cuda.synchronize()
