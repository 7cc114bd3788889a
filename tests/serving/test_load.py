"""Ten minutes of requests while every core is busy: no rank is called missing, and every answer is right."""

import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.server import INTERPRETED, Server
from serving.test_answers import PROMPTS, TOKENS
from serving.test_faults import CONFIG, check_no_alarm
from serving.truth import Truth

MINUTES, STREAMS, LOOPS = 10, 6, 4


@pytest.mark.exhaustive
def test_a_busy_machine_is_no_false_alarm(tree, checkpoint, tmp_path):
    folder = checkpoint("glm4_moe")
    wanted = {prompt: Truth(folder).answer(prompt, TOKENS - 1)[0] for prompt in PROMPTS}
    end = time.monotonic() + 60 * MINUTES
    done = itertools.count()
    wrong = threading.Event()

    def ask(stream):
        for i in itertools.count(stream):
            if time.monotonic() > end or wrong.is_set():
                return
            prompt = PROMPTS[i % len(PROMPTS)]
            if server.ask(prompt, TOKENS, timeout_s=240)[: TOKENS - 1] != wanted[prompt]:
                wrong.set()
            next(done)

    with Server(tree, folder, tmp_path / "server", serve=CONFIG, env=INTERPRETED) as server:
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(LOOPS)]
        try:
            with ThreadPoolExecutor(STREAMS) as pool:
                list(pool.map(ask, range(STREAMS)))
        finally:
            for process in busy:
                process.kill()
                process.wait()
        print(f"{next(done)} requests in {MINUTES} minutes")
        assert not wrong.is_set()
        assert "ERROR" not in server.fusion_log()
        check_no_alarm(server)
