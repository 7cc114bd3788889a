"""One outcome on all ranks that a model ties together, and equal ballots in every group, however the groups overlap.

Threads stand for ranks; what is opened and proven is made up, every vote is real.
"""

import random
import threading
import time
from types import SimpleNamespace

import pytest

from fd_fusion import FusionConfig
from fd_fusion.binding import bind as binding
from fd_fusion.binding import bound, opening, proving_pass
from fd_fusion.binding.pairs import Pair
from fd_fusion.comm.circle import circle_of, meet
from fd_fusion.comm.group import Group
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.config import Resolved
from fd_fusion.reasons import BindError, because
from tests.comm.test_group import DictStore

LIMIT = 20  # nothing here is to wait for it


def in_threads(size, run):
    found = {}

    def rank(number):
        try:
            found[number] = run(number)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    start = time.monotonic()
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert len(found) == size, "a rank waits without end"
    assert time.monotonic() - start < LIMIT / 2, "a rank waited for a vote that nobody else cast"
    return [found[number] for number in range(size)]


def groups_of(rank, family, store):
    of_rank = [ranks for ranks in family if rank in ranks]
    return [Group("-".join(map(str, r)), r.index(rank), len(r), tuple(r), store) for r in of_rank]


def tied_together(family, size):
    """The component of each rank, by brute force."""
    parts = [{rank} for rank in range(size)]
    for _ in range(size):
        for ranks in family:
            union = set().union(*(parts[rank] for rank in ranks))
            for rank in ranks:
                parts[rank] = union
    return [tuple(sorted(part)) for part in parts]


@pytest.mark.parametrize("seed", range(24))
def test_one_outcome_and_equal_ballots_for_random_families_of_groups(seed):
    dice = random.Random(seed)
    size = dice.randint(2, 6)
    family = {tuple(sorted(dice.sample(range(size), dice.randint(2, size)))) for _ in range(dice.randint(1, 4))}
    culprit, store = dice.randrange(size), DictStore()

    def run(rank):
        groups = dice_order(groups_of(rank, family, store), seed)
        if not groups:
            return None
        known, refusal, live = meet(dict.fromkeys(groups, "a test"), timeout_s=LIMIT)
        assert refusal is None and set(live) == set(groups)
        circle = circle_of(groups, known)
        outcomes = [
            agree(circle, "outcome", Vote(because("no_rows") if no and rank == culprit else None), timeout_s=LIMIT).ok
            for no in (False, True)
        ]
        return circle.ranks, outcomes, {group.name: group.place.ballots for group in groups}

    found, parts = in_threads(size, run), tied_together(family, size)
    for rank, result in enumerate(found):
        if result is not None:
            assert not isinstance(result, Exception), result
            assert result[0] == parts[rank] and result[1] == [True, culprit not in parts[rank]]
    for name in {"-".join(map(str, ranks)) for ranks in family}:
        assert len({result[2][name] for result in found if result and name in result[2]}) == 1, (name, found)


def dice_order(groups, seed):
    random.Random(seed).shuffle(groups)
    return groups


class Model:
    pass


def bind_all(monkeypatch, family, size, *, fails=(), proof=(), qk=(), stops=(), config=None, attempts=1):
    """bind on every rank of `family`. Which ranks fail: at opening, in the proof, in the q and k kernel, at all."""
    store, config = DictStore(), config or FusionConfig(timeout_s=LIMIT)
    models, here = [Model() for _ in range(size)], threading.local()
    failures = {"fails": set(fails)}

    def pair(group):
        stock = SimpleNamespace(numbers=lambda: (1e-5, 0.0), attach=lambda site: lambda: None)
        return Pair(f"pair of {group.name}", group, 8, "float32", "float32", stock)

    def select_backend(group, pairs, config, deterministic, workspace_bytes):
        no = because("open_failed", error="no memory") if group.ranks[group.rank] in failures["fails"] else None
        verdict = agree(group, "open", Vote(no), timeout_s=LIMIT)
        op = SimpleNamespace(bytes=0, limit=4, in_rank_order=True, finish=None, close=lambda: None, stats=dict)
        selected = SimpleNamespace(op=op, backend="fake", note=None, limit_source="")
        ranks = tuple(rank for rank, _ in verdict.refusals)
        return (selected, None, ()) if verdict.ok else (None, verdict.reason, ranks)

    def choose_qk(state, norms):
        state.report.qk_fused = ["qk"] if qk else []
        return because("backend_failed", backend="triton", error="no") if here.rank in qk else None

    def prove(model, state, example, example_of):
        refusal = because("unmatched", site="a", handed=0, finished=1) if here.rank in proof else None
        proving_pass._vote(state, ballot := proving_pass.Ballot(refusal), SimpleNamespace(raised=None))
        proving_pass._switch_on_or_undo(state, ballot.refusal, ballot.ranks)

    monkeypatch.setattr(opening, "select_backend", select_backend)
    monkeypatch.setattr(binding, "_choose_qk", choose_qk)
    monkeypatch.setattr(binding, "attach_and_prove", prove)
    monkeypatch.setattr(binding, "label_of", lambda model, pairs, *_: (f"{[one.name for one in pairs]}", 0))
    world = {rank: Group("world", rank, size, tuple(range(size)), store) for rank in range(size)}
    monkeypatch.setattr(opening, "paddle_ops", SimpleNamespace(group_of=lambda: world[here.rank]))
    kept = [groups_of(rank, family, store) for rank in range(size)]

    def run(rank):
        here.rank, results = rank, []
        for _ in range(attempts):
            refusal = because("proxy_rmsnorm") if rank in stops else None
            group = kept[rank][-1] if refusal else None
            pairs = [] if refusal else [pair(group) for group in kept[rank]]
            try:
                report = binding.bind(
                    models[rank],
                    pairs,
                    [],
                    Resolved(config, "a test"),
                    group=group,
                    refusal=refusal,
                )
                results.append(report)
            except BindError as error:
                results.append(error)
        return results if attempts > 1 else results[0]

    found = in_threads(size, run)
    for model in models:
        binding.unbind(model)
    for name in {group.name for groups in kept for group in groups}:
        counts = {group.place.ballots for groups in kept for group in groups if group.name == name}
        assert len(counts) == 1, f"ballots of {name}: {counts}"
    return found


TWO = [(0, 1), (0, 1, 2)]
CHAIN = [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("family, size", [(TWO, 3), (CHAIN, 4), ([(0, 1)], 2)])
def test_a_miss_of_any_rank_in_the_proof_is_a_miss_of_all(monkeypatch, family, size):
    """Two were off and one was on: a rank took as many rounds as it had groups itself."""
    found = bind_all(monkeypatch, family, size)
    assert all(len(report.sites) == sum(rank in r for r in family) for rank, report in enumerate(found)), found
    for culprit in range(size):
        found = bind_all(monkeypatch, family, size, proof=[culprit])
        assert all(not report.sites and report.rejected for report in found)
        assert {one.reason.root.code for report in found for one in report.rejected} == {"unmatched"}


@pytest.mark.parametrize("how", ["fails", "qk", "proof"])
@pytest.mark.parametrize("culprit", [0, 2])
def test_what_a_user_insists_on_is_an_error_on_all_ranks(monkeypatch, how, culprit):
    """A rank raised in its first group, and the others waited for it in the next."""
    for config in (FusionConfig(timeout_s=LIMIT, strict=True), FusionConfig(timeout_s=LIMIT, backend="triton")):
        found = bind_all(monkeypatch, TWO, 3, config=config, **{how: [culprit]})
        assert all(isinstance(error, BindError) for error in found), found
        assert len({str(error) for error in found}) == 1, found


def test_a_failing_kernel_of_q_and_k_alone_is_an_error_on_all_ranks(monkeypatch):
    named = FusionConfig(timeout_s=LIMIT, backend="triton")
    found = bind_all(monkeypatch, [], 3, qk=[1], config=named)
    assert {str(error) for error in found} == {str(found[1])} and "rank 1 refused" in str(found[0])
    assert all(error.reason.root.code == "backend_failed" for error in found)


def test_a_rank_that_cannot_read_its_model_says_so_in_the_vote(monkeypatch):
    found = bind_all(monkeypatch, [(0, 1, 2)], 3, stops=[1])
    assert found[1].off.code == "proxy_rmsnorm" and not any(report.sites for report in found)
    assert all(report.rejected[0].reason.root.code == "proxy_rmsnorm" for report in (found[0], found[2]))


def test_one_group_that_cannot_open_leaves_the_other_on(monkeypatch):
    found = bind_all(monkeypatch, [(0, 1), (1, 2)], 3, fails=[0])
    assert [len(report.sites) for report in found] == [0, 1, 1]
    assert found[0].rejected[0].reason.remedy == f"on rank 0: {because('open_failed', error='').remedy}"


def test_a_bind_that_failed_is_tried_again(monkeypatch):
    first, second = zip(*bind_all(monkeypatch, [(0, 1, 2)], 3, fails=[2], attempts=2))
    assert all(a is not b for a, b in zip(first, second))


@pytest.mark.parametrize(
    "off, raises",
    [
        ("no_pairs", True),
        ("sequence_parallel", True),
        ("proxy_rmsnorm", True),
        ("one_rank", False),
        ("expert_parallel", False),
        ("never_wins", False),
    ],
)
def test_strict_lets_nothing_be_off_but_by_a_rule(off, raises):
    facts = {
        "no_pairs": {"model": "M"},
        "draft_model": {"model": "M"},
        "never_wins": {"size": 2, "hidden_size": 8, "dtype": "float32"},
    }
    state = bound.Bound(
        binding.Report(FusionConfig(strict=True), "a test", "M", off=because(off, **facts.get(off, {})))
    )
    assert (bound.insisted_failure(state) is not None) == raises
    model, resolved = Model(), Resolved(FusionConfig(strict=True), "a test")
    if raises:
        with pytest.raises(BindError):
            binding.note_off(model, resolved, state.report.off)
    else:
        binding.note_off(model, resolved, state.report.off)
    assert state.report.off in [one.off for one in binding.report()], "a model that is off is in the report"
