"""A model of the all-reduce kernel on every rank, explored exhaustively: every order in which programs run, words
arrive, time runs out and aborts become known.

A launch has rows; program g of G works on the rows g, g+G, ... By one-shot it pushes a row, then waits for it. By
two-shot it works in batches of N rows: it pushes those of other owners, finishes its own, then waits for the results
of the others (`_order`). A launch works in rounds, one after the other on each program by itself. Each row of a
round has a slot of its own, with two halves: a program reads the number of its first round from the counter when it
starts, `round_read`, and uses the halves in turn from `round_read & 1` on. Behind that it adds its share to the
counter: the shares of a launch make COUNTER_STEP together for each round. A launch starts when all programs of the
one before have ended, on the same rank.

A row is one word, whose value is its number, counted through all launches. A store to another rank is a message that
arrives at any later time, in any order. Clearing is local; the end of the kernel puts it before the next launch, and
a program's fence between two rounds what it has cleared itself before its next push. Until then the rank itself finds
its words cleared, and for the others they never are: what holds then holds if they are cleared earlier. How the
programs of one rank that share a row exchange their sums: sums_model.py.

After a failure of any rank, the abort word of every rank is set, and every row of a later launch is NaN on every
rank. In the same launch other rows may have been pushed before, and a rank that finds all words of a row may give
finite numbers for it.

`explore` returns what is wrong with the protocol as `Rules` describe it: an empty set, unless a bug is planted.
"""

import bisect
import gc
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

WORD, ABORT = "word", "abort"
PUSH, LOOK, WAIT, FENCE = "push", "look", "wait", "fence"
COUNTER_STEP = 8  # what a round adds to the counter; more than twice the programs of a launch


@dataclass(frozen=True)
class Rules:
    """What a scenario is, and the bugs that can be planted in it."""

    size: int
    launches: tuple[tuple[int | None, ...], ...]  # of each row its owner by two-shot, or None for one-shot
    programs: int = 1  # the most that a launch has
    rounds: tuple[int, ...] = ()  # of each launch; of those that follow, one
    timeouts: bool = False  # whether a rank that waits may run out of time
    at_once: bool = False  # whether words come when they are sent; see `_send`
    streams: int = 1  # of rank 0; with two, launches alternate between them and nothing orders the two
    one_half: bool = False
    slots_of_programs: bool = False  # a slot for each program, and none for each row
    halves_by_rows: bool = False  # where the second half begins depends on T
    launch_too_early: bool = False  # when the programs of the one before have begun, and not ended: PDL with no wait
    step_of_one_program: bool = False  # one adds the whole step, the others nothing
    rounds_of_others: bool = False  # a late program does not see that the first one has added all rounds
    no_fence: bool = False  # between two rounds
    idle_programs: bool = False  # more programs than there are rows in a round
    results_in_the_other_half: bool = False
    abort_not_spread: bool = False
    pushes_after_abort: bool = False
    own_rows_first: bool = False  # in a batch, before the others are pushed
    own_rows_last: bool = False  # in a batch, when the results of the others have come

    def grid(self, launch):
        return self._grids[launch]

    @cached_property
    def _grids(self):
        every = range(len(self.launches))
        fewest = [len(self.launches[launch]) // (1 if self.idle_programs else self.count(launch)) for launch in every]
        return [min(self.programs, rows) for rows in fewest]

    def count(self, launch):
        """The rounds of a launch."""
        return self.rounds[launch] if launch < len(self.rounds) else 1

    @cached_property
    def _starts(self):
        every = [(len(rows), self.count(launch)) for launch, rows in enumerate(self.launches)]
        return [[rows * number // count for number in range(count + 1)] for rows, count in every]

    def rows_of(self, launch, number):
        """The rows of a round."""
        return range(*self._starts[launch][number : number + 2])

    @cached_property
    def orders(self):
        """By launch, program and rank what it does, one after the other."""
        programs = [(launch, g) for launch, count in enumerate(self._grids) for g in range(count)]
        return {(*which, rank): _order(self, *which, rank) for which in programs for rank in range(self.size)}

    @cached_property
    def _first_numbers(self):
        return [sum(map(len, self.launches[:launch])) for launch in range(len(self.launches))]

    def slot(self, launch, row, round_read):
        number = bisect.bisect_right(self._starts[launch], row) - 1
        half = 0 if self.one_half else (round_read + number) & 1
        row -= self._starts[launch][number]
        row = row % self.grid(launch) if self.slots_of_programs else row
        return half * len(self.launches[launch]) + row if self.halves_by_rows else 2 * row + half

    def number(self, launch, row):
        return self._first_numbers[launch] + row

    def place(self, reader, source):
        """The last rank's word lies where the reader's own would, which nobody sends."""
        return source if source < self.size - 1 else reader

    def results(self):
        """Where the two words of a result lie; with two ranks in one place, which makes no difference here."""
        return (0, 1) if self.size > 2 else (0,)


class Program(NamedTuple):
    launch: int
    number: int
    step: int = -1  # in `Rules.orders`, the next one; -1: it has not started
    round_read: int = 0  # from the counter, at its start
    dead: bool = False  # the abort word was set when it looked, so it pushes nothing and reads nothing
    cleared: frozenset = frozenset()  # words that it has taken since its last fence


class Stream(NamedTuple):
    rank: int
    launches: tuple[int, ...]  # that have not begun
    programs: tuple[Program, ...] = ()  # that have not ended
    cleared: frozenset = frozenset()  # words that ended programs have taken, which the others may still find there


class State(NamedTuple):
    streams: tuple[Stream, ...]
    counters: tuple[int, ...]  # by rank
    slots: frozenset  # ((rank, slot, place), row) of the words that have come
    messages: frozenset  # (kind, place or rank, row) under way
    aborted: frozenset
    failed: int  # the first launch with a row that is NaN, on any rank
    finite: int  # the last launch with a row that is not, on any rank


def explore(rules):
    """Walk through every reachable state, until something is wrong. Returns a set of sentences."""
    gc.disable()  # the states hold no circle, and looking for one takes a sixth of the time
    try:
        return _explore(rules)
    finally:
        gc.enable()


def _explore(rules):
    every = tuple(range(len(rules.launches)))
    streams = [Stream(0, every[number :: rules.streams]) for number in range(rules.streams)]
    streams += [Stream(rank, every) for rank in range(1, rules.size)]
    none = frozenset()
    start = State(tuple(streams), (0,) * rules.size, none, none, none, len(every), -1)
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


def _order(rules, launch, g, rank):
    """Return what program g of a launch does, one after the other: (what, row). It looks at the abort word at a push,
    and by two-shot before each wait too."""
    rounds = [rules.rows_of(launch, number)[g :: rules.grid(launch)] for number in range(rules.count(launch))]
    todo = [step for rows in rounds for step in (*_order_of_round(rules, launch, rows, rank), (FENCE, None))]
    return todo[:-1]


def _order_of_round(rules, launch, rows, rank):
    owners = rules.launches[launch]
    if not any(owner is not None for owner in owners):
        return [(what, row) for row in rows for what in (PUSH, WAIT)]
    todo = []
    for start in range(0, len(rows), rules.size):
        batch = rows[start : start + rules.size]
        pushes = [(PUSH, row) for row in batch if owners[row] != rank]
        own = [(what, row) for row in batch if owners[row] in (None, rank) for what in (LOOK, WAIT)]
        others = [(what, row) for row in batch if owners[row] not in (None, rank) for what in (LOOK, WAIT)]
        if rules.own_rows_first:
            todo += own + pushes + others
        else:
            todo += pushes + (others + own if rules.own_rows_last else own + others)
    return todo


def _judge_end(rules, state, wrong):
    if any(stream.launches or stream.programs for stream in state.streams):
        wrong.add("a rank waits for ever")
    if state.failed < len(rules.launches):
        if len(state.aborted) < rules.size:
            wrong.add("the abort word of a rank is never set")
        if state.finite > state.failed:
            wrong.add("finite numbers after the error")


def _steps(rules, state, wrong):
    for message in state.messages:
        yield _arrive(state, message, wrong)
    for number, stream in enumerate(state.streams):
        begun = all(program.step >= 0 for program in stream.programs)
        if stream.launches and (begun if rules.launch_too_early else not stream.programs):
            yield _launch(rules, state, number, stream)
        for which, program in enumerate(stream.programs):
            at = rules, state, number, which
            if program.step < 0:
                yield _start(*at)
                continue
            what, row = rules.orders[program.launch, program.number, stream.rank][program.step]
            if what == PUSH:
                yield _push(*at, row, wrong)
            elif what == FENCE:
                yield _fence(*at)
            elif what == LOOK:
                dead = program.dead or stream.rank in state.aborted
                yield _with(state, number, which, program._replace(step=program.step + 1, dead=dead))
            else:
                yield from _finish(*at, row, wrong)


def _arrive(state, message, wrong):
    # Here and in `_with` a state is made at once: `_replace` takes three times as long.
    kind, place, row = message
    streams, counters, slots, messages, aborted, failed, finite = state
    if kind == ABORT:
        return State(streams, counters, slots, messages - {message}, aborted | {place}, failed, finite)
    for taken, _ in slots:
        if taken == place:
            wrong.add("a word that nobody has read is written over")
    return State(streams, counters, slots | {(place, row)}, messages - {message}, aborted, failed, finite)


def _send(rules, state, sent, wrong):
    """Words that come at once make far fewer states. No bug hides in that: a rank that runs late does what it would
    if the words came late, and a word that could meet another one in its place finds it there now."""
    state = state._replace(messages=state.messages | sent)
    for message in sent if rules.at_once else ():
        state = _arrive(state, message, wrong)
    return state


def _launch(rules, state, number, stream):
    """The end of the launch before has put what it cleared in front of this one."""
    slots = state.slots if rules.launch_too_early else _without(state.slots, stream.cleared)
    launch, *rest = stream.launches
    programs = (*stream.programs, *(Program(launch, g) for g in range(rules.grid(launch))))
    cleared = stream.cleared if rules.launch_too_early else frozenset()
    stream = stream._replace(launches=tuple(rest), programs=programs, cleared=cleared)
    return state._replace(slots=slots, streams=_put(state.streams, number, stream))


def _without(slots, cleared):
    return frozenset(word for word in slots if word not in cleared)


def _start(rules, state, number, which):
    stream = state.streams[number]
    program = stream.programs[which]
    counter, rounds = state.counters[stream.rank], rules.count(program.launch)
    others = 0 if rules.step_of_one_program else rules.grid(program.launch) - 1
    share = rounds * COUNTER_STEP - others if program.number == 0 else min(1, others)
    state = state._replace(counters=_put(state.counters, stream.rank, counter + share))
    first_has_added = counter % COUNTER_STEP >= COUNTER_STEP // 2 and not rules.rounds_of_others
    round_read = counter // COUNTER_STEP - (rounds - 1 if first_has_added else 0)
    return _with(state, number, which, program._replace(step=0, round_read=round_read))


def _fence(rules, state, number, which):
    program = state.streams[number].programs[which]
    if not rules.no_fence:
        state = state._replace(slots=_without(state.slots, program.cleared))
        program = program._replace(cleared=frozenset())
    return _with(state, number, which, program._replace(step=program.step + 1))


def _push(rules, state, number, which, row, wrong):
    rank, program = state.streams[number].rank, state.streams[number].programs[which]
    launch = program.launch
    owner, slot = rules.launches[launch][row], rules.slot(launch, row, program.round_read)
    dead = rank in state.aborted and not rules.pushes_after_abort
    to = set(range(rules.size)) if owner is None else {owner}
    sent = {
        (WORD, (peer, slot, rules.place(peer, rank)), rules.number(launch, row)) for peer in to - {rank} if not dead
    }
    program = program._replace(step=program.step + 1, dead=program.dead or dead)
    return _send(rules, _with(state, number, which, program), sent, wrong)


def _finish(rules, state, number, which, row, wrong):
    """The ways in which a row may end by now."""
    rank, program = state.streams[number].rank, state.streams[number].programs[which]
    if rank in state.aborted:  # yet words that are all there when it polls are taken, if the row was pushed
        yield _done(rules, state, number, which, right=False)
    elif rules.timeouts:
        yield _done(rules, _abort(rules, state, rank), number, which, right=False)
    if not program.dead:
        yield from _read(rules, state, number, which, row, wrong)


def _abort(rules, state, rank):
    aborted = state.aborted | {rank}  # a message to one of these would change nothing
    aborts = {(ABORT, peer, None) for peer in range(rules.size) if not rules.abort_not_spread}
    messages = (state.messages | aborts) - {(ABORT, peer, None) for peer in aborted}
    return state._replace(messages=messages, aborted=aborted)


def _read(rules, state, number, which, row, wrong):
    """If all words of the row have come: take them, clear them, and as the owner push the result."""
    stream = state.streams[number]
    rank, program = stream.rank, stream.programs[which]
    owner, value = rules.launches[program.launch][row], rules.number(program.launch, row)
    slot = rules.slot(program.launch, row, program.round_read)
    back = rules.slot(program.launch, row, program.round_read + rules.results_in_the_other_half)
    peers = [peer for peer in range(rules.size) if peer != rank]
    if owner in (None, rank):
        places = {(rank, slot, rules.place(rank, peer)) for peer in peers}
    else:
        places = {(rank, back, place) for place in rules.results()}
    cleared = stream.cleared.union(*(other.cleared for other in stream.programs))
    found = {word for word in state.slots - cleared if word[0] in places}
    if len(found) < len(places):
        return
    if any(of != value for _, of in found):
        wrong.add("words of another row are taken")
    sent = set()
    if owner == rank:
        sent = {(WORD, (peer, back, place), value) for peer in peers for place in rules.results()}
    program = program._replace(cleared=program.cleared | found)
    state = _send(rules, _with(state, number, which, program), sent, wrong)
    yield _done(rules, state, number, which, right=True)


def _done(rules, state, number, which, right):
    """The row is over. Behind the last one a counter that has gone on too far shows a second stream."""
    stream = state.streams[number]
    program = stream.programs[which]
    launch, step = program.launch, program.step + 1
    failed, finite = (state.failed, max(state.finite, launch)) if right else (min(state.failed, launch), state.finite)
    state = state._replace(failed=failed, finite=finite)
    if step < len(rules.orders[launch, program.number, stream.rank]):
        return _with(state, number, which, program._replace(step=step))
    if state.counters[stream.rank] > (program.round_read + rules.count(launch)) * COUNTER_STEP:
        state = _abort(rules, state, stream.rank)
    programs = stream.programs[:which] + stream.programs[which + 1 :]
    stream = stream._replace(programs=programs, cleared=stream.cleared | program.cleared)
    return state._replace(streams=_put(state.streams, number, stream))


def _with(state, number, which, program):
    streams, *rest = state
    rank, launches, programs, cleared = streams[number]
    stream = Stream(rank, launches, _put(programs, which, program), cleared)
    return State(_put(streams, number, stream), *rest)


def _put(values, place, value):
    return (*values[:place], value, *values[place + 1 :])
