"""bind and unbind of a whole model: numbers, names, instance dicts, proof, to_static. Any number of ranks.

argv: the backend, "auto" if none; then "eager" to leave out to_static, whose tracing takes most of the time, and "old"
where Paddle's linears give a row other bits in a larger batch: on GPUs, and on the CPU in Paddle 2.6.
"""

import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import paddle
import paddle.distributed as dist
from support import rank as this
from support.tiny import DemoDecoder, hidden

import fd_fusion
from fd_fusion.binding import lifecycle
from fd_fusion.reasons import FusionError, FusionTimeout, HandOverError

LIMIT = 4


def snapshot(model):
    """What must be the same before and after: the instance dicts, their very objects. to_static itself sets _built."""
    return [
        {key: id(value) for key, value in layer.__dict__.items() if key != "_built"}
        for layer in model.sublayers(include_self=True)
    ]


def changed(model):
    """What of the instance dicts is not as it was."""
    pairs = zip(model.sublayers(include_self=True), before, snapshot(model))
    return [(type(layer).__name__, key) for layer, a, b in pairs for key in {**a, **b} if a.get(key) != b.get(key)]


def close(got, want):
    return float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())


def states_equal(a, b):
    return list(a) == list(b) and all(np.array_equal(a[key], b[key]) for key in a)


rank, size = this.start()
model = DemoDecoder(rank, size)
backend = (sys.argv[1:] + ["auto"])[0]
config = fd_fusion.FusionConfig(max_token_num=LIMIT, timeout_s=10, backend=backend)
x = hidden(7)
stock, stock_of_3 = model(x), model(x[:3])  # gloo's order of sums depends on T
before = snapshot(model)
state = {key: value.numpy() for key, value in model.state_dict().items()}
identities = {key: id(value) for key, value in model.named_parameters()}

report = fd_fusion.bind(model, config, example=lambda: (model(x[:2]),))
if size == 1:
    assert not report.sites and {one.reason.code for one in report.rejected} == {"one_rank"}
    assert not changed(model) and (model(x) == stock).all()
    this.record(ok=True)
    sys.exit()
assert len(report.sites) == 6 and report.proven and not report.rejected, report.lines()
frozen = lambda: {line.selected.op.stats().get("frozen") for line in report.sites} - {None}  # noqa: E731
assert frozen() in ({False}, set()), "the first fused forward may still compile"
assert fd_fusion.bind(model, config) is report, "binding twice"
assert fd_fusion.report() == [report]
assert states_equal(state, {key: value.numpy() for key, value in model.state_dict().items()})
assert identities == {key: id(value) for key, value in model.named_parameters()}

# Above the limit: stock, bit for bit. Up to it: fused.
counts = lambda: dict(report.sites[0].calls)  # noqa: E731
start = counts()
assert (model(x) == stock).all()
assert counts()["too_many_rows"] == start.get("too_many_rows", 0) + 1
fused = {}
for rows in (0, 1, LIMIT - 1, LIMIT):
    fused[rows] = model(x[:rows])
    assert fused[rows].shape == [rows, 32] and (rows == 0 or close(fused[rows], stock[:rows])), rows
assert counts()["fused"] == start.get("fused", 0) + 3 and counts()["no_rows"] == 1
assert frozen() in ({True}, set()), "a forward has run fused: from now on a rank is waited for timeout_s alone"
fd_fusion.freeze()
fd_fusion.reset()  # with nothing to mend it changes nothing
assert (model(x[:LIMIT]) == fused[LIMIT]).all()
assert {line.selected.op.stats().get("generation", 1) for line in report.sites} == {1}
if "old" not in sys.argv and not x.place.is_gpu_place():
    assert (fused[1] == fused[LIMIT][:1]).all(), "the same bits for every T"
three_d = model(x[:4].reshape([2, 2, 32]))
assert three_d.shape == [2, 2, 32] and (three_d.reshape([4, 32]) == fused[4]).all()


# The same under to_static, by AST and by SOT: one graph, the decision taken for the T of each run.
def forward(hidden_states):
    return model(hidden_states)


traces = {}
for full_graph in () if "eager" in sys.argv else (True, False):
    traced = traces[full_graph] = paddle.jit.to_static(forward, full_graph=full_graph)
    for rows in (1, LIMIT, LIMIT + 1):
        start = counts()
        got = traced(x[:rows])
        assert close(got, stock[:rows]), (full_graph, rows)
        code = "fused" if rows <= LIMIT else "too_many_rows"
        assert counts()[code] == start[code] + 1, (full_graph, rows, start, counts())

# Hand-over errors name the site, and the next call starts afresh.
linear, norm = model.layers[1].self_attn.o_proj, model.layers[1].post_attention_layernorm
for misuse, code in (
    (lambda: (linear(x[:2]), linear(x[:2])), "double_hand_over"),
    (lambda: norm(linear(x[:2]) * 1.0, x[:2]), "other_tensor"),
    (lambda: norm(x[:2], x[:2]), "nothing_handed_over"),
):
    try:
        misuse()
        raise AssertionError(f"no {code}")
    except HandOverError as error:
        assert error.reason.code == code and "layers.1.self_attn.o_proj" in str(error), error
assert close(model(x[:2]), stock[:2])

# A forward that raises between the two ends costs the next one nothing.
for layer in (norm, model.norm, linear):
    raising = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        model(x[:2])
        raise AssertionError("no error")
    except ZeroDivisionError:
        raising.remove()
    assert (model(x[:LIMIT]) == fused[LIMIT]).all()

sites = [line.site for line in report.sites]
fd_fusion.unbind(model)
assert not changed(model), changed(model)
assert (model(x) == stock).all() and fd_fusion.report() == []

# What was kept from before raises: it would read memory that is given back. Paddle wraps what an op raises in a
# whole graph, and prints ours; SOT sees that the layers have changed, and traces anew.
report.to_dict()
uses = [(FusionError, lambda site=site: site.complete(x[:2], None)) for site in sites]
uses += [(FusionError, lambda: sites[0].hand_over(x[:2])), (FusionError, lambda: sites[0].finish(x[:2], None))]
if traces:
    uses += [(SystemError, lambda rows=rows: traces[True](x[:rows])) for rows in (1, LIMIT + 1)]
    assert close(traces[False](x[:2]), stock[:2])
for kind, use in uses:
    try:
        use()
        raise AssertionError("a closed site was used")
    except kind as error:
        assert kind is SystemError or error.reason.code == "closed", error

# Without an example the proving pass runs on the arguments of the first forward, which is fused after it.
report = fd_fusion.bind(model, config)
assert not report.proven and "not proven" in report.lines()[0]
assert close(model(x[:3]), stock_of_3) and report.proven
assert counts() == {"not_proven": 1, "fused": 1}
fd_fusion.unbind(model)
assert not changed(model), changed(model)

# A rank that is late: all ranks learn of it in timeout_s, since a model of our own layers freezes by itself. A reset
# goes on, and what the forward left between its two ends is no error.
if backend == "triton":
    fd_fusion.bind(model, dataclasses.replace(config, timeout_s=2), example=lambda: (model(x[:2]),))
    want = [model(x[:2]) for _ in range(2)][1]
    started = time.monotonic()
    if rank:
        dist.barrier()
    try:
        model(x[:2]).numpy()
        fd_fusion.check()  # a GPU gives NaN first
        raise AssertionError("no FusionTimeout")
    except FusionTimeout:
        assert time.monotonic() - started < 15, "not ten times timeout_s"
    if not rank:
        dist.barrier()
    fd_fusion.reset()
    fd_fusion.check()
    assert (model(x[:2]) == want).all()
    fd_fusion.unbind(model)

# Models that are dropped without unbind: all that is open counts, and the next bind closes what nobody has any more.
small = dataclasses.replace(config, workspace_mb=1)
for _ in range(3):
    dropped = DemoDecoder(rank, size)
    assert fd_fusion.bind(dropped, small, example=lambda: (dropped(x[:2]),)).proven
    assert len(lifecycle.held()) == 1 and lifecycle.taken_bytes() <= 1 << 20
fd_fusion.unbind(dropped)
assert not lifecycle.held()
this.record(ok=True, bits=fused[LIMIT].numpy().tobytes().hex())
