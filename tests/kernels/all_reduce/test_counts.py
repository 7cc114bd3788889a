"""Rows are counted on the device, in counters that start anew at a reset."""

import random
import threading

import pytest

from fd_fusion.kernels.all_reduce.counts import Counts


def totals(counts, *counters):
    return counts.read(lambda: counters)


def test_the_first_counts_and_a_reset():
    counts = Counts(1)
    assert [totals(counts, count)[0] for count in (0, 1, 2, 2, 7)] == [0, 1, 2, 2, 7]
    counts.pause()
    assert totals(counts, 0) == totals(counts, 123) == [7], "what is read between may be of either side"
    counts.start_anew()
    assert totals(counts, 3) == [10]
    counts.pause()
    counts.start_anew()
    assert totals(counts, 2) == [12]


def test_it_does_not_matter_when_the_counters_are_read():
    rng = random.Random(3)
    counts, device, done = Counts(3), [0, 0, 0], [0, 0, 0]
    for _ in range(200):
        for number in range(3):
            grown = rng.choice((0, 1, 2, 2**33))
            device[number], done[number] = device[number] + grown, done[number] + grown
        if rng.random() < 0.4:
            assert totals(counts, *device) == done
        if rng.random() < 0.1:  # as `TritonOp.reset` does
            totals(counts, *device)
            counts.pause()
            device = [0, 0, 0]
            totals(counts, *device)
            counts.start_anew()


def test_a_reset_that_fails_leaves_the_totals_of_the_last_read():
    counts = Counts(1)
    totals(counts, 5)
    counts.pause()
    assert totals(counts, 1) == [5]
    counts.pause()  # the next attempt
    counts.start_anew()
    assert totals(counts, 1) == [6]


def test_a_closed_workspace_raises_once_it_is_read_and_the_next_read_goes_on():
    counts = Counts(1)
    with pytest.raises(ZeroDivisionError):
        counts.read(lambda: [1 // 0])
    assert totals(counts, 4) == [4]


def test_a_read_of_another_thread_is_over_before_a_reset_begins():
    counts, reading, go_on, reset = Counts(1), threading.Event(), threading.Event(), threading.Event()

    def read():
        reading.set()
        assert go_on.wait(10)
        return [5]  # as it was before the reset

    def reset_all():
        counts.pause()
        reset.set()
        counts.start_anew()

    metrics = threading.Thread(target=lambda: counts.read(read))
    metrics.start()
    assert reading.wait(10)
    resetting = threading.Thread(target=reset_all)
    resetting.start()
    assert not reset.wait(0.1), "the counters would be cleared while they are read"
    go_on.set()
    metrics.join(10)
    resetting.join(10)
    assert totals(counts, 2) == [7]
