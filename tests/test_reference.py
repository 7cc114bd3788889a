"""The formulas themselves, against numbers worked out by hand and against each other."""

import numpy as np
import pytest

from fd_fusion import reference


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


def test_bfloat16_agrees_with_paddle_everywhere():
    import paddle

    x = np.random.default_rng(1).standard_normal(4096).astype("float32") * np.float32(10.0) ** np.arange(4096).clip(
        0, 30
    )
    want = paddle.to_tensor(x).astype("bfloat16").astype("float32").numpy()
    np.testing.assert_array_equal(reference.round_to(x, "bfloat16"), want)
    assert np.isnan(reference.round_to(np.array([np.nan]), "bfloat16")).all()


def test_budget_is_twice_the_plain_error_and_one_unit():
    assert reference.budget(0.5, "float32", 3.0) == 1.0 + 2.0**-23 * 2
    assert reference.budget(0.0, "bfloat16", 1.0) == 2.0**-7  # eight significant bits
