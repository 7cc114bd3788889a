"""What the comparison at bind sees of a kernel of q and k that is not the layer's norm, and what it lets pass."""

import dataclasses

import numpy as np
import paddle
import pytest

from fd_fusion import FusionConfig
from fd_fusion.binding import qk_norms as qk
from fd_fusion.hosts import own_layers
from fd_fusion.layers.qk_rms_norm import QKRMSNorm
from fd_fusion.reference import round_to

DTYPES = ["bfloat16", "float16", "float32"]


def norm_of(dtype, eps=1e-6, offset=0.0, head_dim=64, weight_dtype=None):
    layer = QKRMSNorm(head_dim, 4, 2, eps, weight_offset=offset, dtype=weight_dtype or dtype)
    rng = np.random.default_rng(7)
    for part in (layer.q_norm, layer.k_norm):
        part.weight.set_value(
            paddle.to_tensor(rng.normal(1 - offset, 0.2, head_dim).astype("float32")).astype(part.weight.dtype)
        )
    (norm,) = own_layers.find_qk_norms(layer)
    return dataclasses.replace(norm, dtype=dtype)


def with_numbers(norm, eps, weight_offset=0.0):
    """The kernel's alone: the stock formula of the layer keeps its own."""
    return dataclasses.replace(norm, numbers=lambda: (eps, weight_offset))


def outcome(norm):
    on, why = qk.choose_qk_norms([norm], FusionConfig(backend="triton"))
    assert bool(on) != bool(why)
    return why[norm.name].code if why else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
def test_the_right_kernel_is_taken(dtype, eps):
    assert outcome(norm_of(dtype, eps)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 128])
def test_the_right_kernel_with_an_offset_and_wide_weights(dtype, head_dim):
    assert outcome(norm_of(dtype, 1e-6, 1.0, head_dim, weight_dtype="float32")) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("factor", [0.0001, 0.5, 2, 10])
def test_a_wrong_eps_is_refused(dtype, eps, factor):
    norm = norm_of(dtype, eps)
    assert outcome(with_numbers(norm, eps * factor)) == "qk_differs"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forgotten_offset_and_exchanged_weights_are_refused(dtype):
    norm = norm_of(dtype, offset=1.0)
    assert outcome(with_numbers(norm, norm.numbers()[0])) == "qk_differs"
    assert outcome(dataclasses.replace(norm, weights=lambda: norm.weights()[::-1])) == "qk_differs"
    heads = dataclasses.replace(norm, q_heads=3, kv_heads=3)
    assert outcome(heads) == "qk_differs"


def test_a_kernel_that_touches_v_is_refused(monkeypatch):
    norm, right = norm_of("bfloat16"), qk.Kernel.__call__

    def wrong(self, qkv):
        out = right(self, qkv)
        out[:, -1] = 0.0
        return out

    monkeypatch.setattr(qk.Kernel, "__call__", wrong)
    assert outcome(norm) == "qk_wrote_v"


def test_zero_weights_prove_nothing():
    norm = norm_of("bfloat16")
    norm.weights()[1].set_value(paddle.zeros([64], dtype="bfloat16"))
    assert outcome(norm) == "qk_zero"


@pytest.mark.parametrize("eps", [0.0, -1e-6, 1e-50, float("nan")])
def test_an_eps_that_is_no_positive_float32_is_refused(eps):
    assert outcome(with_numbers(norm_of("bfloat16"), eps)) == "eps"


def test_nobody_else_s_random_numbers_are_drawn():
    norm = norm_of("float32")
    paddle.seed(5)
    want = paddle.rand([3]).tolist()
    paddle.seed(5)
    outcome(norm)
    assert paddle.rand([3]).tolist() == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_show_eps_and_both_signs(dtype):
    norm, eps = norm_of(dtype, 1e-6), 1e-6
    rows = round_to(qk._rows(norm, dtype), dtype).astype(np.float64)
    heads = rows.reshape(len(rows), -1, norm.head_dim)
    square = (heads**2).mean(-1)
    assert (square[0] < 0.2 * eps).all() and (square[2:] > 0.3).all()
    assert ((square[1] > 0.3 * eps) & (square[1] < 3 * eps)).all()
    assert (heads < 0).any(-1).all() and (heads > 0).any(-1).all()
