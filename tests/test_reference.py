"""The formulas themselves, against numbers worked out by hand and against each other."""

import ml_dtypes
import numpy as np
import pytest

from fd_fusion import reference
from tests.support.tensors import to_bits


def test_all_reduce_rms_norm_by_hand():
    x = [np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]])]
    out, residual = reference.all_reduce_rms_norm(
        x, np.array([[0.0, 0.0]]), np.array([1.0, 2.0]), eps=0.0, weight_offset=1.0
    )
    assert residual.tolist() == [[3.0, 4.0]]
    rms = np.sqrt(12.5)
    np.testing.assert_allclose(out, [[3 / rms * 2, 4 / rms * 3]], rtol=1e-15)


def test_order_of_the_sum_is_rank_order():
    big = [np.float32([[1e8]]), np.float32([[1.0]]), np.float32([[-1e8]])]
    _, total = reference.all_reduce_rms_norm(big, np.float32([[0.5]]), np.float32([1]), eps=1e-5, dtype=np.float32)
    assert total[0, 0] == np.float32((np.float32(1e8) + np.float32(1)) - np.float32(1e8)) + np.float32(0.5)


def test_qk_rms_norm_leaves_v_and_keeps_heads_apart():
    rng = np.random.default_rng(0)
    qkv, qw, kw = rng.standard_normal((3, 7 * 4)), rng.standard_normal(4), rng.standard_normal(4)
    out = reference.qk_rms_norm(qkv, qw, kw, q_heads=2, kv_heads=3, eps=1e-6)
    assert (out[:, 20:] == qkv[:, 20:]).all()
    np.testing.assert_array_equal(out[:, 4:8], reference.rms_norm(qkv[:, 4:8], qw, eps=1e-6))
    np.testing.assert_array_equal(out[:, 8:12], reference.rms_norm(qkv[:, 8:12], kw, eps=1e-6))


@pytest.mark.parametrize("value, want", [(1.00390625, 1.0), (1.01171875, 1.015625), (-0.0, -0.0), (np.inf, np.inf)])
def test_bfloat16_rounds_to_nearest_even(value, want):
    got = reference.round_to(np.array([value]), "bfloat16")
    assert got[0] == want and np.signbit(got[0]) == np.signbit(want)


def test_bfloat16_agrees_with_another_implementation_everywhere():
    """Behind every bfloat16: itself, the next fp32, below, at and above the middle, and the last before the next."""
    behind = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | behind).view(np.float32)
    with np.errstate(invalid="ignore"):  # NaN, of which each may keep other bits
        want = x.astype(ml_dtypes.bfloat16)
    got, number = reference.round_to(x, "bfloat16"), ~np.isnan(x)
    np.testing.assert_array_equal(got, want.astype(np.float32))
    assert (np.signbit(got) == np.signbit(want))[number].all()
    np.testing.assert_array_equal(to_bits(x, "bfloat16").view(np.uint16)[number], want.view(np.uint16)[number])


def test_budget_is_twice_the_plain_error_and_one_unit():
    assert reference.budget(0.5, "float32", 3.0) == 1.0 + 2.0**-23 * 2
    assert reference.budget(0.0, "bfloat16", 1.0) == 2.0**-7  # eight significant bits


def test_e4m3_rounds_as_another_implementation_does_everywhere():
    """Every code, the numbers below, at and above the middle to the next one; both signs; every bfloat16."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (codes[:-1] + codes[1:]) / 2
    x = np.concatenate([codes, middles, *(np.nextafter(middles, np.float32(end)) for end in (0, np.inf))])
    every_bfloat16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    x = np.concatenate([x, -x, every_bfloat16])
    with np.errstate(invalid="ignore"):
        want = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)  # it does not saturate
    number = ~np.isnan(x)
    np.testing.assert_array_equal(reference.round_to_e4m3(x)[number], want[number])
    assert (reference.round_to_e4m3(x)[~number] == 0x7F).all()


def group(*first, rest=0.0):
    """One row of one group: the first numbers, then others."""
    return np.float32([[*first, *[rest] * (128 - len(first))]])


TINY = np.float32(2.0**-133)  # the smallest bfloat16
QUANTISED = {  # formula, the first numbers of a group -> their codes, the scale
    "largest is 448": ("multiply", [448, 1, -2, 0, -0.0], [0x7E, 0x38, 0xC0, 0, 0x80], 1.0),
    "the scale is the reciprocal of a quotient": ("multiply", [3], [0x7E], 1 / np.float32(448 / np.float32(3))),
    "the scale is the quotient": ("divide", [3], [0x7E], np.float32(3) / np.float32(448)),
    "a power of two, below the quotient": ("multiply_pow2", [3, -1], [0x7C, 0xF0], 2.0**-7),
    "range of 64": ("divide_7", [7, -7], [0x68, 0xE8], np.float32(49) / np.float32(448)),
    "zeros": ("multiply", [0, -0.0], [0, 0x80], 1.0),
    "zeros, power of two": ("multiply_pow2", [0, -0.0], [0, 0x80], 1.0),
    "zeros divided": ("divide", [0, -0.0], [0, 0x80], np.float32(1e-10) / np.float32(448)),
    "below eps": ("divide", [2.0**-40], [0x48], np.float32(1e-10) / np.float32(448)),  # 4.07
    "a factor that is infinite": ("multiply", [TINY], [0x10], 1 / np.float32(float.fromhex("0x1.FEp127"))),
    "an infinite factor, power of two": ("multiply_pow2", [TINY], [0x08], 2.0**-127),
    "Inf": ("multiply", [np.inf, 1, -1], [0x7F, 0, 0x80], np.inf),
    "Inf divided": ("divide", [-np.inf, 1, -1], [0x7F, 0, 0x80], np.inf),
    "NaN is not the largest": ("multiply", [np.nan, -448], [0x7F, 0xFE], 1.0),
    "saturates": ("static", [1e6, -1e6, np.inf, -np.inf, np.nan], [0x7E, 0xFE, 0x7E, 0xFE, 0x7F], None),
    "an overflow on the way": ("divide", [3e38, -1e38], [0x7E, 0xFE], np.float32(3e38) / np.float32(448)),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantise_by_hand(name):
    formula, first, codes, scale = QUANTISED[name]
    got, scales = reference.quantise(group(*first), formula)
    assert [hex(code) for code in got[0, : len(codes)]] == [hex(code) for code in codes]
    assert scales.shape == (1, 0 if scale is None else 1) and (scale is None or scales[0, 0] == np.float32(scale))


@pytest.mark.parametrize("formula", ["multiply", "divide"])
def test_a_group_of_nothing_but_nan(formula):
    codes, scales = reference.quantise(group(np.nan, rest=np.nan), formula)
    assert (codes == 0x7F).all() and scales[0, 0] == (1.0 if formula == "multiply" else np.float32(1e-10) / 448)


def test_groups_are_apart_and_formulas_are_named():
    x = np.float32([[1.0] * 128 + [2.0] * 128, [4.0] * 256])
    assert reference.quantise(x, "multiply")[1].tolist() == (np.float32([[1, 2], [4, 4]]) / 448).tolist()
    assert (reference.quantise(x, "static", 0.5)[0] == 0x48).tolist()[1] == [False] * 256
    with pytest.raises(ValueError, match="multiply_pow2"):
        reference.quantise(x, "shift")
