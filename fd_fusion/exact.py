"""Numbers whose answer is known, and how far from it a right kernel may be: NumPy alone.

They judge what a backend runs at open, and what the proving pass tries. No allowance grows with the number of
layers, and none is a fraction of a total that the residual dominates.
"""

from __future__ import annotations

import numpy as np

from fd_fusion.reasons import Reason, because
from fd_fusion.reference import UNIT_ROUNDOFF, round_to

_SUBNORMAL = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}  # the smallest number above zero
_FP32_ULPS = 16  # of a mean, an rsqrt and three products in float32, as any order of summing makes them


def known_partial(rank: int, rows: int, hidden: int, dtype: str) -> np.ndarray:
    """Return random rows of one rank that every rank can make, in sizes from 2^-4 to 2^4: every sum rounds."""
    random = np.random.default_rng([13, rank])
    values = random.standard_normal((rows, hidden)) * 2.0 ** random.integers(-4, 5, (rows, hidden))
    return round_to(values.astype(np.float32), dtype).astype(np.float32)


def known_weight(hidden: int, dtype: str) -> np.ndarray:
    """Return a weight around one, [H]."""
    return round_to(np.random.default_rng(17).uniform(0.5, 1.5, hidden).astype(np.float32), dtype).astype(np.float32)


def rank_order_sum(partials: list[np.ndarray], residual: np.ndarray | None) -> np.ndarray:
    """Return ((x_0 + x_1) + ... + x_{N-1}) + residual in float32: what the contract rounds once."""
    total = partials[0].astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for partial in [*partials[1:], *([] if residual is None else [residual])]:
            total = total + partial.astype(np.float32)
    return total


def same_bits(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Return where two arrays hold the same number, with NaN as one number and float32's subnormals as zero."""
    got, want = (np.ascontiguousarray(x, np.float32) for x in (got, want))
    tiny = np.finfo(np.float32).tiny
    nothing = (np.abs(got) < tiny) & (np.abs(want) < tiny)
    return (got.view(np.int32) == want.view(np.int32)) | (np.isnan(got) & np.isnan(want)) | nothing


def half_ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return half a unit in the last place of each x in `dtype`: what one rounding may change."""
    size = np.maximum(np.abs(np.where(np.isfinite(x), x, 0.0)), 2.0**-140)
    return np.maximum(UNIT_ROUNDOFF[dtype] * 2.0 ** np.floor(np.log2(size)), _SUBNORMAL[dtype] / 2)


def norm_excess(
    norm_out: np.ndarray,
    total: np.ndarray,
    weight: np.ndarray,
    *,
    eps: float,
    weight_offset: float,
    dtype: str,
    rounded: bool,
) -> np.ndarray:
    """Return |norm_out - RMSNorm(total)| over what is allowed, [T, H]; more than one is wrong.

        allowed = half an ulp of the result + a few ulps of float32
        `rounded`: total was rounded to `dtype`, and the norm was made from it before that: twice u more, once for
        the value itself and once for the mean of squares, and half the smallest subnormal for tiny ones.

    Rows whose total is not finite give 0.
    """
    s, w = total.astype(np.float64), weight.astype(np.float64) + weight_offset
    finite = np.isfinite(s).all(axis=-1, keepdims=True)
    s = np.where(finite, s, 0.0)
    scale = 1.0 / np.sqrt((s * s).mean(axis=-1, keepdims=True) + eps)
    want = s * scale * w
    allowed = half_ulp(want, dtype) + _FP32_ULPS * 2.0**-24 * np.abs(want)
    if rounded:
        step = _SUBNORMAL[dtype] / 2
        allowed += (2.02 * UNIT_ROUNDOFF[dtype] + step / np.sqrt(eps)) * np.abs(want) + step * scale * np.abs(w)
    most = {"float16": 65504.0}.get(dtype, 3.38e38)
    error = np.abs(norm_out.astype(np.float64) - want)
    excess = np.where(np.isnan(error), np.inf, error) / allowed
    too_large = np.isinf(norm_out) & (np.abs(want) >= most * (1 - UNIT_ROUNDOFF[dtype]))
    return np.where(finite & ~too_large, excess, 0.0)


def sum_spread(partials: np.ndarray, residual: np.ndarray | None, dtype: str) -> np.ndarray:
    """Return what independent roundings may do to a sum of [N, ...] in any order: six standard deviations.

        6 u / sqrt(3) * sqrt((N - 1) (sum |x_r|)^2 + sum^2 + (sum + residual)^2)

    One rounding of a number x is spread evenly over half an ulp: u |x| / sqrt(3) at most.
    """
    x = partials.astype(np.float64)
    total = x.sum(axis=0)
    squares = (len(x) - 1) * np.abs(x).sum(axis=0) ** 2 + total**2
    squares = squares + (total + (0.0 if residual is None else residual.astype(np.float64))) ** 2
    return 6 * UNIT_ROUNDOFF[dtype] / np.sqrt(3) * np.sqrt(squares) + _SUBNORMAL[dtype]


def regrouped(total: np.ndarray, host: np.ndarray, partial: np.ndarray, size: int, dtype: str) -> bool:
    """Return whether two sums of the same parts agree row by row: 4 u (||host|| + sqrt(N) ||own share||).

    A part that is reduced twice, or not at all, is off by about the size of the part.
    """
    norm = [np.linalg.norm(x.astype(np.float64), axis=-1) for x in (total.astype(np.float64) - host, host, partial)]
    finite = np.isfinite(norm[1])
    allowed = 4 * UNIT_ROUNDOFF[dtype] * (norm[1] + size**0.5 * norm[2]) + _SUBNORMAL[dtype] * host.shape[-1]
    return bool((norm[0] <= allowed)[finite].all())


def probe_partial(rank: int, size: int, hidden: int, eps: float, dtype: str) -> np.ndarray:
    """Return [2, H] of a rank, or of the residual for `rank == size`: small integers times a power of two.

    Every sum of them is exact in every dtype and order, and their mean of squares is about eps, so that eps, the
    weight, its offset, the residual and each rank change the norm's output in bfloat16 too.
    """
    values = np.random.default_rng([29, rank]).integers(-3, 4, (2, hidden))
    if rank == size:
        values = values * 2 + 1
    mean = 4.0 * size + 17.0  # of the squares of the whole sum; they add up exactly in float32 for H up to 300,000
    power = np.round(np.log2(eps / mean) / 2) if eps > 0 else 0.0
    return (values * 2.0 ** np.clip(power, -24.0 if dtype == "float16" else -60.0, 8.0)).astype(np.float32)


def probe_excess(norm_out: np.ndarray, host: np.ndarray, dtype: str) -> np.ndarray:
    """Return |norm_out - host's| over what is allowed for the same exact total, [T, H]: one rounding of the kernel,
    up to three of the host, which may round the scaled number and the weight by themselves, and float32's few ulps of
    both.
    """
    host = host.astype(np.float64)
    allowed = 4 * UNIT_ROUNDOFF[dtype] * np.abs(host) + 2 * _FP32_ULPS * 2.0**-24 * np.abs(host) + _SUBNORMAL[dtype]
    error = np.abs(norm_out.astype(np.float64) - host)
    both = np.isnan(host) & np.isnan(norm_out)
    return np.where(both, 0.0, np.where(np.isnan(error), np.inf, error) / np.where(np.isnan(allowed), 1.0, allowed))


def first_wrong_word(variant: str, wrong: dict[str, np.ndarray]) -> Reason | None:
    """Return the reason that names the first wrong word of a call's outputs, or None. wrong: their masks, [T, H]."""
    for output, mask in wrong.items():
        if mask.any():
            row, column = np.argwhere(mask)[0]
            where = f"row {row}, column {column}"
            counts = {"wrong": int(mask.sum()), "words": mask.size}
            return because("first_call_wrong", variant=variant, output=output, where=where, **counts)
    return None
