"""The fault matrix, as real processes under the interpreter: see tests/dist/faults.py. Nothing may hang or leak."""

import concurrent.futures
import signal

import pytest

from tests.support.ranks import run_ranks


def run(*what, size=2):
    """Run one after another in one job. Who ends well came to the end of each."""
    return run_ranks("faults.py", size, *what, timeout_s=120)


def ended_well(ranks):
    for rank in ranks:
        assert rank.status == 0, rank.text


def test_errors_that_every_rank_learns_of_and_a_suspended_machine_that_is_none():
    """A late rank ends the call for all, and a reset goes on; a rank that calls nothing more learns of the error; a
    machine that is suspended has no missing rank."""
    ended_well(run("late", "early", "paused"))


def test_by_two_shot_too_it_is_the_missing_rank_that_is_named():
    ended = run("by_two_shot", size=3)
    ended_well(ended)
    assert "missing rank 2" in ended[0].text


@pytest.mark.parametrize("when", ["before", "in", "after"])
def test_survivors_name_a_killed_rank(when):
    *survivors, killed = run(f"killed_{when}")
    assert killed.status == -signal.SIGKILL, killed.text
    ended_well(survivors)
    assert "missing rank 1" in survivors[0].text


@pytest.mark.parametrize("what", [["no_triton", "full_memory"], ["imported_before"]], ids=", then ".join)
def test_one_rank_that_cannot_open_is_named_by_all(what):
    ended_well(run(*what))


def test_a_rank_that_exits_in_the_middle_of_a_step():
    ended = run("exit_in_step")
    ended_well(ended)
    assert "missing rank 1" in ended[0].text


def test_two_jobs_at_once():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for job in [pool.submit(run_ranks, "triton_calls.py", 2, "together", timeout_s=90) for _ in range(2)]:
            ended_well(job.result())


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["late", "early", "no_triton", "full_memory", "exit_in_step"])
def test_the_same_with_four_ranks(what):
    ended_well(run(what, size=4))


@pytest.mark.exhaustive
@pytest.mark.parametrize("when", ["before", "in", "after"])
def test_three_survivors_name_a_killed_rank(when):
    *survivors, killed = run(f"killed_{when}", size=4)
    assert killed.status == -signal.SIGKILL, killed.text
    ended_well(survivors)
    assert any("missing rank 3" in rank.text for rank in survivors)
