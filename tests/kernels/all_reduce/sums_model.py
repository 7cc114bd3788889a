"""A model of how the programs of a row exchange their sums of squares, explored exhaustively like protocol_model.py.

A program stores its sum once for each of the others; its threads poll by themselves, with no barrier, until the
sums of all others are there. Behind a barrier thread 0 makes these words unsent again. A store becomes visible at any
later time, those to one place in their order. A call of the row begins when all programs of it are done with the one
before, whose stores are visible then: between two calls lies the end of a kernel. Where the calls are rows of the
rounds of one launch (`rounds`), a program begins the next one when it is done itself; its own stores are visible
then, by its fence, and the rounds use two halves of the words in turn.

A thread whose time runs out, or that reads a set abort word, takes NaN for the sum, and the abort words must be set
by then: the other threads of that program may have read all words, and find nothing wrong.
"""

from dataclasses import dataclass
from typing import NamedTuple

NAN, SUM, UNSENT = "nan", "sum", None
THREADS = (0, 1)


@dataclass(frozen=True)
class Rules:
    """What a scenario is, and the bugs that can be planted in it."""

    split: int
    calls: int
    failures: bool = False  # whether a program may have no sum: its words did not come
    timeouts: bool = False  # whether a thread that waits may run out of time
    cleared_with_no_barrier: bool = False  # by the first thread that is done
    not_cleared: bool = False
    rounds: bool = False
    next_call_too_early: bool = False  # when the program itself is done, whatever the others do
    one_half: bool = False  # for all rounds
    no_fence: bool = False  # between two rounds
    one_word_for_all_readers: bool = False  # each of whom makes it unsent
    failure_kept_back: bool = False
    only_thread_0_reports: bool = False

    def word(self, reader, source, call):
        half = call & 1 if self.rounds and not self.one_half else 0
        reader = source if self.one_word_for_all_readers else reader
        return (half * self.split + reader) * self.split + source


class Program(NamedTuple):
    call: int = 0
    begun: bool = False
    done: tuple[int, ...] = ()


class State(NamedTuple):
    programs: tuple[Program, ...]
    words: tuple[tuple, ...]  # by place: the stores to it, (call, sum) or UNSENT, of which the first is visible
    results: frozenset = frozenset()  # (call, what a thread found), as long as no abort word is set
    aborted: bool = False  # whether the abort words are set


def explore(rules):
    """Walk through every reachable state, until something is wrong. Returns a set of sentences."""
    start = State((Program(),) * rules.split, ((UNSENT,),) * 2 * rules.split**2)
    wrong, seen, todo = set(), {start}, [start]
    while todo and not wrong:
        state = todo.pop()
        following = list(_steps(rules, state, wrong))
        if not following and any(program.call < rules.calls for program in state.programs):
            wrong.add("a program waits for ever")
        for new in following:
            if new not in seen:
                seen.add(new)
                todo.append(new)
    return wrong


def _steps(rules, state, wrong):
    for place, stores in enumerate(state.words):
        if len(stores) > 1:
            yield state._replace(words=_put(state.words, place, stores[1:]))
    for number, program in enumerate(state.programs):
        if program.call == rules.calls:
            continue
        if not program.begun:
            all_done = min(other.call for other in state.programs) == program.call
            if all_done or rules.rounds or rules.next_call_too_early:
                yield _begin(rules, state, number, program, SUM)
                if rules.failures or state.aborted:
                    yield _begin(rules, state, number, program, NAN)
            continue
        for thread in THREADS:
            if thread not in program.done:
                yield from _poll(rules, state, number, program, thread, wrong)
                if rules.timeouts:
                    yield _give_up(rules, state, number, program, thread, wrong)


def _begin(rules, state, number, program, own):
    words = state.words
    if program.call and rules.rounds:
        words = words if rules.no_fence else _fenced(rules, words, number)
    elif program.call and not rules.next_call_too_early:
        words = tuple(stores[-1:] for stores in words)
    for reader in set(range(rules.split)) - {number} if own == SUM or not rules.failure_kept_back else ():
        place = rules.word(reader, number, program.call)
        words = _put(words, place, (*words[place], (program.call, own)))
    return state._replace(programs=_put(state.programs, number, program._replace(begun=True)), words=words)


def _fenced(rules, words, number):
    """The words when all that a program has stored is visible: sums for others, unsent words in its own places."""
    words = list(words)
    for place, stores in enumerate(words):
        reader, source = place // rules.split % rules.split, place % rules.split
        own = [at for at, store in enumerate(stores) if (reader if store is UNSENT else source) == number]
        words[place] = stores[max(own, default=0) :]
    return tuple(words)


def _poll(rules, state, number, program, thread, wrong):
    """A thread finds the sums of the other programs of its row, if they have come."""
    others = set(range(rules.split)) - {number}
    found = [state.words[rules.word(number, other, program.call)][0] for other in others]
    if UNSENT in found:
        return
    if any(call != program.call for call, _ in found) and not state.aborted:  # of a dead group nothing counts
        wrong.add("sums of another call are added")
    total = NAN if any(value == NAN for _, value in found) else SUM
    results = state.results if state.aborted else state.results | {(program.call, total, number)}
    if {(program.call, NAN, number), (program.call, SUM, number)} <= results:
        wrong.add("two threads of a program found different sums")
    yield _done(rules, state, number, program, thread, results)


def _give_up(rules, state, number, program, thread, wrong):
    """A thread has waited long enough, or finds the abort word set."""
    state = state._replace(aborted=state.aborted or thread == 0 or not rules.only_thread_0_reports)
    if not state.aborted:
        wrong.add("a row is NaN in part and no abort word is set")
    return _done(rules, state, number, program, thread, frozenset())


def _done(rules, state, number, program, thread, results):
    program = program._replace(done=tuple(sorted((*program.done, thread))))
    words, all_done = state.words, program.done == THREADS
    if (len(program.done) == 1 if rules.cleared_with_no_barrier else all_done) and not rules.not_cleared:
        for other in set(range(rules.split)) - {number}:
            place = rules.word(number, other, program.call)
            words = _put(words, place, (*words[place], UNSENT))
    program = Program(program.call + 1) if all_done else program
    return state._replace(programs=_put(state.programs, number, program), words=words, results=results)


def _put(values, place, value):
    return (*values[:place], value, *values[place + 1 :])
