"""bind on one rank and in one process: what is left alone, and what it says."""

import copy
import gc
import threading
import weakref
from types import SimpleNamespace

import paddle
import pytest
from support.sites import make_site
from support.tiny import DemoDecoder, hidden

import fd_fusion
from fd_fusion import FusionConfig, exact
from fd_fusion.binding import backend_selection, bound, first_forward, lifecycle, opening, proving_pass
from fd_fusion.binding import bind as binding
from fd_fusion.binding.bound import Bound
from fd_fusion.binding.evidence import Contract
from fd_fusion.binding.forwards import Forwards, on_copies
from fd_fusion.binding.outputs import first_difference, relative_errors, tensors_of, within_spread
from fd_fusion.binding.pairs import without_hooked
from fd_fusion.binding.proof import Proof
from fd_fusion.binding.report import Report, SiteLine
from fd_fusion.comm import group as group_module
from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Verdict, agree
from fd_fusion.frameworks import paddle_ops
from fd_fusion.hosts import own_layers
from fd_fusion.reasons import BindError, FusionError, because
from fd_fusion.site import Rejected, Site
from fd_fusion.spec import Fp8


def test_a_rank_s_own_words_do_not_tell_its_model_from_the_others():
    """Why a norm is not quantised may hold the text of an error, which differs by rank: the code alone counts."""

    def label(fp8):
        facts = {"name": "p", "hidden_size": 128, "dtype": "bfloat16", "weight_dtype": "bfloat16", "eps": 1e-6}
        pair = SimpleNamespace(**facts, weight_offset=0.0, fp8=fp8)
        return opening.label_of(paddle.nn.Layer(), [pair], FusionConfig(), False)[0]

    assert label(because("fp8_differs", detail="on rank 0")) == label(because("fp8_differs", detail="on rank 1"))
    assert len({label(None), label(because("fp8_differs", detail="")), label(Fp8()), label(Fp8("divide"))}) == 4


@pytest.mark.parametrize(
    "config, environ, code, source",
    [
        (None, {}, "not_asked", "no source"),
        (FusionConfig(), {"FD_FUSION_DISABLE": "1"}, "kill_switch", "FD_FUSION_DISABLE"),
        (FusionConfig(enable_all_reduce_rms_norm=False), {}, "disabled", "an argument"),
        (None, {"FD_FUSION_CONFIG": '{"enable_all_reduce_rms_norm": false}'}, "disabled", "FD_FUSION_CONFIG"),
    ],
)
def test_what_is_not_asked_for_is_off_with_a_reason(config, environ, code, source, monkeypatch):
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    model = DemoDecoder(0, 1)
    report = fd_fusion.bind(model, config)
    assert report.off.code == code and report.source == source and not report.sites
    assert str(report.off) in report.lines()[0]
    fd_fusion.unbind(model)


def test_one_rank_has_no_site_and_the_stock_bits():
    model, x = DemoDecoder(0, 1), hidden(3)
    with paddle.no_grad():
        stock = model(x)
        report = fd_fusion.bind(model, FusionConfig(strict=True, backend="paddle"))
        assert {one.reason.code for one in report.rejected} == {"one_rank"}
        assert (model(x) == stock).all()
    fd_fusion.unbind(model)


def test_a_model_without_pairs_is_left_alone_and_says_so():
    model = paddle.nn.Sequential(paddle.nn.Linear(4, 4))
    before = [dict(layer.__dict__) for layer in model.sublayers(include_self=True)]
    report = fd_fusion.bind(model, FusionConfig())
    assert report.off.code == "no_pairs" and "Sequential" in report.lines()[0]
    assert [dict(layer.__dict__) for layer in model.sublayers(include_self=True)] == before
    fd_fusion.unbind(model)


def test_the_layers_own_config_counts_and_two_are_an_error():
    report = fd_fusion.bind(DemoDecoder(0, 1, config=FusionConfig(timeout_s=7)))
    assert report.config.timeout_s == 7 and report.source == "the model's layers"
    mixed = DemoDecoder(0, 1, config=FusionConfig())
    mixed.norm.fusion_config = FusionConfig(strict=True)
    with pytest.raises(ValueError, match="different fusion configs"):
        fd_fusion.bind(mixed)


def test_unbind_of_an_unbound_model_does_nothing():
    fd_fusion.unbind(DemoDecoder(0, 1))


WEIGHT = paddle.rand([32]) + 0.5


def host(total, residual):
    return paddle_ops.rms_norm(total, WEIGHT, eps=1e-6, residual=residual)


def right(x, residual):
    """Two ranks that hold the same: the sum is x + x."""
    norm_out, total = paddle_ops.rms_norm(x + x, WEIGHT, eps=1e-6, residual=residual)
    return norm_out, total


def make_proof(fused=right, names=("a -> b",)):
    """A proof of sites whose two ranks hand over the same; but of known numbers each holds its own."""
    known = [exact.probe_partial(rank, 2, 32, 1e-6, "float32") for rank in (0, 1)]

    def both(x):
        is_known = x.shape[0] <= 2 and (x.numpy() == known[0][: x.shape[0]]).all()
        return x + paddle.to_tensor(known[1][: x.shape[0]]) if is_known else x + x

    def run(x, residual):
        return fused(both(x) / 2, residual)

    sites = [make_site(name, fused=run, reduce=both, norm=host, limit=4) for name in names]
    contracts = [Contract(name, 2, "float32", 1e-6, 0.0, True) for name in names]
    proof = Proof([(site, contract, lambda: WEIGHT, 0) for site, contract in zip(sites, contracts)])
    for site in sites:
        site.start_proof(proof)
    return proof, *sites


def wrong_eps(x, residual):
    return paddle_ops.rms_norm(x + x, WEIGHT, eps=1e-5, residual=residual)


@pytest.mark.parametrize(
    "fused, code",
    [
        (right, None),
        (wrong_eps, "proof_failed"),
        (lambda x, r: right(x, None), "proof_failed"),
        (lambda x, r: (right(x, r)[0] * 1.001, right(x, r)[1]), "proof_failed"),
        (lambda x, r: (right(x, r)[0], right(x, r)[1] + 1), "proof_failed"),
        (lambda x, r: (right(x, r)[0] * float("nan"), right(x, r)[1]), "proof_failed"),
        (lambda x, r: tuple(one.astype("float16") for one in right(x, r)), "proof_raised"),
        (lambda x, r: 1 / 0, "proof_raised"),
    ],
)
def test_the_proving_pass_judges_the_kernel_of_every_site(fused, code):
    proof, site = make_proof(fused)
    partial, residual = paddle.randn([6, 32]), paddle.randn([6, 32])
    kept = partial.clone()
    out, _ = site.finish(site.hand_over(partial), residual)
    assert (out == host(kept * 2, residual)[0]).all(), "the pass itself gives the host's result"
    refusal = proof.own_refusal() or proof.joint_refusal([proof.words, proof.words])
    assert (refusal and refusal.code) == code, refusal
    assert refusal is None or "a -> b" in str(refusal)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("fault", ["dtype", "raises", "weight"])
def test_every_launch_is_made_before_anything_is_judged(fault, residual):
    """What another rank still launches waits for this one, and so does the host's all-reduce of known numbers."""
    launched = {}
    for what in ("nothing", fault):
        calls = launched[what] = []

        def fused(x, residual, what=what, calls=calls):
            calls.append(("fused", x.shape[0], residual is not None))
            if what == "raises" and sum(call[0] == "fused" for call in calls) == 1:
                raise RuntimeError("of this launch alone")
            out = right(x, residual)
            return tuple(one.astype("float16") for one in out) if what == "dtype" else out

        proof, site = make_proof(fused)
        reduce = site.stock.reduce
        site.stock.reduce = lambda x, reduce=reduce, calls=calls: calls.append(("host", x.shape[0])) or reduce(x)
        if what == "weight":
            contract, _, number = proof._of[site.name]
            proof._of[site.name] = contract, lambda: 1 / 0, number
        site.finish(site.hand_over(paddle.randn([6, 32])), paddle.randn([6, 32]) if residual else None)
        assert (proof.own_refusal() and proof.own_refusal().code) == (None if what == "nothing" else "proof_raised")
    calls = launched["nothing"]
    assert sorted(map(str, calls)) == sorted(map(str, launched[fault])) and len(calls) == (7 if residual else 6)


def test_what_was_handed_over_is_spoilt_for_whoever_else_reads_it():
    proof, site = make_proof()
    partial = paddle.randn([3, 32])
    assert site.hand_over(partial) is partial and bool(paddle.isnan(partial).all())
    out, _ = site.finish(partial, None)
    assert not bool(paddle.isnan(out).any()) and proof.own_refusal() is None


@pytest.mark.parametrize(
    "between, code",
    [
        (lambda x: x.add_(paddle.ones_like(x)), "changed_in_place"),
        (lambda x: (x.copy_(paddle.ones_like(x), False), x)[1], "overwritten"),
        (lambda x: x * 1.0, "other_tensor"),
    ],
)
def test_a_change_between_the_ends_is_recorded_and_not_raised(between, code):
    proof, site = make_proof()
    partial = site.hand_over(paddle.ones([2, 32]))
    site.finish(between(partial), None)
    assert proof.own_refusal().code == code and "a -> b" in str(proof.own_refusal())


def test_what_was_never_handed_over_is_left_as_it_is():
    """A pair that was guessed wrong finishes another tensor, as the model's input, and gloo sums in place."""
    proof, site = make_proof()
    site.stock.reduce = lambda x: x.add_(x)
    x = paddle.randn([3, 32])
    before = x.clone()
    site.finish(x, None)
    assert (x == before).all() and proof.own_refusal().code == "nothing_handed_over"


@pytest.mark.parametrize("handed, finished", [(0, 0), (1, 0), (2, 2)])
def test_a_site_must_match_exactly_once(handed, finished):
    proof, site, other = make_proof(names=("a -> b", "c -> d"))
    other.finish(other.hand_over(paddle.ones([1, 32])), None)
    for _ in range(max(handed, finished)):
        partial = site.hand_over(paddle.ones([1, 32]))
        if finished:
            site.finish(partial, None)
    assert proof.own_refusal().code == "unmatched"


def test_a_miss_takes_the_norms_of_q_and_k_away_too():
    """The model's outputs in the proving pass are theirs as well: a model is never half bound."""
    reason = because("outputs_differ", output=0, site="none")
    state = bound.Bound(Report(FusionConfig(), "a test", "Model"))
    state.report.qk_fused, undone = ["layers.0.qk_norm"], []
    state.undo += [lambda: undone.append("site"), lambda: undone.append("qk")]
    proving_pass._switch_on_or_undo(state, reason, (0,))
    assert sorted(undone) == ["qk", "site"] and not state.undo
    assert not state.report.qk_fused and state.report.qk_stock == {"layers.0.qk_norm": reason}


def test_an_undo_that_raises_keeps_nothing_else_bound():
    """A host's attribute that is gone, for example: the rest is undone, closed, and then it is told."""
    state, done = bound.Bound(Report(FusionConfig(), "a test", "Model")), []

    def fails(name):
        done.append(name)
        raise AttributeError(name)

    site = make_site()
    state.sites.append((None, site))
    state.undo += [lambda: done.append("site"), lambda: fails("first")]
    state.undo += [lambda: done.append("qk"), lambda: fails("qk first")]
    op = SimpleNamespace(bytes=0, close=lambda: done.append("close"))
    state.selected.append(SimpleNamespace(op=op))
    with pytest.raises(AttributeError, match="qk first"):
        bound.undo_all(state)
    assert done == ["qk first", "qk", "first", "site", "close"]
    with pytest.raises(FusionError, match="closed"):
        site.complete(paddle.ones([1, 2]), None)
    bound.undo_all(state)
    assert len(done) == 5
    state.undo.append(lambda: fails("again"))
    bound.give_up(state, ValueError("the first"))
    assert "the first" in str(state.report.off), "the error of an undo takes no other's place"


def armed(model, state):
    first_forward._prove_in_first_forward(model, state, on_copies)
    return model.__dict__["forward"]


def test_a_first_forward_whose_vote_fails_leaves_nothing_bound():
    model, undone = paddle.nn.Linear(2, 2), []
    state = bound.Bound(Report(FusionConfig(), "a test", "Model"), undo=[lambda: undone.append("site")])
    state.groups.append(Group("g", 0, 2, (0, 1), BrokenStore()))
    armed(model, state)
    with pytest.raises(FusionError, match="it is gone"):
        model(paddle.ones([1, 2]))
    assert undone == ["site"] and "forward" not in model.__dict__
    assert state.report.off.code == "no_store" and not state.report.sites and not state.on
    model(paddle.ones([1, 2]))


def test_bind_tries_anew_after_a_first_forward_that_gave_up():
    """It returned the report of the failed one for ever: "3 sites, not proven yet", and nothing was to come."""
    model, config = paddle.nn.Linear(2, 2), FusionConfig()
    state = bound.Bound(Report(config, "a test", "Model"))
    state.groups.append(Group("g", 0, 2, (0, 1), BrokenStore()))
    armed(model, state)
    binding._bound[model] = state
    with pytest.raises(FusionError, match="it is gone"):
        model(paddle.ones([1, 2]))
    report = fd_fusion.bind(model, config)
    assert report is not state.report and report.off.code == "no_pairs"
    fd_fusion.unbind(model)


def test_a_copy_of_a_model_that_is_not_proven_yet_is_a_model_of_its_own():
    model = paddle.nn.Linear(2, 2)
    state = bound.Bound(Report(FusionConfig(), "a test", "Model"))
    state.groups.append(Group("g", 0, 2, (0, 1), BrokenStore()))
    armed(model, state)
    other = copy.deepcopy(model)
    other.weight.set_value(paddle.zeros([2, 2]))
    other.bias.set_value(paddle.ones([2]))
    assert (other(paddle.ones([1, 2])) == 1).all()


def test_a_model_that_waits_for_its_proof_is_traced_as_stock():
    """to_static reads the names of the arguments off the forward that waits, and asked for none."""
    model = DemoDecoder(0, 1)
    state = bound.Bound(Report(FusionConfig(), "a test", "Model"))
    state.groups.append(Group("g", 0, 2, (0, 1), BrokenStore()))
    with paddle.no_grad():
        want = model(hidden(2))
        armed(model, state)
        got = paddle.jit.to_static(model, full_graph=True)(hidden(2))
    assert paddle.allclose(got, want, atol=1e-5) and state.on
    bound.undo_all(state)


def test_a_model_that_waits_for_its_proof_can_be_dropped():
    model = paddle.nn.Linear(2, 2)
    state, alive = bound.Bound(Report(FusionConfig(), "a test", "Model")), weakref.ref(model)
    armed(model, state)
    del model
    gc.collect()
    assert alive() is None
    bound.undo_all(state)


def test_a_first_forward_that_raises_is_the_callers_own(caplog):
    """Told once, and tried again; a third time is the last, since each costs the caller a forward."""
    model = DemoDecoder(0, 1)
    state = bound.Bound(Report(FusionConfig(), "a test", "Model"))
    armed(model, state)
    for turn in range(4):
        with pytest.raises(ValueError, match="last dimension"):
            model(paddle.ones([1, 3]))
        waiting = state.report.waiting and state.report.waiting.code
        assert waiting == ("forward_raised" if turn < 2 else None) and state.on == (turn < 2)
        assert ("forward" in model.__dict__) == (turn < 2)
    assert len([one for one in caplog.records if "forward of bind" in one.message]) == 1


@pytest.mark.parametrize("strict, code", [(False, "zeros"), (True, "zeros"), (True, "no_rows_yet")])
def test_a_pass_that_shows_nothing_is_tried_less_and_less_often(strict, code, monkeypatch):
    """A layer that is zero for good made three forwards of each, for ever, and strict said nothing."""
    model, tried, turn = DemoDecoder(0, 1, layers=1), [], 0
    state = bound.Bound(Report(FusionConfig(strict=strict), "a test", "Model"))

    def prove(model, state, example, first_forward):
        tried.append(turn)
        return proving_pass._try_again(state, because(code, **({"site": "a -> b"} if code == "zeros" else {})))

    monkeypatch.setattr(first_forward, "prove", prove)
    state.sites.append(
        (SimpleNamespace(name="a -> b"), SimpleNamespace(end_proof=lambda _: None, close=lambda: None))
    )
    armed(model, state)
    ends = strict and code == "zeros"
    for turn in range(18):
        if ends and turn == 4:
            with pytest.raises(BindError, match="zeros"):
                model(hidden(1))
            break
        model(hidden(1))
    assert tried == [0, 1, 2, 4] + [8, 16] * (not ends)
    assert state.on != ends and ("forward" in model.__dict__) != ends


class Strange:
    """An output that takes part in a forward and cannot be looked at."""

    shape, dtype = [2, 2], "float32"

    def clone(self):
        return self

    def detach(self):
        raise RuntimeError("on purpose")


def test_outputs_that_cannot_be_compared_are_a_reason_that_is_voted_on():
    """The comparison raised on one rank, and the others waited for its vote."""
    forwards = Forwards([], Proof([]), Strange, {})
    assert forwards.stock().refusal is None
    ballot = forwards.proving([])
    assert ballot.refusal.code == "not_compared" and "on purpose" in str(ballot.refusal)
    assert ballot.again is None and not ballot.differs and ballot.raised is None
    assert forwards.again().refusal.code == "not_compared"


def test_a_forward_that_does_not_repeat_its_shapes_says_so():
    """A cache that grows: it was told as a fault of the data flow at a site."""
    cache = []
    forwards = Forwards([], Proof([]), lambda: cache.append(None) or paddle.ones([len(cache), 2]), {})
    assert forwards.stock().refusal is None
    ballot = forwards.proving([])
    assert (ballot.refusal, ballot.again, ballot.differs) == (None, None, True)
    assert forwards.again().refusal.code == "shapes_differ"


def test_outputs_that_hold_themselves():
    outputs = SimpleNamespace(x=paddle.ones([2]), rest=[paddle.zeros([1])])
    outputs.rest.append(outputs)
    outputs.rest.append({"again": outputs.rest})
    shared = [paddle.ones([3])]
    assert [one.shape for one in tensors_of([outputs, shared, shared])] == [[2], [1], [3], [3]]


def test_arguments_are_copied_for_each_forward_of_the_pass_and_kept_from_it():
    seen = []
    run = on_copies(lambda cache, step: seen.append(len(cache)) or cache.append(step), ([],), {"step": 1})
    run()
    run()
    assert seen == [0, 0]
    with pytest.raises(FusionError, match="give bind an example"):
        on_copies(print, (threading.Lock(),), {})()


def test_a_pair_with_a_hook_between_its_ends_is_left_out():
    model = DemoDecoder(0, 1, layers=1)
    found = own_layers.find_pairs(model)
    assert without_hooked(found) == found
    model.layers[0].self_attn.o_proj.register_forward_post_hook(lambda *_: None)
    model.norm.register_forward_pre_hook(lambda *_: None)
    assert [one.reason.code for one in without_hooked(found)] == ["hooked", "hooked"]
    assert "layers.0.self_attn.o_proj" in str(without_hooked(found)[0].reason)


def test_a_rank_that_opens_shows_progress_more_often_than_its_peers_limit(monkeypatch):
    """With a sign a second and a limit of a second, they gave up a rank that was compiling."""
    pauses, group = [], Group("g", 0, 2, (0, 1), BrokenStore())

    class Stop(threading.Event):
        def wait(self, pause):
            pauses.append(pause)
            return True

    monkeypatch.setattr(group_module, "threading", SimpleNamespace(Event=Stop, Thread=threading.Thread))
    backend = SimpleNamespace(open=lambda spec, group: None)
    monkeypatch.setattr(backend_selection, "agree", lambda *args, **kwargs: Verdict((None, None), ()))
    monkeypatch.setattr(backend_selection, "load_backend", lambda name, spec: (backend, None))
    backend_selection._try("triton", ["spec"], group, 0.1)
    backend_selection._try("triton", ["spec"], group, 30)
    assert pauses == [0.025, 1.0]


def test_what_was_opened_is_closed_if_the_vote_on_it_fails(monkeypatch):
    closed, group = [], Group("g", 0, 2, (0, 1), BrokenStore())
    backend = SimpleNamespace(open=lambda spec, group: SimpleNamespace(close=lambda: closed.append(spec)))
    votes = [Verdict((None, None), ())]

    def agree_once(*args, **kwargs):
        return votes.pop() if votes else agree(*args, **kwargs)

    monkeypatch.setattr(backend_selection, "agree", agree_once)
    monkeypatch.setattr(backend_selection, "load_backend", lambda name, spec: (backend, None))
    with pytest.raises(FusionError, match="it is gone"):
        backend_selection._try("triton", ["spec"], group, 1)
    assert closed == ["spec"]


class BrokenStore:
    def add(self, key, amount):
        raise OSError("it is gone")

    get = set = add


def test_outputs_are_compared_bit_by_bit():
    x, tokens = paddle.randn([2, 8]), paddle.to_tensor([1, 2])
    nan = x.clone()
    nan[0, 0] = float("nan")
    half = x.astype("bfloat16")
    for same in ((x, tokens), (nan,), (half,), ()):
        assert first_difference(tensors_of(same), same) is None
    for got, want in (((x * (1 + 1e-7),), (x,)), ((x, tokens + 1), (x, tokens)), ((nan,), (x,)), ((x[:1],), (x,))):
        assert first_difference(got, want) == len(got) - 1
    assert first_difference((half.astype("float32"),), (half,)) == 0, "another dtype"
    assert first_difference((x,), (x, x)) == "count"
    assert len(tensors_of({"a": [x, (tokens,)], "b": SimpleNamespace(c=x, d=3)})) == 3


def test_outputs_within_the_stock_forwards_own_spread():
    x = paddle.randn([2, 8])
    again = (x * 1.001, x)
    assert within_spread((x * 1.0015, x), (x, x), again) is None
    assert within_spread((x * 1.003, x), (x, x), again) == 0
    assert within_spread((x, x * 1.0001), (x, x), again) == 1, "the spread of one output is not that of another"
    assert within_spread((x * float("nan"), x), (x, x), again) == 0


def test_relative_errors_know_odd_values():
    import numpy as np

    want = np.array([[1.0, np.inf], [1.0, np.nan], [1.0, 2.0], [0.0, 0.0]])
    assert relative_errors(want, want).tolist() == [0, 0, 0, 0]
    assert np.isinf(relative_errors(np.ones((4, 2)), want)[:2]).all()


def test_one_norm_fed_over_two_groups_has_no_site():
    model = DemoDecoder(0, 1, layers=1)
    attention = model.layers[0].self_attn
    attention.o_proj.inner = paddle.nn.Identity()
    attention.o_proj.group, attention.o_proj.inner.group = (
        SimpleNamespace(ranks=ranks, rank=0) for ranks in ([0, 1], [0, 2])
    )
    first, *_ = own_layers.find_pairs(model)
    assert isinstance(first, Rejected) and first.reason.code == "groups_differ"
    assert "[[0, 1], [0, 2]]" in str(first.reason)


class Block(paddle.nn.Layer):
    """A mixture of experts: a router in float32 comes first, whatever the experts are of."""

    def __init__(self, dtype, row_parallel):
        super().__init__()
        self.site, self.group, self.reduce_results = None, None, True
        self.router = self.create_parameter([32, 8], dtype="float32")
        if row_parallel:
            self.down = fd_fusion.RowParallelLinear(32, 32, reduce_results=False, dtype=dtype)
            self.wide = self.create_parameter([64, 64], dtype="float32")
        else:
            self.experts = self.create_parameter([8, 32, 32], dtype=dtype)


@pytest.mark.parametrize("row_parallel", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_of_a_pair_is_that_of_what_is_handed_over(dtype, row_parallel):
    model = DemoDecoder(0, 1, layers=1)
    model.layers[0].mlp = Block(dtype, row_parallel)
    attention, block = own_layers.find_pairs(model)
    assert (attention.dtype, block.dtype) == ("float32", dtype)


def test_numbers_of_a_norm_that_change_after_bind_count_as_they_do_in_stock():
    """The stock norm reads its eps at each call; a bound one kept that of the bind, without a word."""
    model = DemoDecoder(0, 1, layers=1)
    pair, _ = own_layers.find_pairs(model)
    norm = pair.reader

    def finish(x, residual, weight, eps, weight_offset):
        return paddle_ops.rms_norm(x, weight, eps=eps, weight_offset=weight_offset, residual=residual)

    op = SimpleNamespace(finish=finish, limit=None, in_rank_order=True)
    site, x = Site(pair.name, op, pair.stock), hidden(2)
    norm.eps, norm.weight_offset = 0.5, 0.25
    for rows in (x, x.reshape([1, *x.shape])):
        assert (site.fused(rows, None)[0] == norm.stock_forward(rows)[0]).all()
    state = Bound(Report(FusionConfig(), "a test", "Model"))
    state.report.sites.append(SiteLine(site, SimpleNamespace(op=op), pair.group.ranks))
    contract = proving_pass._subject(state, pair, site)[1]
    assert (contract.eps, contract.weight_offset) == (0.5, 0.25)


@pytest.mark.parametrize("inner", [False, True])
def test_a_reduction_that_somebody_else_does_is_no_pair(inner):
    model = DemoDecoder(0, 1, layers=1)
    producer = model.layers[0].self_attn.o_proj
    if inner:
        producer.part = paddle.nn.Identity()
        producer.part.reduce_results = True
    else:
        producer.reduce_results = False
    first, *_ = own_layers.find_pairs(model)
    assert first.reason.code == ("reduced_inside" if inner else "not_reduced")


def test_workspace_mb_is_shared_by_the_workspaces_of_all_groups_and_models(monkeypatch):
    """Two sizes in one group and one in another; a peer in the second has a fourth elsewhere, and less is left to it.
    Models that were bound before have taken 2.5 MiB."""
    groups = [Group(name, 0, 2, (0, 1 + number), None) for number, name in enumerate("ab")]
    kinds = [(groups[0], 64), (groups[0], 128), (groups[0], 64), (groups[1], 64)]
    fields = {"dtype": "float32", "weight_dtype": "float32", "weight_offset": 0.0, "eps": 1e-6}
    pairs = [SimpleNamespace(name=str(n), group=g, hidden_size=h, **fields) for n, (g, h) in enumerate(kinds)]
    given = []

    def agree(group, topic, vote, timeout_s):
        *same, spaces, free = vote.data
        other = [*same, spaces + 1, free - (2 << 20)] if group is groups[1] else vote.data
        return Verdict((vote.data, other), ())

    def select_backend(group, pairs, config, deterministic, workspace_bytes):
        given.append((group.name, pairs[0].hidden_size, workspace_bytes))
        return None, because("no_paddle", detail=""), ()

    monkeypatch.setattr(opening, "agree", agree)
    monkeypatch.setattr(opening, "select_backend", select_backend)
    monkeypatch.setattr(lifecycle, "_held", ())
    for nbytes in (2 << 20, 1 << 19):
        lifecycle.hold(Group("another", 0, 2, (0, 1), None), SimpleNamespace(bytes=nbytes))
    config = FusionConfig(workspace_mb=10)
    state = Bound(Report(config, "a test", "none"), live=groups)
    opening.open_sites(state, opening.by_group(pairs, None), dict.fromkeys(groups, ("digest", 0)), None, False)
    assert given == [("a", 64, 2621440), ("a", 128, 2621440), ("b", 64, 1441792)], "7.5 MiB by 3, and 5.5 by 4"
