"""Inputs of the fused all-reduce, the same on every rank from a seed, and the judge of its outputs."""

from dataclasses import dataclass

import numpy as np

from fd_fusion import reference
from tests.support import tensors


@dataclass(frozen=True)
class Case:
    """One call. `payload` "special" has -0.0, subnormals, Inf, NaN and the bit patterns that the words use."""

    size: int
    rows: int
    hidden: int
    dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    residual: bool = True
    weight_offset: float = 0.0
    payload: str = "random"
    seed: int = 0
    eps: float = 1e-5

    def partial(self, rank):
        bits = tensors.to_bits(self._random(rank), self.dtype)
        if self.payload == "special" and self.rows:
            ones = -1  # all bits set: a NaN, and what an empty slot holds
            low = np.iinfo(bits.dtype).min  # -0.0
            inf = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}[self.dtype]
            odd = np.array([0, low, 1, low + 1, inf, inf + low, inf + 1, ones], dtype=bits.dtype)
            bits[0, : len(odd)] = odd
            bits[-1] = low  # a row of -0.0 alone
            if self.rows > 2:
                bits[1] = ones
        return bits

    def common(self):
        """(residual or None, weight), as bits: equal on all ranks."""
        residual = tensors.to_bits(self._random(100), self.dtype) if self.residual else None
        weight = np.random.default_rng([self.seed, 200]).standard_normal(self.hidden)
        return residual, tensors.to_bits(weight, self.weight_dtype)

    def _random(self, who):
        """Row t does not depend on the number of rows, so that calls of different T can be compared."""
        rows = [np.random.default_rng([self.seed, who, t]).standard_normal(self.hidden) for t in range(self.rows)]
        return np.array(rows, np.float32).reshape(self.rows, self.hidden)


def judge(case, norm_bits, residual_bits):
    """The largest error over its budget, over both outputs; at most 1 is right. NaN and Inf must lie where the
    truth has them."""
    parts = [tensors.from_bits(case.partial(rank), case.dtype) for rank in range(case.size)]
    residual, weight = case.common()
    residual = None if residual is None else tensors.from_bits(residual, case.dtype)
    weight = tensors.from_bits(weight, case.weight_dtype)
    options = {"eps": case.eps, "weight_offset": case.weight_offset}
    if not case.rows:
        return 0.0
    with np.errstate(all="ignore"):
        truth = reference.all_reduce_rms_norm(parts, residual, weight, **options)
        plain = _plain(case, parts, residual, weight)
    worst = 0.0
    for true, rough, got_bits in zip(truth, plain, (norm_bits, residual_bits)):
        got = tensors.from_bits(got_bits, case.dtype).astype(np.float64)
        fits = np.abs(true) < {"float16": 65000.0}.get(case.dtype, 1e38)
        finite = np.isfinite(true) & fits & np.isfinite(rough)
        if not np.array_equal(
            np.isfinite(got)[fits | ~np.isfinite(true)], np.isfinite(true)[fits | ~np.isfinite(true)]
        ):
            return float("inf")
        if not finite.any():
            continue
        allowed = reference.budget(np.abs(rough - true)[finite].max(), case.dtype, np.abs(true[finite]).max())
        worst = max(worst, float(np.abs(got - true)[finite].max() / allowed) if allowed else 0.0)
    return worst


def _plain(case, parts, residual, weight):
    """What an all-reduce and a norm in `dtype` give: every sum rounded, the norm taken of the rounded sum."""
    total = parts[0]
    for part in parts[1:] + ([] if residual is None else [residual]):
        total = reference.round_to(total + part, case.dtype).astype(np.float32)
    norm = reference.rms_norm(total, weight, eps=case.eps, weight_offset=case.weight_offset, dtype=np.float32)
    return reference.round_to(norm, case.dtype).astype(np.float64), total.astype(np.float64)
