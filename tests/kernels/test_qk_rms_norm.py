"""The QK norm's Triton kernel under the interpreter: values, bits, and what it must not touch."""

import numpy as np
import paddle
import pytest

from fd_fusion import reference
from fd_fusion.backends.qk_rms_norm import qk_rms_norm

EPS = 1e-6


def tensor(rng, shape, dtype):
    return paddle.to_tensor(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def numbers(t):
    return t.astype("float32").numpy()


def bits(t):
    t = t.clone()  # not contiguous(): Paddle's makes the tensor itself contiguous, in another place
    return t.view("int32" if t.dtype == paddle.float32 else "int16").numpy()


def inputs(rows, q_heads, kv_heads, head_dim, dtype, *, v_size=None, weight_dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    v_size = kv_heads * head_dim if v_size is None else v_size
    qkv = tensor(rng, [rows, (q_heads + kv_heads) * head_dim + v_size], dtype)
    return qkv, *(tensor(rng, [head_dim], weight_dtype or dtype) for _ in range(2))


def check_values(before, got, q_weight, k_weight, q_heads, kv_heads, weight_offset):
    """`got` against fp64, with twice the error of the plain fp32 path and one unit in the last place allowed."""
    dtype = str(before.dtype).split(".")[-1]
    arrays = numbers(before), numbers(q_weight), numbers(k_weight)
    keywords = {"q_heads": q_heads, "kv_heads": kv_heads, "eps": EPS, "weight_offset": weight_offset}
    width = (q_heads + kv_heads) * q_weight.shape[0]
    truth = reference.qk_rms_norm(*arrays, **keywords)[:, :width]
    plain = reference.round_to(reference.qk_rms_norm(*arrays, **keywords, dtype=np.float32)[:, :width], dtype)
    if truth.size:
        allowed = reference.budget(np.abs(plain - truth).max(), dtype, np.abs(truth).max())
        assert np.abs(numbers(got)[:, :width] - truth).max() <= allowed


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize(
    ("head_dim", "q_heads", "kv_heads", "dtype", "weight_dtype", "weight_offset"),
    [
        (64, 8, 1, "bfloat16", "bfloat16", 0.0),
        (80, 3, 5, "float16", "float16", 1.0),  # more kv heads than q heads
        (96, 4, 4, "float32", "float32", 0.0),
        (112, 1, 3, "bfloat16", "float32", 1.0),
        (128, 32, 4, "bfloat16", "bfloat16", 1.0),
        (192, 2, 6, "float16", "bfloat16", 0.0),
        (256, 5, 1, "float32", "bfloat16", 1.0),
    ],
)
def test_values(rows, head_dim, q_heads, kv_heads, dtype, weight_dtype, weight_offset):
    qkv, wq, wk = inputs(rows, q_heads, kv_heads, head_dim, dtype, weight_dtype=weight_dtype)
    before = qkv.clone()
    shape = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    assert qk_rms_norm(qkv, wq, wk, **shape, eps=EPS, weight_offset=weight_offset) is qkv
    check_values(before, qkv, wq, wk, q_heads, kv_heads, weight_offset)
    width = (q_heads + kv_heads) * head_dim
    np.testing.assert_array_equal(bits(qkv[:, width:]), bits(before[:, width:]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("head_dim", [96, 128])
def test_bits_are_those_of_the_documented_tree(head_dim, dtype):
    """Neighbours are added first; one rounding, to nearest even, in the interpreter too."""
    qkv, wq, wk = inputs(40, 1, 1, head_dim, dtype, v_size=0)
    x = numbers(qkv).reshape(40, 2, head_dim)
    total = np.zeros((40, 2, 128), np.float32)
    total[..., :head_dim] = x * x
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    scale = 1 / np.sqrt(total * np.float32(1 / head_dim) + np.float32(EPS))
    expected = x * scale * np.stack([numbers(wq), numbers(wk)])
    qk_rms_norm(qkv, wq, wk, q_heads=1, kv_heads=1, head_dim=head_dim, eps=EPS)
    np.testing.assert_array_equal(numbers(qkv), reference.round_to(expected, dtype).reshape(40, -1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batch_invariance_layout_and_destination_do_not_change_a_bit(dtype):
    """A row gives the same bits alone, in a batch, in another place, strided, unaligned, in place or not."""
    shape = {"q_heads": 3, "kv_heads": 2, "head_dim": 80, "eps": EPS}
    width = 5 * 80
    rng = np.random.default_rng(1)
    wide = tensor(rng, [128, 1 + width + 72 + 8], dtype)  # v of another head size, then padding
    wq, wk = tensor(rng, [80], dtype), tensor(rng, [80], dtype)
    untouched = wide.clone()
    strided = wide[:, 1 : 1 + width + 72]  # an address and a stride that 16 does not divide
    packed = strided.clone()
    alone = [packed[i : i + 1].clone() for i in (0, 5, 127)]
    q, k = paddle.zeros([128, 3 * 80 + 16], dtype), paddle.zeros([128, 2 * 80 + 16], dtype)
    out = q[:, 16:], k[:, 16:]
    copy = packed.clone()
    assert qk_rms_norm(packed, wq, wk, **shape, out=out) is out
    np.testing.assert_array_equal(bits(packed), bits(copy))  # only read
    assert not bits(q[:, :16]).any()
    assert not bits(k[:, :16]).any()

    moved = paddle.concat([packed[50:], packed[:50]])
    for t in (packed, strided, moved, *alone):
        qk_rms_norm(t, wq, wk, **shape)
    expected = bits(packed)
    np.testing.assert_array_equal(bits(paddle.concat(out, axis=-1)), expected[:, :width])
    np.testing.assert_array_equal(bits(strided), expected)
    np.testing.assert_array_equal(np.roll(bits(moved), 50, axis=0), expected)
    np.testing.assert_array_equal(np.concatenate([bits(t) for t in alone]), expected[[0, 5, 127]])
    for column in (slice(0, 1), slice(1 + width, None)):
        np.testing.assert_array_equal(bits(wide[:, column]), bits(untouched[:, column]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_nan_inf_and_zeros_stay_in_their_head(dtype):
    shape = {"q_heads": 2, "kv_heads": 2, "head_dim": 64, "eps": EPS}
    qkv, wq, wk = inputs(6, 2, 2, 64, dtype)
    clean = qk_rms_norm(qkv.clone(), wq, wk, **shape)
    special = {(1, 0): np.nan, (2, 3): np.inf, (4, 1): -0.0}
    array = numbers(qkv)
    for (row, head), value in special.items():
        array[row, head * 64 : (head + 1) * 64 if value == 0 else head * 64 + 1] = value
    dirty = qk_rms_norm(paddle.to_tensor(array).astype(dtype), wq, wk, **shape)
    got, expected = numbers(dirty), bits(clean)
    assert np.isnan(got[1, :64]).all()
    assert np.isnan(got[2, 3 * 64])
    assert not got[2, 3 * 64 + 1 : 4 * 64].any()
    assert not got[4, 64:128].any()
    assert (np.signbit(got[4, 64:128]) != np.signbit(numbers(wq))).all()  # -0.0 keeps its sign
    others = np.ones_like(expected, dtype=bool)
    for row, head in special:
        others[row, head * 64 : (head + 1) * 64] = False
    np.testing.assert_array_equal(bits(dirty)[others], expected[others])


def test_what_does_not_fit_is_said():
    qkv, wq, wk = inputs(2, 2, 1, 64, "float32")
    shape = {"q_heads": 2, "kv_heads": 1, "head_dim": 64, "eps": EPS}
    with pytest.raises(ValueError, match=r"qkv is \[2, 128\].*at least 192"):
        qk_rms_norm(qkv[:, :128], wq, wk, **shape)
    with pytest.raises(ValueError, match="q_weight is"):
        qk_rms_norm(qkv, wq[:32], wk, **shape)
    with pytest.raises(ValueError, match="expected one dtype"):
        qk_rms_norm(qkv, wq, wk.astype("bfloat16"), **shape)
    with pytest.raises(ValueError, match="make it contiguous"):
        qk_rms_norm(paddle.zeros([256, 2]).t(), wq, wk, **shape)
    with pytest.raises(ValueError, match=r"out\[1\] is \[2, 128\].*expected \[2, 64\]"):
        qk_rms_norm(qkv, wq, wk, **shape, out=(qkv[:, :128], qkv[:, :128]))
    with pytest.raises(ValueError, match="dtype float64"):
        qk_rms_norm(qkv.astype("float64"), wq, wk, **shape)
