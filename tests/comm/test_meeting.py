"""Ranks that have missed a vote come together again at the next bind. Threads stand for ranks."""

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest

from fd_fusion.binding import bound, proving_pass
from fd_fusion.binding.report import Report
from fd_fusion.comm.group import Group
from fd_fusion.comm.meeting import convene
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.comm.workspace import Layout, Workspace
from fd_fusion.config import FusionConfig
from fd_fusion.reasons import FusionError
from tests.comm.test_group import DictStore
from tests.support.at_once import AtOnce

LIMIT = 1.0  # a rank that is there may be held up by a busy machine
WAITING = AtOnce()


class Ranks:
    """`size` ranks of one group; `run` gives each its own steps, in a thread."""

    def __init__(self, size=3):
        store = DictStore()
        self.groups = [Group("g", rank, size, tuple(range(size)), store) for rank in range(size)]

    def run(self, *steps):
        found = [[] for _ in self.groups]

        def rank(number):
            for step in steps[min(number, len(steps) - 1)]:
                found[number].append(step(self.groups[number]))

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(self.groups))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return found


def bind(label="a", ballots=3, seconds=0.0, raises_before=None):
    """A bind in small: a meeting, then some votes. Returns whether it is on; None if it raised before a vote."""

    def step(group):
        time.sleep(seconds)
        if (refusal := convene(group, label, timeout_s=LIMIT)) is not None:
            return refusal.code
        for ballot in range(ballots):
            if ballot == raises_before:
                return None
            verdict = agree(group, f"vote {ballot}", Vote(data=label), timeout_s=LIMIT)
            if not verdict.ok:
                return verdict.reason.code
            if set(verdict.data) != {label}:
                return "differs"
        return "on"

    return step


def nothing(group):
    """It does not come, and goes on when the others have given it up: for rank 0 they wait twice the limit."""
    time.sleep((1.5 if group.rank else 3) * LIMIT)


@WAITING.check(0, 1, 2)
def a_rank_that_is_late_for_one_vote_binds_next_time(culprit):
    """Rank 1 never voted, it was said of every later bind of these processes."""
    ranks = Ranks()
    steps = [[bind(seconds=5 * LIMIT if rank == culprit else 0), bind("b")] for rank in range(3)]
    found = ranks.run(*steps)
    assert [first for first, _ in found].count("never_voted") >= 2 and "on" not in [first for first, _ in found]
    assert ranks.run([bind("c"), bind("a")]) == [["on", "on"]] * 3


@WAITING.check(0, 1)
def a_late_rank_does_not_drag_its_lateness_along(culprit):
    """The others are at the next bind already when it comes to the last one: it must not take that for its own."""
    ranks = Ranks(2)

    def late(group):
        nothing(group)
        return bind("a")(group)

    steps = [[bind("a"), bind("b"), bind("c")] for _ in range(2)]
    steps[culprit][0] = late
    found = ranks.run(*steps)
    assert "on" not in (found[0][0], found[1][0]) and found[0][1:] == found[1][1:] == ["on", "on"]


@WAITING.check(*((culprit, ballot) for culprit in range(3) for ballot in range(3)))
def a_rank_that_raised_before_a_vote_binds_next_time(case):
    culprit, ballot = case
    ranks = Ranks()
    steps = [[bind(), bind()] for _ in range(3)]
    steps[culprit] = [bind(raises_before=ballot), bind(seconds=LIMIT / 2)]
    found = ranks.run(*steps)
    assert found[culprit][0] is None and {first for first, _ in found} == {None, "never_voted"}
    assert [second for _, second in found] == ["on"] * 3


@WAITING.check(0, 1, 2)
def a_rank_that_never_came_to_a_bind_takes_part_in_the_next(culprit):
    ranks = Ranks()
    for label in ("a", "b"):  # the same model again, or another
        found = ranks.run(*[[nothing if rank == culprit else bind("a"), bind(label)] for rank in range(3)])
        assert [second for _, second in found] == ["on"] * 3, found


def test_ranks_that_built_other_models_meet_and_find_it_out():
    assert Ranks(2).run([bind("a")], [bind("b")]) == [["differs"], ["differs"]]


def test_a_job_that_was_started_anew_over_an_old_store_does_not_read_old_votes():
    ranks = Ranks(2)
    assert ranks.run([bind("a"), bind("b")]) == [["on", "on"]] * 2
    ranks.groups = [Group("g", group.rank, 2, (0, 1), group.store) for group in ranks.groups]
    assert ranks.run([bind("a", seconds=0.1)], [bind("a")]) == [["on"]] * 2


def workspace(group, nonce="of a"):
    """One whose memory is nowhere: what counts here are its votes."""
    page = ctypes.create_string_buffer(64)
    calls = {name: lambda *_: None for name in ("synchronize", "fill", "write", "free_host_page")}
    provider = SimpleNamespace(host_page=lambda _: (ctypes.addressof(page), page), **calls)
    facts = {"own": 0, "addresses": [0], "nbytes": 128, "nonce": nonce, "close": lambda wait: False}
    layout = Layout(64, 128, 0, 64, lambda *_: [0], 64, lambda words: None)
    return Workspace(SimpleNamespace(group=group, provider=provider, **facts), layout, LIMIT / 10)


def reset(which="of a"):
    def step(group):
        made = workspace(group, which if isinstance(which, str) else which[group.rank])
        try:
            made.reset()
            return made.generation
        except FusionError as error:
            return error.reason.root.code
        finally:
            made.close()

    return step


@WAITING.check(0, 1)
def a_late_bind_costs_the_resets_that_follow_nothing(culprit):
    """They voted under the numbers of the last bind, which are not those of the rank that missed it."""
    ranks = Ranks(2)
    assert ranks.run([bind("a")]) == [["on"], ["on"]]
    steps = [[bind("b", seconds=5 * LIMIT if rank == culprit else 0)] for rank in range(2)]
    assert ["on"] not in ranks.run(*steps)
    assert ranks.run([reset(), reset()]) == [[1, 1]] * 2


def test_ranks_that_reset_other_workspaces_find_it_out():
    assert Ranks(2).run([reset(("of a", "of b"))]) == [["structure_differs"]] * 2


def pass_of(label="a"):
    """The meeting before a proving pass in the first forward, and a vote of its circle."""

    def step(group):
        config = FusionConfig(timeout_s=LIMIT)
        state = bound.Bound(Report(config, "a test", "Model"), groups=[group], labels={group: label})
        if (reason := proving_pass.meet_again(state)) is not None:
            return reason.root.code
        return "on" if agree(state.circle, "outcome", Vote(), timeout_s=LIMIT).ok else "off"

    return step


@WAITING.check(0, 1)
def a_late_bind_costs_the_first_forwards_that_follow_nothing(culprit):
    ranks = Ranks(2)
    assert ranks.run([bind("a")]) == [["on"], ["on"]]
    steps = [[bind("b", seconds=5 * LIMIT if rank == culprit else 0)] for rank in range(2)]
    assert ["on"] not in ranks.run(*steps)
    assert ranks.run([pass_of(), pass_of()]) == [["on", "on"]] * 2


@WAITING.check(0, 1)
def a_rank_that_is_late_for_a_pass_takes_part_in_the_next(culprit):
    """None of them runs the forwards of the first one."""

    def late(group):
        time.sleep(5 * LIMIT)
        return pass_of()(group)

    ranks = Ranks(2)
    found = ranks.run(*[[late if rank == culprit else pass_of()] for rank in range(2)])
    assert found == [["never_voted"]] * 2
    assert ranks.run([pass_of()]) == [["on"]] * 2


def test_a_circle_of_two_groups_has_fresh_ballots_in_each_pass():
    """Ranks 0 and 1, and ranks 1 and 2: what ranks cast in the last circle does not count in this one."""
    store, found = DictStore(), {}

    def rank(number):
        ranks = [(0, 1), (1, 2)]
        groups = [Group(str(of), of.index(number), 2, of, store) for of in ranks if number in of]
        config = FusionConfig(timeout_s=2 * LIMIT)
        state = bound.Bound(Report(config, "a test", "Model"), groups=groups, labels=dict.fromkeys(groups, "a"))
        told = [proving_pass.meet_again(state)]
        if number == 2:
            state.circle.next_ballot("that nobody else casts")
        told.append(proving_pass.meet_again(state))
        found[number] = told, state.circle.name, state.circle.ranks

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert len(found) == 3 and all(one == ([None, None], found[0][1], (0, 1, 2)) for one in found.values())


@pytest.mark.parametrize("name", WAITING.names)
def test_ranks_that_have_missed_a_vote(name):
    WAITING.result(name)


def test_a_rank_at_work_for_another_group_is_waited_for():
    """Rank 1 opens a workspace with ranks 1 and 2, and rank 0 waits for it in another group."""
    store = DictStore()

    def group(name, ranks, rank):
        return Group(name, ranks.index(rank), len(ranks), ranks, store)

    found = {}

    def rank(number):
        if number:
            inner = group("1-2", (1, 2), number)
            for turn in range(5):  # each of them within the limit, all together not
                time.sleep(0.5 * LIMIT if number == 2 else 0)
                assert agree(inner, f"{turn}", Vote(), timeout_s=LIMIT).ok
        found[number] = agree(group("0-1-2", (0, 1, 2), number), "t", Vote(), timeout_s=LIMIT).ok

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert found == {0: True, 1: True, 2: True}


def test_without_a_store_or_with_one_rank_there_is_nobody_to_meet():
    assert convene(Group("g", 0, 1, (0,), None), "a", timeout_s=LIMIT) is None
    assert convene(Group("g", 1, 2, (0, 1), None), "a", timeout_s=LIMIT) is None
