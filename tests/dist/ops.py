"""The fused and the stock finish of one pair of layers against float64, over dtypes and odd sizes. 2 or more ranks."""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import paddle
import paddle.distributed as dist
from support import rank as this
from support.values import check, wide

from fd_fusion import RMSNorm, RowParallelLinear, reference
from fd_fusion.backends import paddle as backend
from fd_fusion.frameworks import paddle_ops
from fd_fusion.comm.group import Group
from fd_fusion.hosts.own_layers import OwnStock
from fd_fusion.reasons import FusionError
from fd_fusion.reference import round_to
from fd_fusion.site import Site
from fd_fusion.spec import OpSpec

EPS, K = 1e-5, 16
rank, size = this.start()


def spec(hidden_size, dtype):
    return OpSpec(rank, size, hidden_size, dtype, eps=EPS, max_token_num=1000, timeout_s=10.0)


def pair_of(hidden_size, dtype, offset, weight_dtype):
    """A linear with a bias and a norm, the same norm weight on all ranks."""
    linear = RowParallelLinear(K * size, hidden_size, has_bias=True, dtype=dtype)
    linear.weight.set_value(this.rank_values([K, hidden_size], rank, 1, dtype))
    linear.bias.set_value(this.rank_values([hidden_size], 0, 2, dtype))
    norm = RMSNorm(hidden_size, EPS, weight_offset=offset, dtype=weight_dtype)
    norm.weight.set_value(this.rank_values([hidden_size], 0, 3, weight_dtype))
    return linear, norm


def partials(linear, rows, hidden_size, dtype):
    """Every rank's partial sum, as every rank can compute it: W and x by seed, the bias once, on rank 0."""
    out = []
    for peer in range(size):
        x = wide(this.rank_values([rows, K], peer, 4, dtype))
        y = x.astype(np.float32) @ wide(this.rank_values([K, hidden_size], peer, 1, dtype)).astype(np.float32)
        out.append(round_to(y + (wide(linear.bias).astype(np.float32) if peer == 0 else 0), dtype))
    return out


worst = 0.0
group = paddle_ops.group_of()
assert isinstance(group, Group) and (group.rank, group.size) == (rank, size)
cases = itertools.product(("float32", "bfloat16", "float16"), (0, 1, size + 1, 17), (True, False), (0.0, 1.0))
for dtype, rows, with_residual, offset in cases:
    hidden_size = 40
    weight_dtype = "float32" if offset else dtype
    linear, norm = pair_of(hidden_size, dtype, offset, weight_dtype)
    op = backend.open(spec(hidden_size, dtype), group)
    x = this.rank_values([rows, K], rank, 4, dtype)
    residual = this.rank_values([rows, hidden_size], 0, 5, dtype) if with_residual else None
    unbound = norm(linear(x), residual)
    site = Site("pair", op, OwnStock(linear, norm))
    linear.site = norm.site = site
    results = {}
    for proven in (False, True):  # stock, then fused
        site.end_proof(proven)
        results[proven] = norm(linear(x), residual)
    assert all((a == b).all() for a, b in zip(results[False], unbound)), "the stock finish is the unbound layers' bits"
    if rows == 0:
        assert all(one.shape == [0, hidden_size] for pair in results.values() for one in pair)
        continue
    assert site.calls["fused"] == 1
    truth = reference.all_reduce_rms_norm(
        partials(linear, rows, hidden_size, dtype),
        wide(residual) if with_residual else None,
        wide(norm.weight),
        eps=EPS,
        weight_offset=offset,
    )
    for i, name in enumerate(("norm_out", "residual_out")):
        worst = max(worst, check(results[True][i], truth[i], results[False][i], dtype, (name, dtype, rows, offset)))

op.close()
for use in (lambda: op.finish(x, None, norm.weight, EPS, 0.0), op.check, op.freeze, op.reset):
    try:
        use()
        raise AssertionError("a closed backend was used")
    except FusionError as error:
        assert error.reason.code == "closed", error

# gloo's float16 sum is inf; ours is right.
half = paddle.full([4, 8], 1.0 + rank, dtype="float16")
raw = half.clone()
dist.all_reduce(raw)
assert np.isinf(raw.numpy()).all(), "gloo has learnt to add float16: the float32 detour may go"
assert (paddle_ops.all_reduce(half).numpy() == size * (size + 1) / 2).all()

# A non-contiguous x, and the sentences for wrong shapes.
linear, norm = pair_of(40, "float32", 0.0, "float32")
strided = this.rank_values([5, 2 * K], rank, 6)[:, ::2]
assert np.allclose(linear(strided).numpy(), linear(strided.clone()).numpy())
for bad in (lambda: norm(paddle.zeros([2, 40]), paddle.zeros([3, 40])), lambda: norm(paddle.zeros([2, 41]))):
    try:
        bad()
        raise AssertionError("no ValueError")
    except ValueError as error:
        assert "expected" in str(error)
this.record(ok=True, worst=worst)
