"""FP8 in Paddle's own ops: `reference.quantise` for a norm that no kernel quantised, and a product of what it gives.

The product multiplies what the codes stand for, in float32: right anywhere, and no gain. A host has its own kernels.
"""

from __future__ import annotations

import paddle

from fd_fusion.reference import FP8_FORMULAS, FP8_GROUP, FP8_MAX

_TOP = float.fromhex("0x1.FEp127")


def quantise(
    norm: paddle.Tensor, formula: str, by_column: bool, static_scale: float
) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """Compute (codes [T, H], scales [T, H / 128] or None) of norm [T, H] by `reference.quantise`; `spec.Fp8` has what
    the arguments mean."""
    rows, groups = norm.shape[0], norm.shape[1] // FP8_GROUP
    x = norm.astype("float32").reshape([-1, groups, FP8_GROUP])
    if formula == "static":
        return _to_codes(x * (1.0 / paddle.full([1], static_scale, "float32"))).reshape(norm.shape), None
    largest = paddle.where(paddle.isnan(x), paddle.zeros_like(x), x.abs()).max(-1, keepdim=True)
    most = paddle.full_like(largest, FP8_MAX)
    if formula in ("divide", "divide_7"):
        largest = paddle.maximum(largest, paddle.full_like(largest, 1e-10))
        largest = largest * 7.0 if formula == "divide_7" else largest
        codes, scales = _to_codes(x * most / largest), largest / most  # by a number, -0 would become 0
    else:
        assert formula in FP8_FORMULAS, formula
        pow2 = formula == "multiply_pow2"
        zero = largest.view("int32") == 0  # the bits: two floats less than 1e-8 apart are equal to Paddle
        factor = paddle.where(zero, paddle.ones_like(largest), most / largest)
        factor = paddle.where(paddle.isinf(factor), paddle.full_like(factor, 2.0**127 if pow2 else _TOP), factor)
        if pow2:
            bits = factor.view("int32")
            factor = paddle.bitwise_and(bits, paddle.full_like(bits, 0x7F800000)).view("float32")
        codes, scales = _to_codes(x * factor), paddle.ones_like(factor) / factor
    scales = scales.reshape([-1, groups])
    if by_column:
        padding = paddle.zeros([-rows % 4, groups], "float32")
        scales = paddle.concat([scales, padding]).T.contiguous().T[:rows]
    return codes.reshape(norm.shape), scales


def _to_codes(x: paddle.Tensor) -> paddle.Tensor:
    """Round to e4m3. Paddle's cast on a CPU gives 464 to 480 and NaN other codes than a GPU does."""
    codes = x.clip(-FP8_MAX, FP8_MAX).astype("float8_e4m3fn").view("uint8").astype("int32")
    codes = paddle.where(paddle.isnan(x), paddle.full_like(codes, 0x7F), codes)
    return codes.astype("uint8").view("float8_e4m3fn")


def values(codes: paddle.Tensor, scales: paddle.Tensor, block_rows: int = 1) -> paddle.Tensor:
    """Compute what codes [R, K] stand for, in float32. scales [R / block_rows, K / 128], rounded up."""
    wide = scales.contiguous().repeat_interleave(FP8_GROUP, axis=1)
    wide = wide if block_rows == 1 else wide.repeat_interleave(block_rows, axis=0)
    return codes.astype("float32") * wide[: codes.shape[0], : codes.shape[1]]
