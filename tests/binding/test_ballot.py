"""What the votes of the proving pass make of forwards that raised. Threads stand for ranks."""

import pytest

from fd_fusion.binding.ballot import Ballot, vote
from fd_fusion.reasons import because
from tests.comm.test_meeting import LIMIT, Ranks, nothing

PAIRS = ["a", "b", "c"]
RAISED = because("forward_raised", which="proving", error="MemoryError: here")


def cast(reached=3, raised=None):
    def step(group):
        ballot = Ballot(raised, which="proving", raised=raised, reached=PAIRS[:reached])
        vote(ballot, {group: PAIRS}, group, LIMIT)
        return ballot.refusal and (ballot.refusal.code, str(ballot.refusal))

    return step


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_rank_that_left_a_forward_alone_is_an_end_for_all(culprit):
    found = Ranks().run(*[[cast(1, RAISED) if rank == culprit else cast()] for rank in range(3)])
    assert found[0] == found[1] == found[2]
    code, text = found[0][0]
    assert code == "out_of_step" and "MemoryError: here" in text
    assert text.startswith(f"rank {culprit} left the proving forward")


@pytest.mark.parametrize("reached, codes", [((1, 1, 1), {"forward_raised"}), ((1, 2, 1), {"out_of_step"})])
def test_ranks_that_raised_at_one_point_are_in_step(reached, codes):
    found = Ranks().run(*[[cast(one, RAISED)] for one in reached])
    assert {told[0] for (told,) in found} == codes


def test_a_rank_that_raised_behind_the_last_pair_is_in_step():
    found = Ranks(2).run([cast()], [cast(3, RAISED)])
    assert {told[0] for (told,) in found} == {"refused"}


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_rank_without_a_vote_may_be_anywhere(culprit):
    found = Ranks().run(*[[nothing if rank == culprit else cast()] for rank in range(3)])
    assert {told[0] for (told,) in found if told} == {"out_of_step"}


def test_ranks_without_a_failure_agree():
    assert Ranks().run([cast()]) == [[None]] * 3


def test_ranks_that_would_leave_the_residual_of_other_pairs_leave_none():
    def step(links):
        def cast(group):
            ballot = Ballot(which="staying", reached=PAIRS, links=links)
            vote(ballot, {group: PAIRS}, group, LIMIT)
            return ballot.refusal and ballot.refusal.root.code

        return cast

    assert Ranks().run(*[[step(["a"])] for _ in range(3)]) == [[None]] * 3
    assert Ranks().run([step(["a"])], [step(["a"])], [step(["a", "b"])]) == [["residual_read"]] * 3
