"""The protocol model finds nothing wrong with the protocol, and finds the bugs that are planted in it."""

import itertools

import pytest
import sums_model
from protocol_model import Rules, explore

PATHS = {2: (None, 0, 1), 3: (None, 0, 2)}  # one-shot, or two-shot with this owner
BEFORE_WRAP = [0, 2**31 - 2, 2**32 - 3]


@pytest.mark.parametrize("epoch", BEFORE_WRAP)
def test_two_ranks_and_every_mixture_of_paths(epoch):
    for calls in itertools.product(PATHS[2], repeat=4):
        assert explore(Rules(2, calls, epoch=epoch)) == set(), calls


@pytest.mark.parametrize("calls", itertools.product(PATHS[3], repeat=3))
def test_three_ranks_and_every_mixture_of_paths(calls):
    assert explore(Rules(3, calls)) == set()


def test_time_may_run_out_anywhere_with_two_ranks():
    for calls in itertools.product(PATHS[2], repeat=3):
        assert explore(Rules(2, calls, timeouts=True)) == set(), calls


@pytest.mark.parametrize("calls", [(None, None), (None, 0), (0, None), (0, 2)])
def test_time_may_run_out_anywhere_with_three_ranks(calls):
    assert explore(Rules(3, calls, timeouts=True)) == set()


@pytest.mark.parametrize("size", [2, 3])
def test_one_buffer_is_found(size):
    assert explore(Rules(size, (None,) * 3, one_buffer=True))


def test_a_signed_remainder_is_found():
    calls = (None,) * 4
    assert explore(Rules(2, calls, epoch=2**31 - 2, signed_remainder=True)) == {"there is no buffer -1"}
    assert explore(Rules(2, calls, signed_remainder=True)) == set(), "it shows after 2^31 calls only"


@pytest.mark.parametrize("size", [2, 3])
def test_an_abort_that_is_not_spread_is_found(size):
    found = explore(Rules(size, (None, None), timeouts=True, abort_not_spread=True))
    assert found == {"a rank never learns that the group is dead"}


def test_clearing_out_of_order_is_found():
    assert explore(Rules(2, (None,) * 4, clear_out_of_order=True))


@pytest.mark.parametrize("size", [2, 3])
def test_two_streams_are_found(size):
    assert explore(Rules(size, (None, None), streams=2))


@pytest.mark.parametrize("epoch", BEFORE_WRAP)
@pytest.mark.parametrize("split, calls", [(2, 5), (3, 3)])
def test_programs_of_a_row_exchange_their_sums(split, calls, epoch):
    assert sums_model.explore(sums_model.Rules(split, calls, epoch=epoch)) == set()


@pytest.mark.parametrize("split, calls", [(2, 4), (3, 2)])
def test_any_program_of_a_row_may_fail(split, calls):
    assert sums_model.explore(sums_model.Rules(split, calls, failures=True)) == set()


@pytest.mark.parametrize(
    "bug, found",
    [
        ("one_buffer", "a program waits for ever"),
        ("words_without_epoch", "sums of another call are added"),
        ("failure_kept_back", "a program waits for ever"),
        ("own_epoch_taken_for_another_stream_s", "a good row is NaN in part"),
    ],
)
def test_bugs_in_the_exchange_of_sums_are_found(bug, found):
    assert sums_model.explore(sums_model.Rules(2, 4, failures=True, **{bug: True})) == {found}
