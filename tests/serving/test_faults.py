"""A rank that is stopped, killed or slow, in real servers: named in time, and the whole server ends; or nothing.

Stopped or killed by its own hand in the middle of a forward, of a prompt or of a token (standins/cpu_host/fault.py),
or from outside between two steps of an idle server.
"""

import functools
import itertools
import json
import signal
import threading
import time

import pytest

from serving.server import INTERPRETED, KERNELS, Server
from serving.truth import Truth

TIMEOUT_S = 6
PROMPT, TOKENS = " ".join(f"w{7 * i % 500}" for i in range(12)), 60
STREAMED = TOKENS - 1  # at the limit the host says eos, which is no word
CONFIG = {**KERNELS, "timeout_s": TIMEOUT_S}


@functools.cache
def _all(model):
    return Truth(model).answer(PROMPT, TOKENS)


def truth(model, tokens):
    """The first words of the answer to PROMPT."""
    return _all(model)[0][:tokens]


class Faulty:
    """A server whose ranks can be told to stop; and what it streamed, until the stream broke off."""

    def __init__(self, tree, checkpoint, folder, config=CONFIG):
        self.order = folder / "order"
        self.model, self.words = checkpoint("glm4_moe"), []
        self._folder, self._tree, self._config = folder, tree, config
        self.server = self.start("first")

    def start(self, name):
        env = {**INTERPRETED, "SERVING_FAULT": str(self.order)}
        # By default the host's api server waits for its clients without end, whatever has become of its workers.
        args = ["--timeout-graceful-shutdown", "5"]
        return Server(self._tree, self.model, self._folder / name, serve=self._config, env=env, args=args)

    def ask(self):
        """Stream in the background; the connection breaks off when the server ends."""

        def run():
            try:
                for heard in self.server.stream(PROMPT, TOKENS, timeout_s=90):
                    self.words.append(heard)
            except OSError:
                pass

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def strike(self, rank, phase, number):
        """Returns when the rank has got its signal."""
        if phase == "idle":
            self.server.workers()[rank].send_signal(number)
            return
        draft = self.order.with_suffix(".draft")
        draft.write_text(json.dumps([rank, phase, number]))
        if phase == "prefill":
            draft.rename(self.order)
        self.ask()
        if phase == "decode":
            until(lambda: len(self.words) > 5, 60, self.server)
            draft.rename(self.order)
        until(self.order.with_name("order.done").exists, 60, self.server)

    def check_new_start(self):
        with self.start("second") as again:
            assert again.ask(PROMPT, 8)[:7] == truth(self.model, 7)


def until(look, seconds, server):
    """How long it took until `look()` was true: (seconds, seconds by which this process came late to its looks).

    Fails behind so many seconds.
    """
    begin, late = time.monotonic(), 0.0
    last = begin
    while not look():
        assert last < begin + seconds, f"not within {seconds} s\n{server.fusion_log()}\n{server.tails()}"
        time.sleep(0.05)
        now = time.monotonic()
        late, last = late + max(0.0, now - last - 0.1), now
    return time.monotonic() - begin, late


def check_end(faulty, struck):
    """The server is down; what was streamed is right, and nothing came later."""
    server = faulty.server
    until(server.is_down, 60, server)
    server.stop()
    said = [word for _, word in faulty.words]
    assert said == truth(faulty.model, len(said)), "a prefix of the answer"
    assert all(heard <= struck + TIMEOUT_S for heard, _ in faulty.words), "nothing behind the time-out"


def check_no_alarm(server):
    assert "sign of life" not in server.fusion_log() and "missing" not in server.fusion_log()


# Each rank in each phase, and each backend in each phase; the rest by -m exhaustive.
PAIRS = [(0, "prefill", "paddle"), (1, "prefill", "triton"), (0, "decode", "triton"), (1, "decode", "paddle")]
PAIRS += [(0, "idle", "paddle"), (1, "idle", "triton")]


@pytest.mark.parametrize(
    "rank, phase, backend",
    [
        pytest.param(*case, marks=() if case in PAIRS else pytest.mark.exhaustive)
        for case in itertools.product((0, 1), ("prefill", "decode", "idle"), ("triton", "paddle"))
    ],
)
def test_a_stopped_rank_is_named_within_the_time_out(rank, phase, backend, tree, checkpoint, tmp_path):
    faulty = Faulty(tree, checkpoint, tmp_path, CONFIG if backend == "triton" else {"timeout_s": TIMEOUT_S})
    with faulty.server as server:
        faulty.strike(rank, phase, signal.SIGSTOP)
        struck = time.monotonic()
        sentence = f"rank {rank} has given no sign of life for {TIMEOUT_S} s"
        missing = f"missing rank {rank}"
        took, late = until(lambda: any(s in server.fusion_log() for s in (sentence, missing)), 60, server)
        assert took < TIMEOUT_S + 3 + late, "in time, but for what a loaded machine is late"
        until(lambda: any(s in server.worker_logs()[1 - rank] for s in (sentence, missing)), 30, server)
        check_end(faulty, struck)
    if phase == "decode":  # a new start works at once
        faulty.check_new_start()


@pytest.mark.parametrize("rank, phase", [(0, "decode"), (1, "prefill"), (1, "idle")])
def test_a_killed_rank_ends_the_server(rank, phase, tree, checkpoint, tmp_path):
    """Its launcher sees it first. A new start works at once."""
    faulty = Faulty(tree, checkpoint, tmp_path)
    with faulty.server:
        faulty.strike(rank, phase, signal.SIGKILL)
        check_end(faulty, time.monotonic())
    faulty.check_new_start()


def test_a_slow_rank_is_waited_for(tree, checkpoint, tmp_path):
    """Half of timeout_s, several times, each rank, in a prompt, in a token, and while nothing is asked."""
    faulty = Faulty(tree, checkpoint, tmp_path)
    with faulty.server as server:
        for rank in (0, 1):
            worker = server.workers()[rank]
            for phase in ("prefill", "decode", "idle"):
                faulty.words.clear()
                faulty.strike(rank, phase, signal.SIGSTOP)
                time.sleep(TIMEOUT_S / 2)
                worker.send_signal(signal.SIGCONT)
                if phase == "idle":
                    time.sleep(1)
                    continue
                until(lambda: len(faulty.words) == STREAMED, 90, server)
                said = [word for _, word in faulty.words]
                assert said == truth(faulty.model, STREAMED), (rank, phase)
        assert server.ask(PROMPT, 8)[:7] == said[:7]
        check_no_alarm(server)


def test_a_suspended_machine_is_no_false_alarm(tree, checkpoint, tmp_path):
    """All processes stop for twice the limit, and go on one after the other."""
    faulty = Faulty(tree, checkpoint, tmp_path)
    with faulty.server as server:
        asked = faulty.ask()
        until(lambda: len(faulty.words) > 5, 60, server)
        stopped = server.processes()
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        time.sleep(2 * TIMEOUT_S)
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        asked.join(90)
        said = [word for _, word in faulty.words]
        assert said == truth(faulty.model, STREAMED)
        check_no_alarm(server)
