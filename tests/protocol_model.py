"""A model of one program slot of the all-reduce kernel, explored exhaustively: every order in which ranks run, words
arrive, time runs out and aborts become known.

A row is one word, whose value is the number of the call that it belongs to; None is "not sent". A store to another
rank is a message that arrives at any later time, in any order. Clearing is local, and done when the call is: the end
of a kernel, or the fence between two rows, puts it before anything that the rank sends next. How the programs of one
rank that share a row exchange their sums is a model of its own, sums_model.py.

`explore` returns what is wrong with the protocol as `Rules` describe it: an empty set, unless a bug is planted.
"""

from dataclasses import dataclass

NAN, PUSH, RESULT, ABORT, CLEAR = "nan", "push", "result", "abort", "clear"
START, WAIT, TAKE = range(3)


@dataclass(frozen=True)
class Rules:
    """What a scenario is, and the bugs that can be planted in it."""

    size: int
    calls: tuple[int | None, ...]  # of each call the owner of the row by two-shot, or None for one-shot
    timeouts: bool = False  # whether a rank that waits may run out of time
    epoch: int = 0  # before the first call, a uint32
    streams: int = 1  # of rank 0; with two, calls alternate between them and nothing orders the two
    one_buffer: bool = False
    signed_remainder: bool = False
    abort_not_spread: bool = False
    clear_out_of_order: bool = False

    def parity(self, epoch):
        if self.one_buffer:
            return 0
        if self.signed_remainder:
            signed = epoch - (1 << 32) if epoch >> 31 else epoch
            return abs(signed) % 2 * (1 if signed >= 0 else -1)  # as C and Triton have it
        return epoch & 1


@dataclass(frozen=True)
class Thread:
    """A stream of a rank: what it still has to call, where it is in a call, and with which epoch."""

    rank: int
    calls: tuple[int, ...]
    phase: int = START
    epoch: int = 0
    before: int = 0


@dataclass(frozen=True)
class State:
    threads: tuple[Thread, ...]
    epochs: tuple[int, ...]
    slots: frozenset  # ((rank, parity, source or RESULT), value) of the words that have come
    messages: frozenset  # (kind, place or rank, value) under way
    aborted: frozenset
    results: frozenset  # (rank, call, NAN or "right")


def explore(rules):
    """Walk through every reachable state, until something is wrong. Returns a set of sentences."""
    threads = [Thread(0, tuple(range(len(rules.calls)))[stream :: rules.streams]) for stream in range(rules.streams)]
    threads += [Thread(rank, tuple(range(len(rules.calls)))) for rank in range(1, rules.size)]
    none = frozenset()
    start = State(tuple(threads), (rules.epoch,) * rules.size, none, none, none, none)
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
    if any(thread.calls for thread in state.threads):
        wrong.add("a rank waits for ever")
    failed = [call for _, call, result in state.results if result == NAN]
    if failed:
        if len(state.aborted) < rules.size:
            wrong.add("a rank never learns that the group is dead")
        if any(result != NAN and call > min(failed) for _, call, result in state.results):
            wrong.add("finite numbers after the error")


def _steps(rules, state, wrong):
    for message in state.messages:
        yield _arrive(state, message, wrong)
    for number, thread in enumerate(state.threads):
        if thread.calls:
            yield from _run(rules, state, number, thread, wrong)


def _arrive(state, message, wrong):
    kind, place, value = message
    rest = state.messages - {message}
    if kind == ABORT:
        return _with(state, messages=rest, aborted=state.aborted | {place})
    slots = dict(state.slots)
    if kind == CLEAR:
        slots.pop(place, None)
    elif place in slots:
        wrong.add("a word that nobody has read is written over")
    if kind == PUSH:
        slots[place] = value
    return _with(state, messages=rest, slots=frozenset(slots.items()))


def _run(rules, state, number, thread, wrong):
    """The next steps of one thread."""
    rank, call = thread.rank, thread.calls[0]
    owner, peers = rules.calls[call], [peer for peer in range(rules.size) if peer != rank]
    if thread.phase == START:
        before = state.epochs[rank]
        epoch = 2 if before >= 0xFFFFFFFF else before + 1
        thread = Thread(rank, thread.calls, WAIT if owner in (None, rank) else TAKE, epoch, before)
        if rank in state.aborted:
            yield _done(state, number, thread, NAN)
            return
        if (parity := rules.parity(epoch)) not in (0, 1):
            wrong.add(f"there is no buffer {parity}")
            return
        to = peers if owner is None else [owner] if owner != rank else []
        pushed = {(PUSH, (peer, parity, rank), call) for peer in to}
        yield _with(state, threads=_put(state, number, thread), messages=state.messages | pushed)
        return
    if rank in state.aborted:
        yield _done(state, number, thread, NAN)
    elif rules.timeouts:
        told = set() if rules.abort_not_spread else {(ABORT, peer, None) for peer in peers}
        yield _done(_with(state, aborted=state.aborted | {rank}, messages=state.messages | told), number, thread, NAN)
    yield from _read(rules, state, number, thread, owner, peers, wrong)


def _read(rules, state, number, thread, owner, peers, wrong):
    """If all words of the call have come: take them, clear them, and as the owner push the result."""
    rank, call, parity = thread.rank, thread.calls[0], rules.parity(thread.epoch)
    places = [(rank, parity, source) for source in (peers if thread.phase == WAIT else [RESULT])]
    slots = dict(state.slots)
    if not all(place in slots for place in places):
        return
    if any(slots.pop(place) != call for place in places):
        wrong.add("words of another call are taken")
    sent = {(PUSH, (peer, parity, RESULT), call) for peer in peers} if owner == rank else set()
    if rules.clear_out_of_order:
        slots, sent = dict(state.slots), sent | {(CLEAR, place, call) for place in places}
    state = _with(state, slots=frozenset(slots.items()), messages=state.messages | sent)
    yield _done(state, number, thread, "right")


def _done(state, number, thread, result):
    """The call is over: its epoch is written back. A second stream shows by an epoch that is not the one read."""
    epochs, results = list(state.epochs), state.results | {(thread.rank, thread.calls[0], result)}
    aborted = state.aborted
    if epochs[thread.rank] != thread.before:
        aborted = aborted | {thread.rank}
    epochs[thread.rank] = thread.epoch
    threads = _put(state, number, Thread(thread.rank, thread.calls[1:]))
    return _with(state, threads=threads, epochs=tuple(epochs), results=results, aborted=aborted)


def _put(state, number, thread):
    return (*state.threads[:number], thread, *state.threads[number + 1 :])


def _with(state, **changed):
    return State(**{name: changed.get(name, getattr(state, name)) for name in State.__dataclass_fields__})
