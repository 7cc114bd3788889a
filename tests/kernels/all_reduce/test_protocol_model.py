"""The protocol model finds nothing wrong with the protocol, and finds the bugs that are planted in it."""

import itertools

import pytest

from tests.kernels.all_reduce import sums_model
from tests.kernels.all_reduce.protocol_model import Rules, explore

PATHS = {2: (None, 0, 1), 3: (None, 0, 2), 4: (None, 3)}  # one-shot, or two-shot with this owner
SHAPES = [(1, 1, 1, 1), (5,), (3, 2), (2, 1, 2), (1, 3, 1)]  # rows of each launch


def cut(rows, shape):
    """The rows as launches of so many rows each."""
    rows = iter(rows)
    return tuple(tuple(itertools.islice(rows, count)) for count in shape)


def every_mixture(size, shape, step=1):
    """Every `step`th, and of those that differ by the names of the ranks alone one."""
    rows = itertools.islice(itertools.product(PATHS[size], repeat=sum(shape)), 0, None, step)
    return [cut(one, shape) for one in dict.fromkeys(_renamed(one, PATHS[size][1:]) for one in rows)]


def _renamed(rows, names):
    """The owners get these names in the order in which they come. Up to three ranks differ by their names alone."""
    owners = dict(zip(dict.fromkeys(owner for owner in rows if owner is not None), names))
    return tuple(owners.get(owner) for owner in rows)


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_ranks_and_every_mixture_of_paths(shape, programs):
    """A program of one rank may be late by a launch: the others are in the next one then."""
    for launches in every_mixture(2, shape, 2 * sum(shape) - 3 if programs == 1 else 29):
        assert explore(Rules(2, launches, programs)) == set(), launches


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1)])
def test_three_ranks_and_every_mixture_of_paths(shape):
    for launches in every_mixture(3, shape):
        assert explore(Rules(3, launches)) == set(), launches


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("rows", [(None, 0, None), (0, None, 2), (2, 2, 0)])
def test_three_ranks_and_two_launches_of_two_rows(rows, programs):
    assert explore(Rules(3, (rows[:2], (rows[2],)), programs)) == set()


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("size, shape", [(2, (6,)), (2, (3, 1, 2)), (3, (3, 2)), (4, (3, 2))])
def test_more_rows_when_words_come_at_once(size, shape, programs):
    for launches in every_mixture(size, shape, 5 if programs == 1 else 41):
        assert explore(Rules(size, launches, programs, at_once=True)) == set(), launches


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3,), (2, 1)])
def test_time_may_run_out_anywhere_with_two_ranks(shape, programs):
    for launches in every_mixture(2, shape, 1 if programs == 1 else 7):
        assert explore(Rules(2, launches, programs, timeouts=True)) == set(), launches


@pytest.mark.parametrize("rows", [(None, None), (None, 0), (0, None), (0, 2)])
def test_time_may_run_out_anywhere_with_three_ranks(rows):
    assert explore(Rules(3, cut(rows, (1, 1)), timeouts=True)) == set()


@pytest.mark.parametrize("size, shape", [(2, (4,)), (2, (3, 1)), (2, (1, 1, 2)), (3, (2, 1))])
def test_time_may_run_out_anywhere_when_words_come_at_once(size, shape):
    for launches in every_mixture(size, shape, 3 if size == 2 else 7):
        assert explore(Rules(size, launches, timeouts=True, at_once=True)) == set(), launches


@pytest.mark.parametrize("size, rows, programs", [(2, 5, 1), (2, 6, 2), (3, 7, 2), (3, 4, 1), (4, 5, 1)])
def test_two_shot_of_several_batches_as_the_kernel_has_them(size, rows, programs):
    """The owner of row t is rank t % N. With two programs of two ranks one of them owns all of its rows."""
    launch = tuple(row % size for row in range(rows))
    assert explore(Rules(size, (launch, launch[:2]), programs, at_once=True)) == set()
    assert explore(Rules(size, (launch[:3], (None,)), programs, at_once=True, timeouts=size == 2)) == set()


ROUNDS = [  # launches, and of each its rounds
    (((None,) * 2, (None,), (None,) * 3), (2, 1, 3)),
    (((None,) * 4, (0, 1)), (2,)),
    (((None,), (0, 1) * 2, (None,) * 2), (1, 2, 2)),
    (((0, 1) * 3, (None,)), (3,)),
]


@pytest.mark.parametrize("launches, rounds", ROUNDS)
def test_two_ranks_and_launches_of_several_rounds(launches, rounds):
    """Every program has a row in each round, by two-shot one for each owner, as `plan.launches` sees to."""
    assert explore(Rules(2, launches, 1, rounds)) == set()
    assert explore(Rules(2, launches, 1, rounds, at_once=True, timeouts=True)) == set()


@pytest.mark.parametrize("at_once", [False, True])
def test_rounds_of_two_programs(at_once):
    launches = ((None,) * 2, (None,) * (5 if at_once else 4), (None,) * 2)
    assert explore(Rules(2, launches, 2, (1, 2), at_once=at_once)) == set()


@pytest.mark.parametrize(
    "rows, count, behind", [((None,) * 3, 3, None), ((0, 1, 2) * 2, 2, None), ((None,) * 2, 2, 1)]
)
def test_rounds_of_three_ranks(rows, count, behind):
    assert explore(Rules(3, (rows, (behind,)), 1, (count,), at_once=True)) == set()


# Every bug is looked for both ways: that words may come at once must not hide one.
planted = pytest.mark.parametrize("at_once", [False, True], ids=["in_any_order", "at_once"])
OVERWRITTEN = "a word that nobody has read is written over"


@planted
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("owner", [None, 0])
def test_one_half_is_found(size, owner, at_once):
    assert OVERWRITTEN in explore(Rules(size, ((owner,),) * 3, one_half=True, at_once=at_once))


@planted
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("owner", [None, 0])
def test_a_slot_for_each_program_in_place_of_each_row_is_found(size, owner, at_once):
    rules = {"slots_of_programs": True, "at_once": at_once}
    assert OVERWRITTEN in explore(Rules(size, ((owner,) * 3,), **rules))
    assert explore(Rules(size, ((owner,),) * 3, **rules)) == set(), "it shows if a program has several rows only"


@planted
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("owner", [None, 0])
def test_slots_that_lie_elsewhere_for_another_number_of_rows_are_found(size, owner, at_once):
    rules = {"halves_by_rows": True, "at_once": at_once}
    assert OVERWRITTEN in explore(Rules(size, cut((owner,) * 4, (2, 1, 1)), **rules))
    assert explore(Rules(size, ((owner,),) * 3, **rules)) == set(), "it shows if T changes only"


@planted
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("programs", [1, 2])
def test_a_push_before_the_launch_before_has_cleared_is_found(programs, shape, at_once):
    """As by programmatic dependent launch without its wait."""
    launches = cut((None,) * 5, shape)
    assert OVERWRITTEN in explore(Rules(2, launches, programs, launch_too_early=True, at_once=at_once))


@planted
def test_a_turn_that_one_program_makes_is_found(at_once):
    """A program that starts late would take its own launch for the next one."""
    rules = {"step_of_one_program": True, "at_once": at_once}
    assert explore(Rules(2, ((None,) * 2,) * 2, programs=2, **rules))
    assert explore(Rules(2, ((None,) * 2,) * 2, programs=1, **rules)) == set(), "it shows with two programs only"


@planted
@pytest.mark.parametrize("launches, rounds", [(((None,) * 3,), (3,)), (((None,) * 2, (None,)), (2,))])
@pytest.mark.parametrize("size", [2, 3])
def test_rounds_with_no_fence_between_them_are_found(size, launches, rounds, at_once):
    """A rank is in the next round, or launch, and what its peer has cleared is not cleared for it."""
    assert OVERWRITTEN in explore(Rules(size, launches, 1, rounds, no_fence=True, at_once=at_once))


@planted
def test_a_program_with_no_row_in_a_round_is_found(at_once):
    rules = {"rounds": (1, 2), "idle_programs": True, "at_once": at_once}
    assert OVERWRITTEN in explore(Rules(2, ((None,) * 2, (None,) * 3), 2, **rules))


@planted
def test_a_late_program_that_counts_the_rounds_of_its_own_launch_is_found(at_once):
    rules = {"rounds": (2,), "rounds_of_others": True, "at_once": at_once}
    assert explore(Rules(2, ((None,) * 4, (None,)), 2, **rules))
    assert explore(Rules(2, ((None,) * 2, (None,)), 1, **rules)) == set(), "it shows with two programs only"


@planted
@pytest.mark.parametrize("size", [2, 3])
def test_a_result_in_the_half_of_the_next_launch_is_found(size, at_once):
    assert OVERWRITTEN in explore(Rules(size, ((0,), (None,)), results_in_the_other_half=True, at_once=at_once))


@planted
@pytest.mark.parametrize("shape", [(1, 1), (2,)])
@pytest.mark.parametrize("size", [2, 3])
def test_an_abort_that_is_not_spread_is_found(size, shape, at_once):
    launches = cut((None,) * 2, shape)
    found = explore(Rules(size, launches, timeouts=True, abort_not_spread=True, at_once=at_once))
    assert found == {"the abort word of a rank is never set"}


@planted
@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
def test_a_push_that_does_not_heed_the_abort_is_found(shape, at_once):
    launches = cut((None,) * 3, shape)
    found = explore(Rules(2, launches, timeouts=True, pushes_after_abort=True, at_once=at_once))
    assert found == {"finite numbers after the error"}


@planted
@pytest.mark.parametrize("bug", ["own_rows_first", "own_rows_last"])
def test_another_order_in_a_batch_is_found(bug, at_once):
    """Each rank would wait for what the others do behind their own wait."""
    assert explore(Rules(2, ((0, 1),), at_once=at_once, **{bug: True})) == {"a rank waits for ever"}


@planted
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("size", [2, 3])
def test_two_streams_are_found(size, shape, at_once):
    assert explore(Rules(size, cut((None,) * 4, shape), streams=2, at_once=at_once))


@pytest.mark.parametrize("split, calls", [(2, 3), (3, 2)])
def test_programs_of_a_row_exchange_their_sums(split, calls):
    assert sums_model.explore(sums_model.Rules(split, calls)) == set()


@pytest.mark.parametrize("split, calls, timeouts", [(2, 5, False), (2, 3, True), (3, 2, False)])
def test_programs_of_a_row_exchange_their_sums_in_rounds(split, calls, timeouts):
    assert sums_model.explore(sums_model.Rules(split, calls, timeouts=timeouts, rounds=True)) == set()


@pytest.mark.parametrize("split, calls", [(2, 3), (3, 2)])
def test_any_program_of_a_row_may_fail(split, calls):
    assert sums_model.explore(sums_model.Rules(split, calls, failures=True)) == set()


@pytest.mark.parametrize("split, calls", [(2, 3), (3, 1)])
def test_a_thread_that_waits_for_a_sum_may_run_out_of_time(split, calls):
    assert sums_model.explore(sums_model.Rules(split, calls, failures=split == 2, timeouts=True)) == set()


@pytest.mark.parametrize(
    "bug, found",
    [
        ("cleared_with_no_barrier", "a program waits for ever"),
        ("not_cleared", "sums of another call are added"),
        ("next_call_too_early", "sums of another call are added"),
        ("one_word_for_all_readers", "a program waits for ever"),
        ("failure_kept_back", "a program waits for ever"),
    ],
)
def test_bugs_in_the_exchange_of_sums_are_found(bug, found):
    assert found in sums_model.explore(sums_model.Rules(3, 2, failures=True, **{bug: True}))


@pytest.mark.parametrize("bug", ["one_half", "no_fence"])
def test_bugs_in_the_exchange_of_sums_in_rounds_are_found(bug):
    assert sums_model.explore(sums_model.Rules(2, 4, rounds=True, **{bug: True}))


def test_a_time_out_that_thread_0_alone_can_report_is_found():
    found = sums_model.explore(sums_model.Rules(2, 1, timeouts=True, only_thread_0_reports=True))
    assert found == {"a row is NaN in part and no abort word is set"}
