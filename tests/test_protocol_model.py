"""The protocol model finds nothing wrong with the protocol, and finds the bugs that are planted in it."""

import itertools

import pytest
import sums_model
from protocol_model import Rules, explore

PATHS = {2: (None, 0, 1), 3: (None, 0, 2), 4: (None, 3)}  # one-shot, or two-shot with this owner
BEFORE_WRAP = [0, 2**31 - 2, 2**32 - 3]


def cut(rows, shape):
    """The rows as launches of so many rows each."""
    rows = iter(rows)
    return tuple(tuple(itertools.islice(rows, count)) for count in shape)


def every_mixture(size, shape):
    return [cut(rows, shape) for rows in itertools.product(PATHS[size], repeat=sum(shape))]


@pytest.mark.parametrize("epoch", BEFORE_WRAP)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5,), (3, 2), (2, 1, 2)])
def test_two_ranks_and_every_mixture_of_paths(shape, epoch):
    for launches in every_mixture(2, shape):
        assert explore(Rules(2, launches, epoch=epoch)) == set(), launches


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1)])
def test_three_ranks_and_every_mixture_of_paths(shape):
    for launches in every_mixture(3, shape):
        assert explore(Rules(3, launches)) == set(), launches


@pytest.mark.parametrize("rows", [(None, 0, None), (0, None, 2), (2, 2, 0)])
def test_three_ranks_and_three_rows_of_a_launch(rows):
    assert explore(Rules(3, (rows,))) == set()


@pytest.mark.parametrize("size, shape", [(2, (6,)), (3, (5,)), (3, (3, 2)), (4, (5,)), (4, (3, 2))])
def test_more_rows_when_words_come_at_once(size, shape):
    for launches in every_mixture(size, shape):
        assert explore(Rules(size, launches, at_once=True)) == set(), launches


@pytest.mark.parametrize("shape", [(1, 1, 1), (3,), (2, 1)])
def test_time_may_run_out_anywhere_with_two_ranks(shape):
    for launches in every_mixture(2, shape):
        assert explore(Rules(2, launches, timeouts=True)) == set(), launches


@pytest.mark.parametrize("rows", [(None, None), (None, 0), (0, None), (0, 2)])
def test_time_may_run_out_anywhere_with_three_ranks(rows):
    assert explore(Rules(3, cut(rows, (1, 1)), timeouts=True)) == set()


@pytest.mark.parametrize("size, shape", [(2, (4,)), (2, (3, 1)), (3, (3,)), (3, (2, 1))])
def test_time_may_run_out_anywhere_when_words_come_at_once(size, shape):
    for launches in every_mixture(size, shape):
        assert explore(Rules(size, launches, timeouts=True, at_once=True)) == set(), launches


# Every bug is looked for both ways: that words may come at once must not hide one.
planted = pytest.mark.parametrize("at_once", [False, True], ids=["in_any_order", "at_once"])


@planted
@pytest.mark.parametrize("shape", [(1, 1, 1), (5,)])
@pytest.mark.parametrize("size", [2, 3])
def test_one_buffer_is_found(size, shape, at_once):
    assert explore(Rules(size, cut((None,) * 5, shape), one_buffer=True, at_once=at_once))


@planted
@pytest.mark.parametrize("shape", [(3,), (2, 1)])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("owner", [None, 0])
def test_one_slot_for_both_lanes_is_found(owner, size, shape, at_once):
    launches = cut((owner,) * 3, shape)
    assert explore(Rules(size, launches, one_slot=True, at_once=at_once))
    none = explore(Rules(size, cut((owner,) * 3, (1, 1, 1)), one_slot=True, at_once=at_once))
    assert none == set(), "it shows if a row is pushed ahead only"


@planted
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7,)])
def test_a_signed_remainder_is_found(shape, at_once):
    launches = cut((None,) * 7, shape)
    found = explore(Rules(2, launches, epoch=2**31 - 2, signed_remainder=True, at_once=at_once))
    assert found == {"there is no buffer -1"}
    none = explore(Rules(2, launches, signed_remainder=True, at_once=at_once))
    assert none == set(), "it shows after 2^31 rows of a lane only"


@planted
@pytest.mark.parametrize("shape", [(1, 1), (2,)])
@pytest.mark.parametrize("size", [2, 3])
def test_an_abort_that_is_not_spread_is_found(size, shape, at_once):
    launches = cut((None,) * 2, shape)
    found = explore(Rules(size, launches, timeouts=True, abort_not_spread=True, at_once=at_once))
    assert found == {"a rank never learns that the group is dead"}


@planted
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3,)])
def test_a_push_that_does_not_heed_the_abort_is_found(shape, at_once):
    launches = cut((None,) * 3, shape)
    found = explore(Rules(2, launches, timeouts=True, abort_not_heeded=True, at_once=at_once))
    assert found == {"finite numbers after the error"}


@planted
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5,)])
def test_clearing_out_of_order_is_found(shape, at_once):
    assert explore(Rules(2, cut((None,) * 5, shape), clear_out_of_order=True, at_once=at_once))


@planted
@pytest.mark.parametrize("owner", [None, 0])
@pytest.mark.parametrize("size", [2, 3])
def test_a_missing_fence_is_found(size, owner, at_once):
    found = explore(Rules(size, ((owner,) * 5,), no_fence=True, at_once=at_once))
    assert found == {"a word that nobody has read is written over"}


@planted
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("size", [2, 3])
def test_two_streams_are_found(size, shape, at_once):
    assert explore(Rules(size, cut((None,) * 4, shape), streams=2, at_once=at_once))


@pytest.mark.parametrize("epoch", BEFORE_WRAP)
@pytest.mark.parametrize("split, calls", [(2, 5), (3, 3)])
def test_programs_of_a_row_exchange_their_sums(split, calls, epoch):
    assert sums_model.explore(sums_model.Rules(split, calls, epoch=epoch)) == set()


@pytest.mark.parametrize("split, calls", [(2, 4), (3, 2)])
def test_any_program_of_a_row_may_fail(split, calls):
    assert sums_model.explore(sums_model.Rules(split, calls, failures=True)) == set()


@pytest.mark.parametrize("split, calls", [(2, 3), (3, 1)])
def test_a_thread_that_waits_for_a_sum_may_run_out_of_time(split, calls):
    assert sums_model.explore(sums_model.Rules(split, calls, failures=split == 2, timeouts=True)) == set()


def test_a_time_out_that_thread_0_alone_can_report_is_found():
    found = sums_model.explore(sums_model.Rules(2, 1, timeouts=True, only_thread_0_reports=True))
    assert found == {"a row is NaN in part and nobody is told"}


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
