"""The formulas of every op in NumPy, written apart from every backend: the truth of every test and of `doctor`.

Half precision comes as float32 arrays that hold rounded values (NumPy has no bfloat16); `round_to` rounds.
"""

from __future__ import annotations

import numpy as np

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of what the kernels take
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round to nearest even in `dtype`; returns an array of a NumPy type that holds the value exactly."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    wide = np.ascontiguousarray(x, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(wide), wide, rounded.astype(np.uint32).view(np.float32))


def all_reduce_rms_norm(
    partials: list[np.ndarray],
    residual: np.ndarray | None,
    weight: np.ndarray,
    *,
    eps: float,
    weight_offset: float = 0.0,
    dtype: type = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum over the ranks, add the residual, normalise each row.

        s = ((x_0 + x_1) + ... + x_{N-1}) + residual
        norm_out = s * rsqrt(mean(s^2) + eps) * (weight + weight_offset),   residual_out = s

    Args:
        partials: the partial sum of each rank in rank order, [T, H] each.
        residual: [T, H], or None for none.
        weight: [H].
        dtype: of the arithmetic, float64 or float32. Nothing is rounded to a half.
    Returns: (norm_out, residual_out), [T, H] each, of `dtype`.
    """
    total = partials[0].astype(dtype)
    for partial in partials[1:]:
        total = total + partial.astype(dtype)
    if residual is not None:
        total = total + residual.astype(dtype)
    return rms_norm(total, weight, eps=eps, weight_offset=weight_offset, dtype=dtype), total


def rms_norm(
    x: np.ndarray, weight: np.ndarray, *, eps: float, weight_offset: float = 0.0, dtype: type = np.float64
) -> np.ndarray:
    """x * rsqrt(mean(x^2) + eps) * (weight + weight_offset) over the last axis, in `dtype`."""
    x = x.astype(dtype)
    scale = 1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + dtype(eps))
    return x * scale * (weight.astype(dtype) + dtype(weight_offset))


def qk_rms_norm(
    qkv: np.ndarray,
    q_weight: np.ndarray,
    k_weight: np.ndarray,
    *,
    q_heads: int,
    kv_heads: int,
    eps: float,
    weight_offset: float = 0.0,
    dtype: type = np.float64,
) -> np.ndarray:
    """RMSNorm of each head of q and of k in packed rows q|k|v, [T, (q_heads + kv_heads) D + rest]; v is untouched.

    `q_weight` and `k_weight` are [D], one number for each dimension of a head.
    """
    head_dim = q_weight.shape[0]
    out = qkv.astype(dtype)
    start = 0
    for heads, weight in ((q_heads, q_weight), (kv_heads, k_weight)):
        stop = start + heads * head_dim
        part = out[:, start:stop].reshape(-1, heads, head_dim)
        normed = rms_norm(part, weight, eps=eps, weight_offset=weight_offset, dtype=dtype)
        out[:, start:stop] = normed.reshape(-1, heads * head_dim)
        start = stop
    return out


def budget(plain_error: float, dtype: str, largest: float) -> float:
    """The error allowed: twice that of the plain path in the same dtype, and one unit in the last place.

    The last place is that of the largest value of the truth, `largest`.
    """
    ulp = 2.0 * UNIT_ROUNDOFF[dtype] * 2.0 ** np.floor(np.log2(largest)) if largest > 0 else 0.0
    return 2.0 * plain_error + ulp
