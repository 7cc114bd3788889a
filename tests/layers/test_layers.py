"""The layers by themselves, one rank: values in every dtype, odd shapes, eager and traced."""

import copy
import pickle

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec
from support.sites import make_site
from support.tiny import DemoDecoder, hidden
from support.values import check, wide

from fd_fusion import FusionConfig, QKRMSNorm, RMSNorm, RowParallelLinear, reference
from fd_fusion.binding import bound, proving_pass
from fd_fusion.binding.qk_norms import Kernel
from fd_fusion.binding.report import Report
from fd_fusion.frameworks import paddle_ops
from fd_fusion.hosts import own_layers
from fd_fusion.reasons import FusionError
from fd_fusion.reference import round_to

DTYPES = ("float32", "bfloat16", "float16")
HEADS = {"q_heads": 3, "kv_heads": 5}  # more kv heads than q heads, on purpose
D = 8


def values(shape, dtype="float32", seed=0):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32")).astype(dtype)


def plain(x: np.ndarray, dtype: str):
    """What one rounding of the float32 result gives: the plain path of the budget."""
    return paddle.to_tensor(round_to(x.astype(np.float32), dtype).astype(np.float32))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype, shape, offset):
    norm = RMSNorm(48, 1e-6, weight_offset=offset, dtype="float32" if offset else dtype)
    norm.weight.set_value(values([48], seed=1).astype(norm.weight.dtype))
    x, residual = values(shape, dtype), values(shape, dtype, seed=2)
    out, total = norm(x, residual)
    assert out.dtype == total.dtype == x.dtype and out.shape == total.shape == list(shape)
    if 0 in shape:
        return
    want, want_total = reference.all_reduce_rms_norm(
        [wide(x)], wide(residual), wide(norm.weight), eps=1e-6, weight_offset=offset
    )
    check(out, want, plain(want, dtype), dtype, "out")
    check(total, want_total, plain(want_total, dtype), dtype, "residual_out")
    alone, same = norm(x)
    assert same is x, "without a residual, residual_out is x"
    check(
        alone, reference.rms_norm(wide(x), wide(norm.weight), eps=1e-6, weight_offset=offset), alone, dtype, "alone"
    )


def test_gemma_starts_as_the_identity_scale():
    assert (RMSNorm(8, weight_offset=1.0).weight == 0).all() and (RMSNorm(8).weight == 1).all()


@pytest.mark.parametrize("x, residual", [((2, 7), None), ((2, 8), (3, 8)), ((2, 8), (2, 8, 1))], ids=str)
def test_rms_norm_says_what_does_not_fit(x, residual):
    with pytest.raises(ValueError, match=r"RMSNorm: .*expected"):
        RMSNorm(8)(paddle.zeros(x), None if residual is None else paddle.zeros(residual))


def test_a_residual_of_another_dtype_is_an_error():
    with pytest.raises(ValueError, match=r"bfloat16.*expected.*float32"):
        RMSNorm(8)(paddle.zeros([2, 8]), paddle.zeros([2, 8]).astype("bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_parallel_linear_of_one_rank_is_a_linear(dtype):
    linear = RowParallelLinear(16, 24, has_bias=True, dtype=dtype)
    linear.bias.set_value(values([24], dtype, seed=3))
    x = values([5, 32])[:, ::2].astype(dtype)  # not contiguous
    want = wide(x) @ wide(linear.weight) + wide(linear.bias)
    check(linear(x), want, plain(want, dtype), dtype, "y")
    with pytest.raises(ValueError, match=r"RowParallelLinear: x .*expected a last dimension of 16"):
        linear(values([5, 17], dtype))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_qk_rms_norm_in_place_on_strided_rows(rows, dtype, offset):
    norm = QKRMSNorm(D, **HEADS, eps=1e-6, weight_offset=offset, dtype=dtype)
    norm.q_norm.weight.set_value(values([D], dtype, seed=1))
    norm.k_norm.weight.set_value(values([D], dtype, seed=2))
    width = (3 + 2 * 5) * D
    buffer = values([rows, width + 6], dtype)
    before = wide(buffer)
    qkv = buffer[:, 2 : 2 + width]
    with paddle.no_grad():
        assert norm(qkv, forward_meta=object()) is qkv
    want = before.copy()
    want[:, 2 : 2 + width] = reference.qk_rms_norm(
        before[:, 2 : 2 + width],
        wide(norm.q_norm.weight),
        wide(norm.k_norm.weight),
        **HEADS,
        eps=1e-6,
        weight_offset=offset,
    )
    if rows:
        check(buffer, want, plain(want, dtype), dtype, "qkv")
        v = 2 + 8 * D
        assert (wide(buffer)[:, v:] == before[:, v:]).all() and (wide(buffer)[:, :2] == before[:, :2]).all()


def test_a_nan_row_does_not_leak():
    norm = QKRMSNorm(D, 2, 1)
    qkv = values([3, 4 * D])
    qkv[1, :D] = float("nan")
    got = norm(qkv).numpy()
    assert (
        np.isnan(got[1, :D]).all() and np.isfinite(np.delete(got, 1, axis=0)).all() and np.isfinite(got[1, D:]).all()
    )


@pytest.mark.parametrize("full_graph", [True, False], ids=["ast", "sot"])
def test_traced_layers_give_the_eager_bits(full_graph):
    norm, linear, qk = RMSNorm(32), RowParallelLinear(16, 32, has_bias=True), QKRMSNorm(D, 2, 1)

    def forward(x, residual):
        out, total = norm(linear(x), residual)
        return qk(out), total

    for layer in (norm, linear, qk):
        layer.eval()
    traced = paddle.jit.to_static(forward, full_graph=full_graph)
    with paddle.no_grad():
        for rows in (1, 3):
            x, residual = values([rows, 16]), values([rows, 32], seed=1)
            for got, want in zip(traced(x, residual), forward(x, residual)):
                assert (got == want).all()


class InPlace:
    """What `bind` gives to a QKRMSNorm, with the stock formula in place of the kernel."""

    def __init__(self, layer):
        self._layer = layer

    def __call__(self, qkv):
        return self._layer.stock_forward(qkv)


def layers_of_one_rank(bound):
    """The three layers, eval(); `bound` as `bind` would, on one rank."""
    norm, linear, qk = RMSNorm(32), RowParallelLinear(16, 32, has_bias=True), QKRMSNorm(D, 2, 1)
    for layer in (norm, linear, qk):
        layer.eval()
    if bound:
        site = make_site(reduce=lambda x: x, norm=norm.stock_forward, limit=0)
        norm.__dict__["site"] = linear.__dict__["site"] = site
        qk.__dict__["kernel"] = InPlace(qk)
    return norm, linear, qk


@pytest.mark.parametrize("bound", [False, True], ids=["stock", "bound"])
@pytest.mark.parametrize("how", ["ast", "ast, H too", "sot"])  # SOT takes no InputSpec, and finds out by itself
def test_traced_with_sizes_that_are_not_known(how, bound):
    norm, linear, qk = layers_of_one_rank(bound)

    def forward(x, residual):
        out, total = norm(linear(x), residual)
        alone, _ = norm(linear(x))
        return qk(out), total, alone

    spec = [InputSpec([None, size if how == "ast" else None], "float32") for size in (16, 32)]
    ast = how != "sot"
    traced = paddle.jit.to_static(forward, full_graph=ast, input_spec=spec if ast else None)
    with paddle.no_grad():
        for rows in (3, 1, 5, 2):
            x, residual = values([rows, 16]), values([rows, 32], seed=1)
            for got, want in zip(traced(x, residual), forward(x, residual)):
                assert (got == want).all()


@pytest.mark.parametrize("bound", [False, True], ids=["stock", "bound"])
@pytest.mark.parametrize("full_graph", [True, False], ids=["ast", "sot"])
def test_a_traced_sum_leaves_its_input_alone(full_graph, bound, monkeypatch):
    """A graph holds one value for two equal products: an all-reduce in place would sum it twice."""
    monkeypatch.setattr(paddle_ops, "all_reduce", lambda x, group=None: x.add_(x))  # two ranks of equal shares
    norm, linear, _ = layers_of_one_rank(False)
    if bound:
        site = make_site(reduce=paddle_ops.all_reduce, norm=norm.stock_forward, limit=0)
        norm.__dict__["site"] = linear.__dict__["site"] = site

    def forward(x, residual):
        out, total = norm(linear(x), residual)
        again, same = norm(linear(x))
        return out, total, again, same

    traced = paddle.jit.to_static(forward, full_graph=full_graph)
    x, residual = values([3, 16]), values([3, 32], seed=1)
    with paddle.no_grad():
        for got, want in zip(traced(x, residual), forward(x, residual)):
            assert np.allclose(got.numpy(), want.numpy(), atol=1e-5)


@pytest.mark.parametrize("what", ["hidden", "residual", "dimensions", "dtype", "linear", "qk"])
def test_a_trace_says_what_cannot_fit(what):
    """A size that is known is compared, and one that is not is told as None."""
    norm, linear, qk = layers_of_one_rank(False)
    facts = {
        "hidden": (norm, [None, 31], None, "float32", r"x has shape \[None, 31\], expected a last dimension of 32"),
        "residual": (norm, [None, 32], [None, 1], "float32", r"residual is \[None, 1\] float32, expected"),
        "dimensions": (
            norm,
            [None, None],
            [None],
            "float32",
            r"residual is \[None\] float32, expected \[None, None\]",
        ),
        "dtype": (norm, [None, 32], [None, 32], "float16", r"residual is \[None, 32\] float16, expected"),
        "linear": (linear, [None, 17], None, "float32", r"x has shape \[None, 17\], expected a last dimension of 16"),
        "qk": (qk, [None, 23], None, "float32", r"qkv is \[None, 23\], expected \[T, at least 24\]"),
    }
    layer, shape, other, dtype, says = facts[what]
    specs = [InputSpec(shape, "float32")] + ([InputSpec(other, dtype)] if other else [])
    with pytest.raises(ValueError, match=says):
        paddle.jit.to_static(layer, full_graph=True, input_spec=specs).forward.concrete_program  # noqa: B018


def test_layers_keep_their_config_and_their_names():
    config = FusionConfig()
    layers = [RMSNorm(8, fusion_config=config), RowParallelLinear(8, 8, fusion_config=config)]
    layers.append(QKRMSNorm(D, 2, 1, fusion_config=config))
    assert all(layer.fusion_config is config for layer in layers)
    assert [list(layer.state_dict()) for layer in layers] == [
        ["weight"],
        ["weight"],
        ["q_norm.weight", "k_norm.weight"],
    ]


def test_a_copy_of_a_bound_layer_is_not_bound():
    """What it was bound to belongs to the other one, and reads the other one's weights."""
    site = make_site()
    layers = [RMSNorm(8), RowParallelLinear(8, 8)]
    for layer in layers:
        layer.__dict__["site"] = site
        assert copy.deepcopy(layer).site is None and layer.site is site
    assert pickle.loads(pickle.dumps(site)) is None
    qk = QKRMSNorm(8, 2, 1)
    (norm,) = own_layers.find_qk_norms(qk)
    norm.attach(Kernel(norm))
    assert copy.deepcopy(qk).kernel is None and qk.kernel is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_bound_model_can_be_copied_and_pickled(copied):
    """Its hook counts forwards, and held what runs at the second: that closes over workspaces of this process."""
    model = DemoDecoder(0, 1)
    state = bound.Bound(Report(FusionConfig(), "a test", "Model"), freezes_itself=True)
    state.undo.append(model.register_forward_pre_hook(state.forwards.start).remove)
    proving_pass._switch_on_or_undo(state, None, ())
    other = copied(model)
    x = hidden(2)
    assert (other(x) == model(x)).all() and state.forwards.number == 1, "a copy counts by itself"
    bound.undo_all(state)


def bound_pair():
    """A linear, and a norm with a Site whose fused op has no gradient, as a kernel has none."""
    linear, norm = RowParallelLinear(8, 8), RMSNorm(8)
    site = make_site(fused=lambda x, r: (x.detach(), x.detach()), limit=None)
    site.end_proof(True)
    site.checked = False
    norm.__dict__["site"] = site
    return linear, norm, site


def refuses_gradients(use):
    with pytest.raises(FusionError) as error:
        use()
    return error.value.reason.code == "gradients"


def test_a_fused_finish_in_training_is_an_error_and_not_a_gradient_of_zero():
    linear, norm, site = bound_pair()
    x = values([2, 8])
    for mode in (linear.train, linear.eval):
        mode()
        assert refuses_gradients(lambda: norm(linear(x)))
        with paddle.no_grad():
            norm(linear(x))
    assert refuses_gradients(lambda: norm(x)), "the norm's own weight would have one"
    norm.weight.stop_gradient = True
    norm(x)  # nothing that it was made from has a gradient
    (residual := values([2, 8])).stop_gradient = False
    assert refuses_gradients(lambda: norm(x, residual)), "a trained residual stream beside a frozen producer"
    with paddle.no_grad():
        norm(x, residual)
    site.refuses_gradients = False
    norm(linear(x))


def test_a_fused_finish_in_a_traced_training_is_an_error_too():
    """By SOT ours; in a whole graph Paddle's, which finds an op that has no gradient."""
    linear, norm, _ = bound_pair()

    def forward(x):
        return norm(linear(x))[0]

    for full_graph, kind in ((True, ValueError), (False, FusionError)):
        traced = paddle.jit.to_static(forward, full_graph=full_graph)
        with pytest.raises(kind):
            traced(values([2, 8])).sum().backward()


def test_the_q_and_k_norm_in_training():
    """Bound an error; not bound the gradient of the formula: in place there was none, for q, for k or a weight."""
    norm, qkv = QKRMSNorm(D, 2, 1), values([3, 4 * D])
    qkv.stop_gradient = False
    out = norm(qkv * 1.0)
    (out * values([3, 4 * D], seed=3)).sum().backward()
    got = [qkv.grad, norm.q_norm.weight.grad, norm.k_norm.weight.grad]
    assert all(float(one.abs().max()) > 0 for one in got)
    epsilon, row = 1e-2, qkv.detach().clone()
    row[1, 3] += epsilon
    with paddle.no_grad():
        change = ((norm(row) - norm(qkv.detach().clone())) * values([3, 4 * D], seed=3)).sum() / epsilon
    assert abs(float(change) - float(qkv.grad[1, 3])) < 2e-2
    norm.q_norm.weight.clear_gradient()
    norm(qkv.detach().clone()).sum().backward()
    assert float(norm.q_norm.weight.grad.abs().max()) > 0, "the weights alone are trained"
    norm.__dict__["kernel"] = lambda x: x
    assert refuses_gradients(lambda: norm(qkv * 1.0)) and refuses_gradients(lambda: norm(qkv.detach().clone()))
    with paddle.no_grad():
        norm(qkv * 1.0)
