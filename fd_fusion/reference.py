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


FP8_GROUP = 128  # elements along H that share a scale
FP8_MAX = 448.0  # the largest number of e4m3
FP8_FORMULAS = ("multiply", "multiply_pow2", "divide", "divide_7", "static")


def round_to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to nearest even in e4m3, as codes (uint8). Larger numbers and Inf become 448, every NaN 0x7F."""
    values = value_of_e4m3(np.arange(0x7F, dtype=np.uint8))  # 0 to 448, in order
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        size = np.abs(x.astype(np.float64))
    middles = (values[:-1] + values[1:]) / 2
    above = np.searchsorted(middles, size, side="left")  # at a middle the lower code, unless it is odd
    at_middle = (above < len(middles)) & (middles[np.minimum(above, len(middles) - 1)] == size)
    rounded = np.where(at_middle, above + (above & 1), above).astype(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), rounded | np.where(np.signbit(x), np.uint8(0x80), np.uint8(0)))


def value_of_e4m3(codes: np.ndarray) -> np.ndarray:
    """Return the numbers that codes other than NaN stand for, in float64."""
    exponent, mantissa = codes >> 3 & 15, codes & 7
    # Below the first normal number, 2^-6, all steps are 2^-9.
    sizes = np.where(exponent == 0, mantissa, (8 + mantissa) * 2.0 ** np.maximum(exponent - 1.0, 0)) * 2.0**-9
    return np.where(codes & 0x80, -sizes, sizes)


def quantise(norm: np.ndarray, formula: str, static_scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Quantise rows to e4m3, in float32 arithmetic, each operation rounded to nearest.

    m is the largest |x| of a group of 128 along H, NaN left out, zero if all are NaN:

        multiply:  f = 448 / m;  q = x * f;  scale = 1 / f         m = 0: f = 1; f = Inf: 0x1.FEp127 instead
        multiply_pow2: f without its mantissa;                     f = Inf: 2^127 instead
        divide:    m = max(m, 1e-10);  q = x * 448 / m;  scale = m / 448
        divide_7:  the same with 7 m in the place of m
        static:    q = x * (1 / static_scale), one scale for all; no scales are returned, [T, 0]

    x is the norm after it was rounded to its half: what a quantiser behind the norm would read. FastDeploy's
    `fp8_quant_blockwise` multiplies, its `per_token_quant` and `per_token_quant_padding` divide.

    Args:
        norm: [T, H] float32, H a multiple of 128.
    Returns: (codes [T, H] uint8, scales [T, H / 128] float32): x is about value(code) * scale.
    """
    x = norm.astype(np.float32).reshape(len(norm), norm.shape[1] // FP8_GROUP, FP8_GROUP)
    one, most = np.float32(1), np.float32(FP8_MAX)
    with np.errstate(all="ignore"):
        if formula == "static":
            codes = round_to_e4m3(x * (one / np.float32(static_scale)))
            return codes.reshape(norm.shape), np.empty((len(x), 0), np.float32)
        largest = np.where(np.isnan(x), np.float32(0), np.abs(x)).max(axis=-1, keepdims=True)
        if formula.startswith("multiply"):
            factor = np.where(largest == 0, one, most / largest)
            top = 2.0**127 if formula == "multiply_pow2" else float.fromhex("0x1.FEp127")
            factor = np.where(np.isinf(factor), np.float32(top), factor)
            if formula == "multiply_pow2":
                factor = (factor.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32)
            scaled, scales = x * factor, one / factor
        elif formula in ("divide", "divide_7"):
            largest = np.maximum(largest, np.float32(1e-10)) * np.float32(7 if formula == "divide_7" else 1)
            scaled, scales = x * most / largest, largest / most
        else:
            raise ValueError(f"unknown formula {formula!r}, expected one of {', '.join(FP8_FORMULAS)}")
    return round_to_e4m3(scaled).reshape(norm.shape), scales[..., 0]


def budget(plain_error: float, dtype: str, largest: float) -> float:
    """The error allowed: twice that of the plain path in the same dtype, and one unit in the last place.

    The last place is that of the largest value of the truth, `largest`.
    """
    ulp = 2.0 * UNIT_ROUNDOFF[dtype] * 2.0 ** np.floor(np.log2(largest)) if largest > 0 else 0.0
    return 2.0 * plain_error + ulp
