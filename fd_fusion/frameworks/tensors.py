"""Tensors of the framework of this process, Paddle or torch: which one it is, its devices, and NumPy in and out."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def paddle_or_torch() -> ModuleType:
    """Import Paddle, or torch where there is no Paddle."""
    name = next((n for n in ("paddle", "torch") if n in sys.modules), None)
    if name is None:
        name = "paddle" if importlib.util.find_spec("paddle") else "torch"
    return importlib.import_module(name)


def devices(framework: Any) -> tuple[str, int | None, int]:
    """Return ("gpu", 90, number of GPUs), or ("cpu", None, 0)."""
    on_paddle = framework.__name__ == "paddle"
    count = framework.device.cuda.device_count() if on_paddle and framework.is_compiled_with_cuda() else 0
    count = framework.cuda.device_count() if not on_paddle else count
    if not count:
        return "cpu", None, 0
    major, minor = framework.cuda.get_device_capability()
    return "gpu", 10 * major + minor, count


def place(rank: int) -> tuple[Any, str, int | None]:
    """Put this process on its device. Returns (paddle or torch, "cpu" or "gpu", arch)."""
    framework = paddle_or_torch()
    device, arch, count = devices(framework)
    if framework.__name__ == "paddle":
        framework.set_device(f"gpu:{rank % count}" if count else "cpu")
        framework.set_grad_enabled(False)
    elif count:
        framework.cuda.set_device(rank % count)
    if count:
        framework.zeros([1]).cuda()  # makes the context current
    return framework, device, arch


def dtype_name(tensor: Any) -> str:
    """Return "float32", "bfloat16" ... of a tensor or of a dtype: its name without the framework's prefix."""
    return str(getattr(tensor, "dtype", tensor)).rpartition(".")[2]


def tensor(framework: Any, values: np.ndarray, dtype: str, device: str) -> Any:
    """Copy an array into a tensor on the current "cpu" or "gpu". A value that `dtype` does not hold is rounded."""
    if framework.__name__ == "paddle":
        return framework.to_tensor(values).astype(dtype)
    made = framework.from_numpy(values.copy()).to(getattr(framework, dtype))
    return made.cuda() if device == "gpu" else made


def numbers(tensor: Any) -> np.ndarray:
    """Copy a tensor into an array of float32."""
    return (tensor.float().cpu() if hasattr(tensor, "float") else tensor.astype("float32")).numpy()


def bytes_of(tensor: Any) -> np.ndarray:
    """Copy a tensor of one-byte elements, float8_e4m3fn for example, into an array of uint8."""
    return tensor.view(paddle_or_torch().uint8).cpu().numpy()


def maker(device: str) -> Callable[[Sequence[int], Any], Any]:
    """Return a function: (shape, dtype) -> a new tensor on the current "cpu" or "gpu", as fast as it can be made.

    Paddle's op is called at once, in a third of paddle.empty's time. The place is that of new tensors now.
    """
    framework = paddle_or_torch()
    make = getattr(getattr(framework, "_C_ops", None), "empty", None)
    if framework.__name__ == "paddle" and make is not None:
        place = framework.empty([1]).place
        return lambda shape, dtype: make(shape, dtype, place)
    if framework.__name__ == "paddle" or device == "cpu":
        return lambda shape, dtype: framework.empty(shape, dtype=dtype)
    where = framework.device("cuda", framework.cuda.current_device())
    return lambda shape, dtype: framework.empty(shape, dtype=dtype, device=where)


def synchronize(framework: Any) -> None:
    """Wait until the current GPU has done its work; without one there is nothing to wait for."""
    if framework.__name__ != "paddle":
        if framework.cuda.is_initialized():
            framework.cuda.synchronize()
    elif framework.is_compiled_with_cuda():
        framework.device.synchronize()
