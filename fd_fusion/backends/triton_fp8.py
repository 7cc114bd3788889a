"""FP8 out of the triton backend: whether it can be had, its kernels, and the tensors that they write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from fd_fusion.backends.triton_setup import LIKE, plan_of, variants
from fd_fusion.frameworks import triton_launch
from fd_fusion.kernels.all_reduce import plan as plans
from fd_fusion.reasons import Reason, because
from fd_fusion.reference import FP8_GROUP
from fd_fusion.spec import Fp8, OpSpec

_OLDEST = 89  # of the GPUs that convert to e4m3
_PADDING = 4  # rows: a column of scales is a whole number of 16-byte units, as FastDeploy's GEMM reads it


def refuses_fp8(spec: OpSpec) -> Reason | None:
    """Return why `finish_fp8` cannot be had for `spec`, which is supported otherwise, or None."""
    if spec.device == "gpu" and (spec.arch or 0) < _OLDEST:
        return because("no_fp8", got=f"sm_{spec.arch}", need=f"from sm_{_OLDEST} on")
    need = plans.refuses_fp8(plan_of(spec))
    return because("no_fp8", got=f"H={spec.hidden_size} {spec.dtype}, {spec.size} ranks", need=need) if need else None


def compile_fp8(
    spec: OpSpec, plan: plans.Plan, paths: Collection[int], in_rounds: bool
) -> dict[tuple, triton_launch.Loaded]:
    """Compile the kernels for `spec.fp8`, by (weight dtype, path, without residual, in rounds, `Fp8.kernel`)."""
    if not spec.fp8:
        return {}
    kernel = triton_launch.load_kernel("all_reduce.kernel_fp8", "all_reduce_rms_norm_fp8")
    like = (*LIKE, LIKE[0], LIKE[0], 2, 2, 1.0)
    return {
        (*variant, fp8): triton_launch.prepare(kernel, like, plans.constants(plan, fp8=fp8, **how), spec.device)
        for fp8 in sorted({one.kernel for one in spec.fp8})
        for variant, how in variants(spec, paths, in_rounds)
    }


class Outputs:
    """Codes and scales of one call. Rows between T and the padding of the scales are not written."""

    def __init__(self, framework: Any, new: Callable[[Sequence[int], Any], Any], shape: Sequence[int], fp8: Fp8):
        rows, self._hidden = shape
        groups = self._hidden // FP8_GROUP
        self.kernel, self.keeps_norm, self._static_factor = fp8.kernel, fp8.keeps_norm, _inverse(fp8.static_scale)
        self.codes = new(shape, framework.float8_e4m3fn)
        self.scales, self._strides = None, (0, 0)
        if fp8.formula == "static":
            return
        if fp8.by_column:
            padded = -(-rows // _PADDING) * _PADDING
            self._strides = 1, padded
            whole = new((groups, padded), framework.float32)
            self.scales = framework.as_strided(whole, (rows, groups), self._strides)
        else:
            self._strides = groups, 1
            self.scales = new((rows, groups), framework.float32)

    def arguments(self, start: int) -> tuple:
        """Return what the kernel takes behind its other arguments, for rows from `start` on."""
        codes = self.codes.data_ptr()
        scales = codes if self.scales is None else self.scales.data_ptr() + 4 * start * self._strides[0]
        return codes + start * self._hidden, scales, *self._strides, self._static_factor


@functools.cache
def _inverse(scale: float) -> float:
    return float(np.float32(1) / np.float32(scale))
