"""Answers of real servers: stock, fused, and one process in float64 say the same words."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.kinds import KINDS
from serving.server import INTERPRETED, KERNELS, Server
from serving.truth import Truth

PROMPTS = [" ".join(f"w{(17 * i + 5 * j) % 500}" for j in range(3 + 4 * i)) for i in range(4)]
TOKENS = 24
WAIT_S = 240  # four ranks with the kernels interpreted may take minutes for an answer on two cores
SITES = re.compile(r"fd_fusion \S+: (?:\w+: )?(\d+) sites?\b")


def answers(server):
    return {prompt: server.ask(prompt, TOKENS, timeout_s=WAIT_S) for prompt in PROMPTS}


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


def check_fused(server, stock, count=6, ranks=2):
    """The same answers to six streams over four slots; and the ranks have said what they fuse."""
    asked = [*PROMPTS, *PROMPTS[:2]]
    with ThreadPoolExecutor(len(asked)) as pool:
        said = pool.map(lambda prompt: server.ask(prompt, TOKENS, timeout_s=WAIT_S), asked)
        assert list(said) == [stock[prompt] for prompt in asked]
    assert sites(server) == [count] and f"group [0..{ranks - 1}]" in server.fusion_log(), server.fusion_log()
    assert f"fd_fusion: on: {count} sites" in server.out()


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
def test_stock_and_fused_say_the_same(kind, tree, checkpoint, tmp_path):
    folder = checkpoint(kind)
    with Server(tree, folder, tmp_path / "stock") as server:
        stock = answers(server)
        assert not server.fusion_log(), "installed but not asked for, the package says nothing"
    check_truth(folder, stock)
    with Server(tree, folder, tmp_path / "fused", serve={}) as server:
        assert answers(server) == stock
        check_fused(server, stock)


@pytest.mark.parametrize(
    "kind", sorted(kind for kind in KINDS.keys() - {"qwen3_moe", "glm4_moe"} if "fp8" not in kind)
)
def test_fused_says_the_truth(kind, tree, checkpoint, tmp_path):
    """The stock server is not asked again: bind has compared its forward with that of the stock model, bit by bit."""
    folder = checkpoint(kind)
    with Server(tree, folder, tmp_path / "fused", serve={}) as server:
        said = answers(server)
        check_truth(folder, said)
        check_fused(server, said)


@pytest.mark.parametrize("config", [{}, pytest.param(KERNELS, marks=pytest.mark.exhaustive)], ids=["auto", "triton"])
def test_four_ranks(config, tree, checkpoint, tmp_path):
    """Their groups share the connections of one: standins/cpu_host/device.py, `make_one_mesh`."""
    folder = checkpoint("glm4_moe", num_key_value_heads=4, seed=2)
    with Server(tree, folder, tmp_path / "server", serve=config, ranks=4, env=INTERPRETED) as server:
        said = answers(server)
        check_truth(folder, said)
        check_fused(server, said, ranks=4)
