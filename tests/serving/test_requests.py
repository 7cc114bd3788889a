"""What a scheduler does with requests, on fused servers: every answer is still that of one process in float64."""

import time
from concurrent.futures import ThreadPoolExecutor

from serving.server import Server
from serving.truth import Truth

TOKENS = 24
KIND = "qwen3"
LONG = [" ".join(f"w{(13 * i + 7 * j) % 500}" for j in range(200 + 10 * i)) for i in range(6)]


def check(server, truth, prompts, tokens=TOKENS):
    with ThreadPoolExecutor(len(prompts)) as pool:
        said = list(pool.map(lambda prompt: server.ask(prompt, tokens, timeout_s=150), prompts))
    for prompt, words in zip(prompts, said):
        wanted = truth.answer(prompt, tokens - 1)[0]
        if "<eos>" in wanted:  # by its own choice, before the limit
            wanted = wanted[: wanted.index("<eos>")]
        assert words[: tokens - 1] == wanted, prompt[:40]


def test_prompts_in_pieces_and_prompts_that_begin_alike(tree, checkpoint, tmp_path):
    """Chunked prefill: 64 rows a step, of tokens too. Prefix caching: the second time, most blocks are there."""
    args = ["--enable-chunked-prefill", "--max-num-batched-tokens", "64", "--enable-prefix-caching"]
    truth = Truth(checkpoint(KIND))
    with Server(tree, checkpoint(KIND), tmp_path / "server", serve={}, args=args) as server:
        check(server, truth, LONG)
        check(server, truth, [f"{LONG[1]} w1", f"{LONG[1]} w2 w3", LONG[2]])


def test_too_few_blocks_and_a_client_that_goes_away(tree, checkpoint, tmp_path):
    """Four requests that begin in 3 blocks each and end in 4, with 13 blocks: some wait or are preempted."""
    truth = Truth(checkpoint(KIND))
    args = ["--num-gpu-blocks-override", "13"]
    with Server(tree, checkpoint(KIND), tmp_path / "server", serve={}, args=args) as server:
        prompts, tokens = [prompt.rsplit(" ", 25 + 10 * i)[0] for i, prompt in enumerate(LONG[:4])], 50
        gone = server.stream(LONG[5], 200)
        next(gone)
        gone.close()  # the connection, in the middle of the answer
        time.sleep(1)
        check(server, truth, prompts, tokens)
        log = server.log_of("fastdeploy.log")
        assert "Receive abort request" in log and "Preemption is triggered" in log
