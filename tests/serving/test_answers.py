"""Answers of real servers: stock, fused, and one process in float64 say the same words."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.server import Server
from serving.truth import Truth

PROMPTS = [" ".join(f"w{(17 * i + 5 * j) % 500}" for j in range(3 + 4 * i)) for i in range(4)]
TOKENS = 24
SITES = re.compile(r"fd_fusion \S+: (?:\w+: )?(\d+) sites?\b")


def answers(server):
    return {prompt: server.ask(prompt, TOKENS) for prompt in PROMPTS}


def check_truth(folder, said):
    """Equal to float64 up to the host's own last word: at the limit it says eos, whatever was sampled."""
    truth = Truth(folder)
    for prompt, words in said.items():
        wanted, lead = truth.answer(prompt, TOKENS - 1)
        assert lead > 1e-3, "this prompt cannot tell: another word is as good"
        assert words[: TOKENS - 1] == wanted, prompt


def sites(server):
    """The number of Sites that each rank said."""
    return [int(count) for count in SITES.findall(server.fusion_log())]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe", "glm4_moe"])
def test_stock_and_fused_are_the_truth(kind, tree, checkpoint, tmp_path):
    folder = checkpoint(kind)
    with Server(tree, folder, tmp_path / "stock") as server:
        stock = answers(server)
        assert not server.fusion_log(), "installed but not asked for, the package says nothing"
    check_truth(folder, stock)
    with Server(tree, folder, tmp_path / "fused", serve={}) as server:
        assert answers(server) == stock
        with ThreadPoolExecutor(6) as pool:  # six streams over four slots
            assert list(pool.map(lambda prompt: server.ask(prompt, TOKENS), [*PROMPTS, *PROMPTS[:2]])) == [
                stock[prompt] for prompt in [*PROMPTS, *PROMPTS[:2]]
            ]
        assert sites(server) and set(sites(server)) == {6}, server.fusion_log()
        assert "fd_fusion: on: 6 sites" in server.out()
