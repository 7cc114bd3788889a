"""Compare with the float64 truth under the budget of `reference.budget`."""

import numpy as np

from fd_fusion.reference import budget


def wide(tensor) -> np.ndarray:
    """A Paddle tensor as float64."""
    return tensor.astype("float32").numpy().astype(np.float64)


def check(got, truth: np.ndarray, plain, dtype: str, what) -> float:
    """Assert that the largest error of `got` is within the budget, given the plain path's. Returns error / budget."""
    error = float(np.abs(wide(got) - truth).max())
    allowed = budget(float(np.abs(wide(plain) - truth).max()), dtype, float(np.abs(truth).max()))
    assert error <= allowed, f"{what}: error {error:.3e}, budget {allowed:.3e}"
    return error / allowed
