"""bind on one rank and in one process: what is left alone, and what it says."""

import threading
from types import SimpleNamespace

import paddle
import pytest
from support.tiny import DemoDecoder, hidden

import fd_fusion
from fd_fusion import FusionConfig
from fd_fusion.comm import group as group_module
from fd_fusion.comm.group import Group, Verdict, agree
from fd_fusion.integration import binding, lifecycle, native, opening, settling
from fd_fusion.integration.pairs import find_links
from fd_fusion.integration.proof import Proof, joint_refusal, outputs_refusal, relative_errors
from fd_fusion.integration.report import Report
from fd_fusion.integration.settling import Bound
from fd_fusion.reasons import FusionError, because
from fd_fusion.site import Rejected, Site


def test_pairs_are_read_off_the_structure():
    names = [link.name for link in find_links(DemoDecoder(0, 1, layers=2))]
    assert names == [
        "layers.0.self_attn.o_proj -> layers.0.post_attention_layernorm",
        "layers.0.mlp.down_proj -> layers.1.input_layernorm",
        "layers.1.self_attn.o_proj -> layers.1.post_attention_layernorm",
        "layers.1.mlp.down_proj -> norm",
    ]


@pytest.mark.parametrize(
    "config, environ, code, source",
    [
        (None, {}, "not_asked", "nobody"),
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


def make_site(fused, name="a -> b"):
    def stock(total, residual):
        return total * 2.0, total

    return Site(name, fused=fused, reduce=lambda x: x, norm=stock, limit=4)


@pytest.mark.parametrize(
    "fused, code",
    [
        (lambda x, r: (x * 2.0, x), None),
        (lambda x, r: (x * 2.0 * (1 + 1e-7), x), None),
        (lambda x, r: (x * 2.001, x), "proof_failed"),
        (lambda x, r: (x * 2.0, x + 1), "proof_failed"),
        (lambda x, r: (x * 2.0, x * float("nan")), "proof_failed"),
        (lambda x, r: (x * 2.0, x.astype("float16")), "proof_failed"),
        (lambda x, r: 1 / 0, "proof_raised"),
    ],
)
def test_the_proving_pass_compares_every_site(fused, code):
    site = make_site(fused)
    proof = Proof([site], {"a -> b": 2})
    proof.start()
    partial = paddle.randn([6, 32])
    out, _ = site.finish(site.hand_over(partial), None)
    assert (out == partial * 2.0).all(), "the pass itself gives the stock result"
    refusal = proof.own_refusal()
    assert (refusal and refusal.code) == code, refusal


@pytest.mark.parametrize("handed, finished", [(0, 0), (1, 0), (2, 2)])
def test_a_site_must_match_exactly_once(handed, finished):
    site, other = make_site(lambda x, r: (x * 2.0, x)), make_site(lambda x, r: (x * 2.0, x), "c -> d")
    proof = Proof([site, other], {"a -> b": 2, "c -> d": 2})
    proof.start()
    other.finish(other.hand_over(paddle.ones([1, 8])), None)
    for _ in range(max(handed, finished)):
        partial = site.hand_over(paddle.ones([1, 8]))
        if finished:
            site.finish(partial, None)
    assert proof.own_refusal().code == "unmatched"


def test_a_miss_takes_the_norms_of_q_and_k_away_too():
    """The model's outputs in the proving pass are theirs as well: a model is never half bound."""
    reason = because("outputs_differ", output=0, error="1", budget="0")
    state = settling.Bound(Report(FusionConfig(), "a test", "Model"))
    state.report.qk_fused, undone = ["layers.0.qk_norm"], []
    state.undo_qk.append(lambda: undone.append("qk"))
    state.undo.append(lambda: undone.append("site"))
    assert not settling._settle(state, reason, (0,))
    assert sorted(undone) == ["qk", "site"] and not state.undo_qk
    assert not state.report.qk_fused and state.report.qk_stock == {"layers.0.qk_norm": reason}


def test_a_first_forward_whose_vote_fails_leaves_nothing_bound(monkeypatch):
    model, undone = paddle.nn.Linear(2, 2), []
    state = settling.Bound(Report(FusionConfig(), "a test", "Model"), undo=[lambda: undone.append("site")])
    state.groups.append(Group("g", 0, 2, (0, 1), BrokenStore()))
    settling._prove_first_forward(model, state, Proof([], {}))
    with pytest.raises(FusionError, match="it is gone"):
        model(paddle.ones([1, 2]))
    assert undone == ["site"]
    model(paddle.ones([1, 2]))


def test_a_rank_that_opens_shows_progress_more_often_than_its_peers_limit(monkeypatch):
    """With a sign a second and a limit of a second, they gave up a rank that was compiling."""
    pauses, group = [], Group("g", 0, 2, (0, 1), BrokenStore())

    class Stop(threading.Event):
        def wait(self, pause):
            pauses.append(pause)
            return True

    monkeypatch.setattr(group_module, "threading", SimpleNamespace(Event=Stop, Thread=threading.Thread))
    backend = SimpleNamespace(open=lambda facts, group: None)
    monkeypatch.setattr(opening, "agree", lambda *args, **kwargs: Verdict((None, None), ()))
    monkeypatch.setattr(opening, "_load", lambda name, facts: (backend, None))
    opening._try("triton", ["facts"], group, 0.1)
    opening._try("triton", ["facts"], group, 30)
    assert pauses == [0.025, 1.0]


def test_what_was_opened_is_closed_if_the_vote_on_it_fails(monkeypatch):
    closed, group = [], Group("g", 0, 2, (0, 1), BrokenStore())
    backend = SimpleNamespace(open=lambda facts, group: SimpleNamespace(close=lambda: closed.append(facts)))
    votes = [Verdict((None, None), ())]

    def agree_once(*args, **kwargs):
        return votes.pop() if votes else agree(*args, **kwargs)

    monkeypatch.setattr(opening, "agree", agree_once)
    monkeypatch.setattr(opening, "_load", lambda name, facts: (backend, None))
    with pytest.raises(FusionError, match="it is gone"):
        opening._try("triton", ["facts"], group, 1)
    assert closed == ["facts"]


class BrokenStore:
    def add(self, key, amount):
        raise OSError("it is gone")

    get = set = add


def test_what_only_all_ranks_see():
    def sample(partial, residual):
        return {"a -> b": {"partial": partial, "residual": residual}}

    dtypes = {"a -> b": "float32"}
    assert joint_refusal(dtypes, [sample([1.0], [2.0]), sample([3.0], [2.0])]) is None
    assert joint_refusal(dtypes, [sample([1.0], None), sample([3.0], None)]) is None
    assert joint_refusal(dtypes, [sample([0.0], [0.0]), sample([0.0], [0.0])]) is None, "zeros prove nothing"
    assert joint_refusal(dtypes, [sample([1.0], [2.0]), sample([1.0], [2.0])]).code == "already_reduced"
    assert joint_refusal(dtypes, [sample([1.0], [2.0]), sample([3.0], [2.1])]).code == "residual_differs"


def test_outputs_are_compared_one_by_one():
    x = paddle.randn([2, 8])
    tokens = paddle.to_tensor([1, 2])
    assert outputs_refusal((x, tokens), (x, tokens), 6) is None
    assert outputs_refusal((x * (1 + 1e-7),), (x,), 6) is None
    assert outputs_refusal((x, x * 1.01), (x, x), 6).code == "outputs_differ"
    assert outputs_refusal((x,), (x, x), 6).code == "outputs_differ"
    assert outputs_refusal((x[:1],), (x,), 6).code == "outputs_differ"


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
    first, *_ = native.find_pairs(model)
    assert isinstance(first, Rejected) and first.reason.code == "groups_differ"
    assert "[[0, 1], [0, 2]]" in str(first.reason)


@pytest.mark.parametrize("inner", [False, True])
def test_a_reduction_that_somebody_else_does_is_no_pair(inner):
    model = DemoDecoder(0, 1, layers=1)
    producer = model.layers[0].self_attn.o_proj
    if inner:
        producer.part = paddle.nn.Identity()
        producer.part.reduce_results = True
    else:
        producer.reduce_results = False
    first, *_ = native.find_pairs(model)
    assert first.reason.code == ("reduced_inside" if inner else "not_reduced")


def test_workspace_mb_is_shared_by_the_workspaces_of_all_groups_and_models(monkeypatch):
    """Two sizes in one group and one in another; a peer in the second has a fourth elsewhere, and less is left to it.
    Models that were bound before have taken 2.5 MiB."""
    groups = [Group(name, 0, 2, (0, 1 + number), None) for number, name in enumerate("ab")]
    kinds = [(groups[0], 64), (groups[0], 128), (groups[0], 64), (groups[1], 64)]
    fields = {"dtype": "float32", "weight_dtype": "float32", "weight_offset": 0.0}
    pairs = [SimpleNamespace(name=str(n), group=g, hidden_size=h, **fields) for n, (g, h) in enumerate(kinds)]
    given = []

    def agree(group, topic, vote, timeout_s):
        digest, spaces, free = vote.data
        other = [digest, spaces + 1, free - (2 << 20)] if group is groups[1] else vote.data
        return Verdict((vote.data, other), ())

    def open_for(group, pairs, config, deterministic, workspace_bytes):
        given.append((group.name, pairs[0].hidden_size, workspace_bytes))
        return None, because("no_paddle", detail=""), ()

    monkeypatch.setattr(binding, "agree", agree)
    monkeypatch.setattr(binding, "open_for", open_for)
    monkeypatch.setattr(lifecycle, "_held", ())
    for nbytes in (2 << 20, 1 << 19):
        lifecycle.hold(Group("another", 0, 2, (0, 1), None), SimpleNamespace(bytes=nbytes))
    config = FusionConfig(workspace_mb=10)
    binding._open(Bound(Report(config, "a test", "none")), pairs, config, False, None)
    assert given == [("a", 64, 2621440), ("a", 128, 2621440), ("b", 64, 1441792)], "7.5 MiB by 3, and 5.5 by 4"
