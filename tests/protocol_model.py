"""A model of one program of the all-reduce kernel on every rank, explored exhaustively: every order in which ranks
run, words arrive, time runs out and aborts become known.

Row k of a launch is worked on in lane k % 2. A lane has an epoch and two buffers of its own. Row k+1 is pushed before
row k is waited for, so a program holds up to two rows that are pushed. In launches of one row each nothing is ahead,
and there is one lane.

A row is one word, whose value is the number of the row, counted through all launches. A store to another rank is a
message that arrives at any later time, in any order. Clearing is local; a fence, or the end of a kernel, puts it
before the next push. Until then the rank itself finds its words cleared, and for the others they never are: what
holds then holds if they are cleared earlier. How the programs of one rank that share a row exchange their sums is a
model of its own, sums_model.py.

After a failure of any rank, every rank learns that the group is dead, and every row of a later launch is NaN on every
rank. So is every later row of the same launch but the next one: that may have been pushed before the failure, and any
rank that finds all its words may give finite numbers for it.

`explore` returns what is wrong with the protocol as `Rules` describe it: an empty set, unless a bug is planted.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

PUSH, RESULT, ABORT = "push", "result", "abort"
LANES = 2


@dataclass(frozen=True)
class Rules:
    """What a scenario is, and the bugs that can be planted in it."""

    size: int
    launches: tuple[tuple[int | None, ...], ...]  # of each row its owner by two-shot, or None for one-shot
    timeouts: bool = False  # whether a rank that waits may run out of time
    epoch: int = 0  # of each lane before the first launch, a uint32
    at_once: bool = False  # whether words come when they are sent; see `_send`
    streams: int = 1  # of rank 0; with two, launches alternate between them and nothing orders the two
    one_buffer: bool = False
    one_slot: bool = False  # for both lanes, which then share the epochs too
    signed_remainder: bool = False
    abort_not_spread: bool = False
    abort_not_heeded: bool = False  # by a push
    no_fence: bool = False  # between two rows
    clear_out_of_order: bool = False  # not even the end of a kernel orders it

    @cached_property
    def rows(self):
        """(launch, number in the launch, owner) of each row."""
        return [(n, k, owner) for n, launch in enumerate(self.launches) for k, owner in enumerate(launch)]

    def lane(self, row):
        return 0 if self.one_slot else self.rows[row][1] % LANES

    def parity(self, epoch):
        if self.one_buffer:
            return 0
        if self.signed_remainder:
            signed = epoch - (1 << 32) if epoch >> 31 else epoch
            return abs(signed) % 2 * (1 if signed >= 0 else -1)  # as C and Triton have it
        return epoch & 1


class Pushed(NamedTuple):
    """A row between its push and its end. `dead`: the abort word was set, so nothing was pushed."""

    before: int
    epoch: int
    dead: bool


class Thread(NamedTuple):
    """A stream of a rank: the rows that it has not finished, and what is known of the first, which are pushed."""

    rank: int
    rows: tuple[int, ...]
    pushed: tuple[Pushed, ...] = ()
    cleared: frozenset = frozenset()  # places with words that are taken, which the others may still find there


class State(NamedTuple):
    threads: tuple[Thread, ...]
    epochs: tuple[int, ...]  # by rank and lane
    slots: frozenset  # ((rank, lane, parity, source or RESULT), row) of the words that have come
    messages: frozenset  # (kind, place or rank, row) under way
    aborted: frozenset
    failed: int  # the first row that is NaN, on any rank
    finite: int  # the last row that is not, on any rank


def explore(rules):
    """Walk through every reachable state, until something is wrong. Returns a set of sentences."""
    rows = rules.rows
    shares = [[row for row, (n, _, _) in enumerate(rows) if n % rules.streams == s] for s in range(rules.streams)]
    threads = [Thread(0, tuple(share)) for share in shares]
    threads += [Thread(rank, tuple(range(len(rows)))) for rank in range(1, rules.size)]
    none = frozenset()
    start = State(tuple(threads), (rules.epoch,) * LANES * rules.size, none, none, none, len(rows), -1)
    wrong, seen, todo = set(), {start}, [start]
    while todo and not wrong:
        state = todo.pop()
        following = list(_steps(rules, state, wrong))
        if not following:
            _judge_end(rules, state, wrong)
        for new in following:
            if new not in seen:
                seen.add(new)
                todo.append(new)
    return wrong


def _judge_end(rules, state, wrong):
    if any(thread.rows for thread in state.threads):
        wrong.add("a rank waits for ever")
    if state.failed < len(rules.rows):
        if len(state.aborted) < rules.size:
            wrong.add("a rank never learns that the group is dead")
        launches = [launch for launch, _, _ in rules.rows]
        ahead = launches[state.failed : state.failed + 2] == [launches[state.failed]] * 2
        if state.finite > state.failed + ahead:
            wrong.add("finite numbers after the error")


def _steps(rules, state, wrong):
    for message in state.messages:
        yield _arrive(state, message, wrong)
    for number, thread in enumerate(state.threads):
        if thread.rows:  # one row is pushed, and the next if it is of the same launch, before one is waited for
            launches = [rules.rows[row][0] for row in thread.rows[:2]]
            if len(thread.pushed) < launches.count(launches[0]):
                yield _push(rules, state, number, thread, wrong)
            else:
                yield from _finish(rules, state, number, thread, wrong)


def _arrive(state, message, wrong):
    kind, place, row = message
    rest = state.messages - {message}
    if kind == ABORT:
        return state._replace(messages=rest, aborted=state.aborted | {place})
    if any(place == taken for taken, _ in state.slots):
        wrong.add("a word that nobody has read is written over")
    return state._replace(messages=rest, slots=state.slots | {(place, row)})


def _send(rules, state, sent, wrong):
    """Words that come at once make far fewer states. No bug hides in that: a rank that runs late does what it would
    if the words came late, and a word that could meet another one in its place finds it there now."""
    state = state._replace(messages=state.messages | sent)
    for message in sent if rules.at_once else ():
        state = _arrive(state, message, wrong)
    return state


def _push(rules, state, number, thread, wrong):
    """Push the first row that is not pushed yet."""
    rank, row = thread.rank, thread.rows[len(thread.pushed)]
    _, k, owner = rules.rows[row]
    lane = rules.lane(row)
    before = thread.pushed[0].epoch if rules.one_slot and thread.pushed else state.epochs[LANES * rank + lane]
    epoch = 2 if before >= 0xFFFFFFFF else before + 1
    dead = rank in state.aborted and not rules.abort_not_heeded
    if (parity := rules.parity(epoch)) not in (0, 1):
        wrong.add(f"there is no buffer {parity}")
    if not rules.clear_out_of_order and (k == 0 or not rules.no_fence):
        state = state._replace(slots=frozenset(word for word in state.slots if word[0] not in thread.cleared))
        thread = thread._replace(cleared=frozenset())
    to = set(range(rules.size)) if owner is None else {owner}
    sent = {(PUSH, (peer, lane, parity, rank), row) for peer in to - {rank} if not dead}
    thread = thread._replace(pushed=(*thread.pushed, Pushed(before, epoch, dead)))
    return _send(rules, state._replace(threads=_put(state.threads, number, thread)), sent, wrong)


def _finish(rules, state, number, thread, wrong):
    """The ways in which the first row of a thread may end by now."""
    rank = thread.rank
    if rank in state.aborted:  # yet words that are all there when it looks are taken, if the row was pushed
        yield _done(rules, state, number, thread, right=False)
    elif rules.timeouts:
        aborted = state.aborted | {rank}  # a message to one of these would change nothing
        told = {(ABORT, peer, None) for peer in range(rules.size) if not rules.abort_not_spread}
        messages = (state.messages | told) - {(ABORT, peer, None) for peer in aborted}
        yield _done(rules, state._replace(messages=messages, aborted=aborted), number, thread, right=False)
    if not thread.pushed[0].dead:
        yield from _read(rules, state, number, thread, wrong)


def _read(rules, state, number, thread, wrong):
    """If all words of the row have come: take them, clear them, and as the owner push the result."""
    rank, row = thread.rank, thread.rows[0]
    owner, lane, parity = rules.rows[row][2], rules.lane(row), rules.parity(thread.pushed[0].epoch)
    peers = [peer for peer in range(rules.size) if peer != rank]
    places = {(rank, lane, parity, source) for source in (peers if owner in (None, rank) else [RESULT])}
    found = [value for place, value in state.slots if place in places - thread.cleared]
    if len(found) < len(places):
        return
    if any(value != row for value in found):
        wrong.add("words of another row are taken")
    sent = {(PUSH, (peer, lane, parity, RESULT), row) for peer in peers} if owner == rank else set()
    state = _send(rules, state, sent, wrong)
    yield _done(rules, state, number, thread._replace(cleared=thread.cleared | places), right=True)


def _done(rules, state, number, thread, right):
    """The row is over: its epoch is written back. A second stream shows by an epoch that is not the one read."""
    rank, row, pushed = thread.rank, thread.rows[0], thread.pushed[0]
    place = LANES * rank + rules.lane(row)
    aborted = state.aborted if state.epochs[place] == pushed.before else state.aborted | {rank}
    threads = _put(state.threads, number, thread._replace(rows=thread.rows[1:], pushed=thread.pushed[1:]))
    epochs = _put(state.epochs, place, pushed.epoch)
    failed, finite = (state.failed, max(state.finite, row)) if right else (min(state.failed, row), state.finite)
    return state._replace(threads=threads, epochs=epochs, aborted=aborted, failed=failed, finite=finite)


def _put(values, place, value):
    return (*values[:place], value, *values[place + 1 :])
