"""Rows are counted on the device, in counters that start anew at a reset."""

from fd_fusion.kernels.counts import Counts


def test_the_first_counts_and_a_reset():
    counts = Counts(1)
    assert [counts.seen([count])[0] for count in (0, 1, 2, 2, 7)] == [0, 1, 2, 2, 7]
    counts.pause()
    assert counts.seen([0]) == counts.seen([123]) == [7], "what is read between may be of either side"
    counts.start_anew()
    assert counts.seen([3]) == [10]
    counts.pause()
    counts.start_anew()
    assert counts.seen([2]) == [12]
