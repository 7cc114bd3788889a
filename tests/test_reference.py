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
