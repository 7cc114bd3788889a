"""FP8 in the layers: Paddle's ops against the contract, a quantised norm, the linear that takes it. One process."""

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec
from support.values import wide

from fd_fusion import Fp8, Fp8Linear, RMSNorm, reference
from fd_fusion.frameworks.tensors import bytes_of
from fd_fusion.layers import Quantised
from fd_fusion.layers.finish_op import quantise
from fd_fusion.reasons import FusionError


@pytest.fixture(autouse=True)
def no_gradients():
    with paddle.no_grad():
        yield


def rows(count, hidden=256, dtype="bfloat16", seed=0):
    x = np.random.default_rng(seed).standard_normal((count, hidden)).astype(np.float32)
    return paddle.to_tensor(x).astype(dtype)


def odd_rows(dtype):
    """Zeros, Inf, NaN, what is near the largest number of the range, and a group of nothing but NaN."""
    x = wide(rows(4, dtype=dtype)).astype(np.float32)
    x[0] = 0
    x[1, :4] = [np.inf, -np.inf, np.nan, -0.0]
    x[2, :128] = np.nan
    x[3, :128] = np.linspace(-470, 470, 128)
    x[3, 128:] *= 1e-6
    return paddle.to_tensor(x).astype(dtype)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("formula", reference.FP8_FORMULAS)
def test_paddle_s_ops_give_the_contract_s_bits(formula, dtype, by_column):
    form = Fp8(formula, by_column=by_column, static_scale=0.013)
    tiny = rows(3, dtype=dtype) * (2.0**-90 if dtype == "bfloat16" else 2.0**-14)  # zero, says Paddle's comparison
    for x in (rows(1, dtype=dtype), rows(6, dtype=dtype), odd_rows(dtype), rows(0, dtype=dtype), tiny):
        codes, scales = quantise(x, form)
        want = reference.quantise(wide(x).astype(np.float32), formula, 0.013)
        assert codes.dtype == paddle.float8_e4m3fn and codes.shape == x.shape
        np.testing.assert_array_equal(bytes_of(codes), want[0])
        if formula == "static":
            assert scales is None
            continue
        np.testing.assert_array_equal(scales.numpy().view(np.uint32), want[1].view(np.uint32))
        if by_column and x.shape[0]:
            assert list(scales.strides) == [1, -(-x.shape[0] // 4) * 4]


@pytest.mark.parametrize("keeps_norm", [True, False])
def test_a_quantised_norm(keeps_norm):
    form = Fp8("divide", by_column=True, keeps_norm=keeps_norm)
    norm, plain = RMSNorm(256, dtype="bfloat16", quantised=form), RMSNorm(256, dtype="bfloat16")
    x, residual = rows(5), rows(5, seed=1)
    got, total = norm(x, residual)
    want, want_total = plain(x, residual)
    assert isinstance(got, Quantised) and (total == want_total).all()
    assert (got.norm == want).all() if keeps_norm else got.norm is None
    np.testing.assert_array_equal(bytes_of(got.codes), reference.quantise(wide(want).astype("f4"), "divide")[0])


def test_what_cannot_be_quantised_is_said():
    with pytest.raises(ValueError, match="multiple of 128"):
        RMSNorm(320, quantised=Fp8())
    with pytest.raises(ValueError, match="multiple of 128"):
        Fp8Linear(200, 128)
    with pytest.raises(ValueError, match=r"expected \[T, H\]"):
        RMSNorm(128, quantised=Fp8())(paddle.zeros([1, 2, 128]))
    with pytest.raises(ValueError, match="without scales"):
        Fp8Linear(128, 8)(RMSNorm(128, quantised=Fp8("static"))(paddle.zeros([2, 128]))[0])
    with pytest.raises(ValueError, match=r"expected \[T, 256\]"):
        Fp8Linear(256, 8)(paddle.zeros([2, 128]))


def filled_linear(columns=256, out=200):
    """A weight of random codes and scales of blocks, and its value."""
    linear, rng = Fp8Linear(columns, out, dtype="float32"), np.random.default_rng(5)
    weight = reference.round_to_e4m3(rng.standard_normal((out, columns)).astype(np.float32))
    scales = rng.uniform(0.5, 2, (-(-out // 128), columns // 128)).astype(np.float32)
    linear.weight.set_value(paddle.to_tensor(weight).view("float8_e4m3fn"))
    linear.weight_scale_inv.set_value(scales)
    value = wide(paddle.to_tensor(weight).view("float8_e4m3fn").astype("float32"))
    return linear, value * np.kron(scales, np.ones((128, 128)))[:out, :columns]


@pytest.mark.parametrize("by_column", [False, True])
def test_the_linear_multiplies_what_the_codes_stand_for(by_column):
    linear, weight = filled_linear()
    x = rows(5)
    quantised = RMSNorm(256, dtype="bfloat16", quantised=Fp8(by_column=by_column))(x)[0]
    codes = wide(quantised.codes.astype("float32")) * np.repeat(quantised.scales.numpy(), 128, axis=1)
    np.testing.assert_allclose(linear(quantised).numpy(), codes @ weight.T, rtol=2e-5, atol=1e-4)
    assert (linear(quantised) == linear(quantised.norm)).all(), "a norm that nobody quantised is quantised here"
    far = np.abs(linear(quantised).numpy() - wide(quantised.norm) @ weight.T).max()
    assert 0 < far < 0.1 * np.abs(weight).sum(1).max(), "FP8 rounds, and by no more than 1/16"
    assert linear(rows(0)).shape == [0, 200]
    biased = Fp8Linear(256, 200, dtype="float32", bias=True)
    biased.set_state_dict({**linear.state_dict(), "bias": paddle.arange(200, dtype="float32")})
    assert (biased(quantised) == linear(quantised) + paddle.arange(200, dtype="float32")).all()


def test_no_gradient_is_recorded_with_a_bias_either():
    """The linear behind it would refuse one, and so would a Site."""
    x = paddle.to_tensor(np.ones((2, 256), np.float32))
    first, second = Fp8Linear(256, 256, dtype="float32", bias=True), Fp8Linear(256, 128, dtype="float32", bias=True)
    with paddle.enable_grad():
        assert second(first(x)).stop_gradient and (first.bias == 0).all()


def test_a_kernel_of_the_host_takes_the_place_of_the_product():
    linear, _ = filled_linear()
    linear.product = lambda codes, scales, weight, weight_scales: (codes, scales, weight is linear.weight)
    got = linear(RMSNorm(256, dtype="bfloat16", quantised=Fp8())(rows(3))[0])
    assert got[0].dtype == paddle.float8_e4m3fn and got[1].shape == [3, 2] and got[2]


@pytest.mark.parametrize("by_column", [False, True])
def test_traced_it_gives_the_eager_bits(by_column):
    norm, (linear, _) = RMSNorm(256, dtype="bfloat16", quantised=Fp8(by_column=by_column)), filled_linear()
    norm.eval(), linear.eval()

    def forward(x):
        return linear(norm(x)[0])

    specs = [InputSpec([None, 256], "bfloat16")]
    traced = paddle.jit.to_static(forward, input_spec=specs, full_graph=True)
    with paddle.no_grad():
        for count in (1, 3):
            assert (traced(rows(count)) == forward(rows(count))).all()


@pytest.mark.parametrize("by_column", [False, True])
def test_in_a_traced_graph_an_op_may_read_the_scales(by_column):
    """Paddle's executor reads the result of an op as if it lay by rows."""
    norm = RMSNorm(256, dtype="bfloat16", quantised=Fp8(by_column=by_column))
    norm.eval()

    def forward(x):
        return norm(x)[0].scales * 1.0

    traced = paddle.jit.to_static(forward, input_spec=[InputSpec([None, 256], "bfloat16")], full_graph=True)
    with paddle.no_grad():
        for count in (1, 3, 5):
            assert (traced(rows(count)) == forward(rows(count))).all()


def test_a_gradient_is_refused():
    with paddle.enable_grad(), pytest.raises(FusionError, match="gradient"):
        RMSNorm(128, quantised=Fp8())(paddle.ones([1, 128]))
