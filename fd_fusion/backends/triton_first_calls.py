"""The first call of every kernel that a workspace may launch, on numbers with a known answer.

A first launch may allocate, so each kernel is launched before the workspace is frozen, and is compared before use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fd_fusion import exact
from fd_fusion.backends.triton_setup import ONE_SHOT, STAYS
from fd_fusion.frameworks.tensors import bytes_of, numbers, tensor
from fd_fusion.reasons import FusionError, Reason
from fd_fusion.reference import quantise, round_to
from fd_fusion.spec import Fp8, OpSpec

_EPS, _OFFSET = 100.0, 1.0  # about the mean of squares, so that the norm depends on it


def run_all(op: Any, spec: OpSpec, framework: Any) -> None:
    """Collective: launch each path, with and without a residual, for each dtype of weight; with one row and with more
    rows than run at once, and the kernels of rounds with several (`_shapes`).
    `residual_out` must be the contract's bits, over the whole width; one that stays with its owners NaN elsewhere.

    All kernels are launched before a wrong one raises, since the other ranks take part in every launch.
    Raises: FusionError: the first kernel that gave wrong numbers. FusionTimeout: a rank is missing.
    """
    wrong = None
    for weight_dtype, path, bare, in_rounds in op._launches:
        for rows, variant in _calls(op, spec, path, bare, in_rounds):
            reason = _run(op, spec, framework, variant, rows, bare, path, weight_dtype)
            wrong = wrong or reason
    if wrong:
        raise FusionError(wrong)


def run_all_fp8(op: Any, spec: OpSpec, framework: Any) -> None:
    """Collective: launch each kernel of `spec.fp8` likewise. Raises as above.

    Norm and sum must be the bits of the call without FP8, codes and scales those of `reference.quantise` of its norm.
    """
    wrong = None
    for weight_dtype, path, bare, in_rounds, kernel in op._fp8_launches:
        fp8, stays = next(one for one in spec.fp8 if one.kernel == kernel), path == STAYS
        for rows, variant in _calls(op, spec, path, bare, in_rounds):
            tensors = _tensors(spec, framework, rows, bare, weight_dtype)[0]
            plain = op.finish(*tensors, _EPS, _OFFSET, stays)
            got = op.finish_fp8(*tensors, _EPS, _OFFSET, fp8, stays)
            wrong = wrong or _wrong_fp8(f"FP8 ({', '.join(kernel)}) of {variant}", plain, got, fp8)
    if wrong:
        raise FusionError(wrong)


def _calls(op: Any, spec: OpSpec, path: int, bare: bool, in_rounds: bool) -> Iterator[tuple[int, str]]:
    """Make the op choose a kernel, and cut a call as `_shapes` says. Yield T and the name of each call to make so."""
    stock = op._two_shot_rows, op._slots, op.at_once
    try:
        op._two_shot_rows = 1 << 62 if path == ONE_SHOT else 1
        size = 1 if path == ONE_SHOT else spec.size
        shapes = _shapes(size, stock[2][path][in_rounds], stock[1], spec.device, bare, in_rounds)
        for rows, op._slots, at_once in shapes:
            op.at_once = stock[2] | {path: (at_once, at_once * in_rounds)}
            yield rows, _name(path, bare, rows, sum(launch.rounds for launch in op.launches(rows, path)))
    finally:
        op._two_shot_rows, op._slots, op.at_once = stock


def _wrong_fp8(variant: str, plain: Any, got: Any, fp8: Fp8) -> Reason | None:
    norm, codes, scales, summed = got
    want = [numbers(output) for output in plain]
    want_codes, want_scales = quantise(want[0], fp8.formula, fp8.static_scale)
    wrong = {"residual_out": ~exact.same_bits(numbers(summed), want[1]), "codes": bytes_of(codes) != want_codes}
    if norm is not None:
        wrong["norm_out"] = ~exact.same_bits(numbers(norm), want[0])
    if scales is not None:
        wrong["scales"] = ~exact.same_bits(numbers(scales), want_scales)
    return exact.first_wrong_word(variant, wrong)


def _shapes(
    size: int, at_once: int, slots: int, device: str, bare: bool, in_rounds: bool
) -> list[tuple[int, int, int]]:
    """Return (T, slots, rows at once) of the calls of a variant.

    Of rounds: two, as if there were few slots, with a row for each program and each of `size` owners, and one more in
    the first. The interpreter is slow, and runs one program after the other: there a call without a residual has one
    row, one with a residual more rows than programs and owners.
    """
    few = 1 if device == "cpu" else min(at_once, size + 1)  # by two-shot N + 1, which has no factor in common with N
    if in_rounds:
        assert size * few <= slots, "compiled for no call"
        as_if = min(slots, size * few + 1)
        return [(as_if + size * few, as_if, few)]
    if device == "cpu":
        return [(1, slots, at_once) if bare else (min(size + 1, slots), slots, few)]
    return [(1, slots, at_once), (at_once + 1, slots, at_once)]


def _name(path: int, bare: bool, rows: int, rounds: int) -> str:
    kernel = "one-shot" if path == ONE_SHOT else "two-shot"
    residual = "without a residual" if bare else "with a residual" + " that stays" * (path == STAYS)
    return f"the {kernel} kernel {residual}, T={rows} in {rounds} round{'s' if rounds > 1 else ''},"


def _run(
    op: Any, spec: OpSpec, framework: Any, variant: str, rows: int, bare: bool, path: int, weight_dtype: str
) -> Reason | None:
    """Compare a call with the contract: the sum bit for bit, its norm within one rounding. Returns the reason."""
    dtype = spec.dtype
    tensors, total, weight = _tensors(spec, framework, rows, bare, weight_dtype)
    norm_out, residual_out = (numbers(out) for out in op.finish(*tensors, _EPS, _OFFSET, path == STAYS))
    expected = round_to(total, dtype).astype(np.float32)
    if path == STAYS:
        elsewhere = np.ones(rows, bool)
        elsewhere[spec.rank :: spec.size] = False
        expected[elsewhere] = np.nan
    same = exact.same_bits(residual_out, expected)
    limits = {"eps": _EPS, "weight_offset": _OFFSET, "dtype": dtype, "rounded": False}
    excess = exact.norm_excess(norm_out, total, weight, **limits)
    return exact.first_wrong_word(variant, {"residual_out": ~same, "norm_out": excess > 1})


def _tensors(spec: OpSpec, framework: Any, rows: int, bare: bool, weight_dtype: str) -> tuple[Any, Any, Any]:
    """Return this rank's tensors of a call, the sum in float32, and the weight."""
    hidden, dtype = spec.hidden_size, spec.dtype
    partials = [exact.known_partial(rank, rows, hidden, dtype) for rank in range(spec.size)]
    residual = None if bare else exact.known_partial(spec.size, rows, hidden, dtype)
    weight = exact.known_weight(hidden, weight_dtype)
    tensors = [
        None if values is None else tensor(framework, values, of, spec.device)
        for values, of in ((partials[spec.rank], dtype), (residual, dtype), (weight, weight_dtype))
    ]
    return tensors, exact.rank_order_sum(partials, residual), weight
