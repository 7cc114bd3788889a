"""Rows are counted from the epochs of the slots, which wrap, and start anew at a reset."""

import random

from fd_fusion.kernels.epochs import Turns


def following(epoch):
    """`_next` of the kernel."""
    return 2 if epoch >= 0xFFFFFFFF else epoch + 1


def test_every_epoch_is_one_turn_across_the_wrap():
    turns = Turns(2)
    start = 0xFFFFFFFF - 5
    turns.seen([start, 0])
    epoch = start
    for number in range(1, 14):
        epoch = following(epoch)
        assert turns.seen([epoch, number]) == [start + number, number]


def test_it_does_not_matter_when_it_is_looked_at():
    rng = random.Random(3)
    turns, epochs, done = Turns(3), [0xFFFFFFFF - 9, 0xFFFFFFFF, 1], [0, 0, 0]
    first = turns.seen(epochs)
    for _ in range(50):
        for slot in range(3):
            for _ in range(rng.choice((0, 1, 2, 40))):
                epochs[slot], done[slot] = following(epochs[slot]), done[slot] + 1
        if rng.random() < 0.4:
            assert turns.seen(epochs) == [a + b for a, b in zip(first, done)]


def test_the_first_turns_and_a_reset():
    turns = Turns(1)
    assert [turns.seen([epoch])[0] for epoch in (0, 1, 2, 2, 7)] == [0, 1, 2, 2, 7]
    turns.pause()
    assert turns.seen([0]) == turns.seen([123]) == [7], "what is read between may be of either side"
    turns.start_anew()
    assert turns.seen([3]) == [10]
