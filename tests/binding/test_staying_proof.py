"""The forward that proves that a residual may stay with the owners of its rows: one rank of two, on plain Sites."""

import logging
from types import SimpleNamespace

import paddle
import pytest
from support.sites import make_site

from fd_fusion.binding.evidence import Contract
from fd_fusion.binding.forwards import Forwards, on_copies
from fd_fusion.binding.proof import Proof
from fd_fusion.binding.report import Report
from fd_fusion.binding.staying_proof import StayingProof
from fd_fusion.config import FusionConfig
from fd_fusion.reasons import because


def add(x, residual):
    total = (x.astype("float32") + residual.astype("float32")).astype(x.dtype)  # a CPU adds no halves
    return total, total.clone()


def sites_of(may_stay=True, one_op=True):
    """Three Sites, whose sum is what was handed over."""
    sites = [make_site(name, reduce=lambda x: x, norm=add, fused=add) for name in "abc"]
    for site in sites:
        site._op = sites[0]._op if one_op else site._op
        site._op.may_stay = may_stay
    return sites


def subjects(sites, dtype):
    return [(site, Contract(site.name, 2, dtype, 1e-6, 0.0, True), lambda: None, 0) for site in sites]


def run(proof, sites, x, between=lambda residual: residual, reads=lambda x, residual: x):
    residual, seen = x, []
    for site in sites:
        _, residual = proof.prove(site, reads(x.clone(), residual), residual)
        seen.append(residual)
        residual = between(residual)
    return seen


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    monkeypatch.setattr(Proof, "_try", lambda *_: None)


@pytest.mark.parametrize("shape", [[1, 8], [5, 8], [2, 3, 8]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_residual_is_nan_in_every_row_and_the_next_site_goes_on_from_the_whole_residual(dtype, shape):
    """Rank 0 owns the row of a proof of T=1, and not the same row's successor in later calls."""
    sites, x = sites_of(), paddle.ones(shape).astype(dtype)
    proof = Proof(subjects(sites, dtype))
    whole = run(proof, sites, x)
    assert proof.links == {"a": sites[1], "b": sites[2]}, "all but the last"
    left = run(StayingProof(proof), sites, x)
    for number, (got, want) in enumerate(zip(left, whole)):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert bool((want == number + 2).all())
        assert bool(paddle.isnan(got).all()) if number < 2 else bool((got == want).all())


@pytest.mark.parametrize("kind", ["another tensor", "an op that never does", "two ops"])
def test_what_links_no_sites(kind):
    sites = sites_of(may_stay=kind != "an op that never does", one_op=kind != "two ops")
    proof = Proof(subjects(sites, "float32"))
    run(proof, sites, paddle.ones([3, 8]), (lambda it: it * 1) if kind == "another tensor" else lambda it: it)
    assert proof.links == {}


@pytest.mark.parametrize("nan_before", [False, True])
def test_a_read_that_the_outputs_hide_is_seen_at_the_next_norm(nan_before):
    """A host gives the last token's logits, or a token; NaN of the model's own, in another row, hides nothing."""
    sites, x = sites_of(), paddle.ones([4, 8])
    if nan_before:
        x[2] = float("nan")

    def read_row_1(x, residual):
        x[1] += 1e-6 * residual[1]
        return x

    proof = Proof(subjects(sites, "float32"))
    run(proof, sites, x, reads=read_row_1)
    for reads, failed in ((read_row_1, True), (lambda x, residual: x, False)):
        staying = StayingProof(proof)
        run(staying, sites, x, reads=reads)
        assert (str(staying.failure).rpartition(": ")[2] == "what feeds b") if failed else staying.failure is None


@pytest.mark.parametrize("kept, why", [("a cycle", None), ("the residual", "the model keeps one after its forward")])
def test_a_residual_that_is_kept_is_read_later(kept, why):
    sites, x = sites_of(), paddle.ones([2, 8])
    proof = Proof(subjects(sites, "float32"))
    run(proof, sites, x)
    staying = StayingProof(proof)
    held = run(staying, sites, x)
    held.append(held)
    model = held[0] if kept == "the residual" else None
    del held
    staying.miss_kept()
    assert (staying.failure and str(staying.failure).rpartition(": ")[2]) == why and (model is None) == (why is None)


class Norms(paddle.nn.Layer):
    """Each layer's forward finishes by one of the Sites."""

    def __init__(self, sites):
        super().__init__()
        self.norms = paddle.nn.LayerList([Norm(site) for site in sites])

        self.register_buffer("aux", paddle.zeros([8]))
        self.register_buffer("cleared", paddle.zeros([8]))
        self.cleared._clear_data()
        self.use = lambda model, residual: None

    def forward(self, x):
        residual, used = x, []
        for number, norm in enumerate(self.norms):
            residual = norm(x.clone(), residual)[1]
            if number == 1:
                used.append(self.use(self, residual))
        return residual, used


class Norm(paddle.nn.Layer):
    def __init__(self, site):
        super().__init__()
        self.site = site

    def forward(self, x, residual):
        self.site.hand_over(x)
        return self.site.finish(x, residual)


def prove_staying(sites, change=lambda model: None, example=lambda model, x: lambda: model(x)):
    """What is said of the residuals in a model of these Sites."""
    model, x = Norms(sites), paddle.ones([2, 8])
    change(model)
    stock = SimpleNamespace(attach=lambda site: lambda: None)
    pairs = [(SimpleNamespace(name=site.name, reader=None, stock=stock), site) for site in sites]
    proof = Proof(subjects(sites, "float32"))
    forwards = Forwards(pairs, proof, example(model, x), dict(model.named_sublayers(include_self=True)))
    assert forwards.stock().refusal is None
    ballot = forwards.proving([])
    assert (ballot.refusal, ballot.again, ballot.differs, ballot.linked) == (None, None, False, True)
    staying = forwards.staying([])
    assert staying.raised is None
    reason = staying.refusal
    return reason and str(reason).rpartition(": ")[2]


def test_who_takes_fp8_is_known_from_the_forward_that_was_not_left_early():
    """A model that raises at NaN: of the norm before that, nobody had taken the FP8 yet."""
    sites = sites_of()
    model, x = Norms(sites), paddle.ones([2, 8])

    def take(model, residual):
        if bool(paddle.isnan(residual).any()):
            raise ValueError("NaN")
        sites[1].count_taken()

    model.norms[1].register_forward_pre_hook(lambda norm, _: setattr(norm.site, "takers", 0))
    model.use = take
    stock = SimpleNamespace(attach=lambda site: lambda: None)
    pairs = [(SimpleNamespace(name=site.name, reader=None, stock=stock), site) for site in sites]
    forwards = Forwards(pairs, Proof(subjects(sites, "float32")), lambda: model(x), {})
    assert forwards.stock().refusal is None and forwards.proving([]).linked
    assert "NaN" in str(forwards.staying([]).refusal) and sites[1].takers == 1


SEEN = "a hook of norms.1"


@pytest.mark.parametrize("at, why", [("post 1", SEEN), ("pre 1", SEEN), ("pre 0", None)])
def test_a_hook_that_gets_a_residual_reads_it(at, why):
    """What a hook computes reaches no output."""
    seen, (kind, number) = [], at.split()

    def change(model):
        register = getattr(model.norms[int(number)], f"register_forward_{kind}_hook")
        register(lambda _, inputs, out=None: seen.append(float((inputs if out is None else out)[1].mean())))

    assert prove_staying(sites_of(), change) == why and len(seen) == 3


@pytest.mark.parametrize(
    "use, why",
    [
        (lambda model, residual: None, None),
        (lambda model, residual: float(residual.mean()), "the model's output"),
        (lambda model, residual: {"mean": residual.mean().numpy()}, "the model's output"),
        (lambda model, residual: model.aux.set_value(residual[0]), "the model's buffer aux"),
    ],
)
def test_a_residual_that_leaves_the_model_as_a_number_or_by_a_buffer(use, why):
    assert prove_staying(sites_of(), lambda model: setattr(model, "use", use)) == why


def test_a_residual_that_an_argument_keeps():
    """A list that the caller gives, of which a first forward gets a copy."""

    def example(model, x):
        def forward(x, kept):
            model.use = lambda model, residual: kept.append(residual)
            outputs = model(x)
            model.use = None
            return outputs

        return on_copies(forward, (x, []), {})

    assert prove_staying(sites_of(), example=example) == "the model keeps one after its forward"


@pytest.mark.xfail(
    strict=True, reason="a comparison with NaN is false: no poison shows a branch that stock did not take"
)
def test_a_branch_on_the_size_of_a_residual():
    def exits(model, residual):
        return paddle.ones([1]) if bool(residual.abs().max() > 1e4) else paddle.zeros([1])

    assert prove_staying(sites_of(), lambda model: setattr(model, "use", exits)) is not None


def test_a_residual_that_is_sent_back_is_told_and_is_no_warning(caplog):
    """Under `strict` what would be a warning is an error, and this is none: all that was asked for is fused."""
    reason = because("residual_read", why="the model's output")
    report = Report(FusionConfig(strict=True), "a test", "Model", residual=reason)
    with caplog.at_level("INFO"):
        report.log(logging.getLogger("fd_fusion"))
    assert [(one.levelname, one.getMessage()) for one in caplog.records][1:] == [("INFO", f"fd_fusion: {reason}")]
