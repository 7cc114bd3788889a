"""A model of how the programs of a row exchange their sums of squares, explored exhaustively like protocol_model.py.

A program stores its sum where all can read it, two buffers by `epoch & 1`, each word with its epoch; its threads poll
by themselves, with no barrier. A store becomes visible at any later time, those to one place in their order. A call
of a program begins when all its threads are done with the one before, as after a kernel's end or the fence between
two rows. Thread 0 stores the program's epoch when it is done.

A thread whose time runs out, or that learns that the group is dead, takes NaN for the sum, and the group must be told
by then: the other threads of that program may have found all words, and see nothing wrong.
"""

from dataclasses import dataclass, replace

NAN, SUM = "nan", "sum"
THREADS = (0, 1)


@dataclass(frozen=True)
class Rules:
    """What a scenario is, and the bugs that can be planted in it."""

    split: int
    calls: int
    failures: bool = False  # whether a program may have no sum: its words did not come
    timeouts: bool = False  # whether a thread that waits may run out of time
    epoch: int = 0  # before the first call, a uint32
    one_buffer: bool = False
    words_without_epoch: bool = False
    failure_kept_back: bool = False
    own_epoch_taken_for_another_stream_s: bool = False
    only_thread_0_reports: bool = False

    def parity(self, epoch):
        return 0 if self.one_buffer else epoch & 1


@dataclass(frozen=True)
class Program:
    call: int = 0
    epoch: int = 0
    begun: bool = False
    done: tuple[int, ...] = ()


@dataclass(frozen=True)
class State:
    programs: tuple[Program, ...]
    words: tuple[tuple, ...]  # by place: the stores to it, (epoch, sum) each, of which the first is the visible one
    results: frozenset = frozenset()  # (call, what a thread found), as long as nobody is told
    told: bool = False  # whether the abort words are set


def explore(rules):
    """Walk through every reachable state, until something is wrong. Returns a set of sentences."""
    programs = (Program(epoch=rules.epoch),) * rules.split
    start = State(programs, ((None,),) * (2 * rules.split))
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
            yield replace(state, words=_put(state.words, place, stores[1:]))
    for number, program in enumerate(state.programs):
        if program.call == rules.calls:
            continue
        if not program.begun:
            yield _begin(rules, state, number, program, SUM)
            if rules.failures or state.told:
                yield _begin(rules, state, number, program, NAN)
            continue
        for thread in THREADS:
            if thread not in program.done:
                yield from _look(rules, state, number, program, thread, wrong)
                if rules.timeouts:
                    yield _give_up(rules, state, number, program, thread, wrong)


def _begin(rules, state, number, program, own):
    epoch = 2 if program.epoch >= 0xFFFFFFFF else program.epoch + 1
    words = state.words
    if own == SUM or not rules.failure_kept_back:
        place = 2 * number + rules.parity(epoch)
        words = _put(words, place, (*words[place], (epoch, own)))
    begun = replace(program, epoch=epoch, begun=True)
    return replace(state, programs=_put(state.programs, number, begun), words=words)


def _look(rules, state, number, program, thread, wrong):
    """A thread finds the sums of all programs of its row, if they have come."""
    if rules.own_epoch_taken_for_another_stream_s and 0 in program.done:
        wrong.add("a good row is NaN in part")
    found = [state.words[2 * other + rules.parity(program.epoch)][0] for other in range(rules.split)]
    if None in found or not (rules.words_without_epoch or all(epoch == program.epoch for epoch, _ in found)):
        return
    if any(epoch != program.epoch for epoch, _ in found):
        wrong.add("sums of another call are added")
    total = NAN if any(value == NAN for _, value in found) else SUM
    results = state.results if state.told else state.results | {(program.call, total)}
    if {(program.call, NAN), (program.call, SUM)} <= results:
        wrong.add("two threads of a row found different sums")
    yield _done(state, number, program, thread, results)


def _give_up(rules, state, number, program, thread, wrong):
    """A thread has waited long enough, or finds the abort word set."""
    state = replace(state, told=state.told or thread == 0 or not rules.only_thread_0_reports)
    if not state.told:
        wrong.add("a row is NaN in part and nobody is told")
    return _done(state, number, program, thread, frozenset())


def _done(state, number, program, thread, results):
    program = replace(program, done=tuple(sorted((*program.done, thread))))
    if program.done == THREADS:
        program = Program(program.call + 1, program.epoch)
    return replace(state, programs=_put(state.programs, number, program), results=results)


def _put(values, place, value):
    return (*values[:place], value, *values[place + 1 :])
