"""The vote: one verdict on all ranks, in bounded time, with late, dead and busy ranks. Threads stand for ranks."""

import threading
import time

import pytest

from fd_fusion.comm.group import Group, working
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.reasons import FusionError, because
from tests.support.at_once import AtOnce

WAITING = AtOnce()
LIMIT = 2.0  # of votes that end without a rank; a rank that is there may be held up by a busy machine
LONG = 30


class DictStore:
    """A store in this process. `get` of a key that was never set fails, as Paddle's would block."""

    def __init__(self):
        self.data, self.lock = {}, threading.Lock()

    def set(self, key, value):
        with self.lock:
            self.data[key] = value

    def get(self, key):
        return self.data[key].encode()

    def add(self, key, amount):
        with self.lock:
            self.data[key] = self.data.get(key, 0) + amount
            return self.data[key]


def vote(votes, late=None, busy=None, limit=LIMIT):
    """Each rank votes: None never does, `late` does when the others have their verdict, `busy` with progress."""
    store, verdicts = DictStore(), {}

    def run(rank):
        group = Group("g", rank, len(votes), tuple(range(len(votes))), store)
        while rank == late and len(verdicts) < len(votes) - 1:
            time.sleep(0.01)
        with working(group, timeout_s=0.2):
            time.sleep((busy or {}).get(rank, 0))
        if votes[rank] is not None:
            verdicts[rank] = agree(group, "topic", votes[rank], timeout_s=limit)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(votes))]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return verdicts, time.monotonic() - start


def only(verdicts):
    """The one verdict that all ranks came to."""
    first = next(iter(verdicts.values()))
    assert all(verdict == first for verdict in verdicts.values()), verdicts
    return first


def test_all_say_yes_and_the_data_arrives_in_rank_order():
    verdict = only(vote([Vote(data={"x": rank}) for rank in range(4)], limit=LONG)[0])
    assert verdict.ok and verdict.data == tuple({"x": rank} for rank in range(4)) and verdict.reason is None


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_one_refusal_is_everybodys_and_names_its_rank(culprit):
    votes = [Vote(because("open_failed", error="no memory") if rank == culprit else None) for rank in range(3)]
    verdict = only(vote(votes, limit=LONG)[0])
    assert not verdict.ok and [rank for rank, _ in verdict.refusals] == [culprit]
    assert f"rank {culprit}" in str(verdict.reason) and "no memory" in str(verdict.reason)


@WAITING.check(0, 1, 2)
def a_rank_that_never_votes_is_named_in_bounded_time(culprit):
    verdicts, seconds = vote([None if rank == culprit else Vote() for rank in range(3)])
    verdict = only(verdicts)
    assert verdict.refusals[0][0] == culprit and verdict.reason.code == "never_voted"
    assert seconds < 30


@WAITING.check(0, 1)
def a_late_rank_finds_the_verdict_against_it(culprit):
    verdicts, _ = vote([Vote(), Vote(), Vote()], late=culprit)
    assert len(verdicts) == 3
    assert all(not verdict.ok and verdict.refusals[0][0] == culprit for verdict in verdicts.values())


@WAITING.check(0, 1)
def a_busy_rank_is_waited_for(rank):
    verdicts, seconds = vote([Vote(), Vote()], busy={rank: 3}, limit=1.5)
    assert only(verdicts).ok and seconds > 3


@WAITING.check(1)
def a_busy_rank_is_not_waited_for_without_end(rank):
    verdicts, _ = vote([Vote(), Vote()], busy={rank: 12 * 0.3}, limit=0.3)
    assert only(verdicts).reason.code == "never_voted"


@pytest.mark.parametrize("name", WAITING.names)
def test_ranks_that_do_not_vote_in_time(name):
    WAITING.result(name)


def test_one_rank_and_no_store():
    alone = Group("g", 0, 1, (0,), None)
    assert agree(alone, "t", Vote(data=3), timeout_s=LIMIT).data == (3,)
    refusal = because("no_rows")
    assert agree(alone, "t", Vote(refusal), timeout_s=LIMIT).refusals == ((0, refusal),)
    pair = Group("g", 1, 2, (0, 1), None)
    assert agree(pair, "t", Vote(), timeout_s=LIMIT).refusals[0][1].code == "no_store"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_is_gone_is_an_error_of_this_package(rank, monkeypatch):
    """As when the process that serves it was killed: the client's own error, here a ValueError, says too little."""

    class Gone(DictStore):
        def add(self, key, amount):
            raise ValueError("TCP send error. Details: Broken pipe.")

    group, raised = Group("g", rank, 2, (0, 1), Gone()), []
    with pytest.raises(FusionError, match="Broken pipe"):
        agree(group, "t", Vote(), timeout_s=LIMIT)
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with working(group, timeout_s=0.1):
        time.sleep(0.1)
    assert not raised, "the thread that shows progress says nothing of its own"


def test_votes_follow_each_other_without_mixing():
    store = DictStore()
    groups = [Group("g", rank, 2, (4, 7), store) for rank in range(2)]
    seen = [[], []]

    def run(rank):
        for turn in range(20):
            seen[rank].append(agree(groups[rank], "t", Vote(data=[turn, rank]), timeout_s=LONG).data)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert seen[0] == seen[1] == [([turn, 0], [turn, 1]) for turn in range(20)]


def test_a_group_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Group("g", 2, 2, (0, 1), None)


def test_a_refusal_that_an_earlier_vote_named_is_not_named_again():
    """Opening is collective: all ranks come out of it with the same reason, and vote once more."""
    earlier = because("refused", rank=1, why="no P2P")
    assert str(only(vote([Vote(earlier), Vote(earlier)], limit=LONG)[0]).reason) == "rank 1 refused: no P2P"
