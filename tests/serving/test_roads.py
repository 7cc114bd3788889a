"""Every road by which fusion is asked for, and the ones on which it must stay off, in real servers."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from serving.server import INTERPRETED, KERNELS, Server
from serving.test_answers import answers, check_truth, sites

PATCH = next((Path(__file__).parents[2] / "patches").glob("*.patch"))
FLAG = ["--enable-flashinfer-allreduce-fusion"]
OURS = {"FD_PLUGINS": "fd_fusion"}


def number(server, name):
    """The sum of what /metrics says under names that begin so."""
    return sum(float(line.split()[-1]) for line in server.metrics().splitlines() if line.startswith(name))


@pytest.fixture(scope="module")
def patched(tree, tmp_path_factory):
    """A copy of the tree with our patch."""
    copy = tmp_path_factory.mktemp("patched")
    shutil.copytree(tree / "fastdeploy", copy / "fastdeploy", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "--include=fastdeploy/*", str(PATCH)], cwd=copy, check=True)
    return copy


@pytest.mark.parametrize(
    "env, args, source",
    [
        ({"FD_FUSION_CONFIG": "{}", **OURS}, [], "FD_FUSION_CONFIG"),
        (OURS, FLAG, "--enable-flashinfer-allreduce-fusion"),
        ({"FD_FUSION_CONFIG": json.dumps(KERNELS), **INTERPRETED, **OURS}, FLAG, "FD_FUSION_CONFIG"),
    ],
    ids=["variable", "flag", "kernels, by variable over flag"],
)
def test_asked_for(env, args, source, tree, checkpoint, tmp_path):
    with Server(tree, checkpoint("glm4_moe"), tmp_path / "server", env=env, args=args) as server:
        check_truth(checkpoint("glm4_moe"), answers(server))
        assert sites(server) == [6] and f"config from {source}" in server.fusion_log()
        finished = number(server, 'fd_fusion_finished_total{path="fused"')
        assert finished > 0 and not number(server, "fd_fusion_timeouts_total")
        if "TRITON_INTERPRET" in env:
            assert number(server, 'fd_fusion_device_rows_total{backend="triton"}') > 0


def test_the_patch(patched, checkpoint, tmp_path):
    args = ["--fusion-config", '{"timeout_s": 20}']
    with Server(patched, checkpoint("glm4_moe"), tmp_path / "server", env=OURS, args=args) as server:
        check_truth(checkpoint("glm4_moe"), answers(server))
        assert sites(server) == [6] and "config from --fusion-config" in server.fusion_log()


@pytest.mark.parametrize(
    "env", [{"FD_FUSION_CONFIG": "{}", "FD_FUSION_DISABLE": "1", **OURS}, {"FD_FUSION_CONFIG": "{}"}, OURS], ids=str
)
def test_off(env, tree, checkpoint, tmp_path):
    """By the kill switch; where the host loads no plugin, as it does with FD_PLUGINS unset; where nobody asks."""
    with Server(tree, checkpoint("glm4_moe"), tmp_path / "server", env=env) as server:
        check_truth(checkpoint("glm4_moe"), answers(server))
        assert not sites(server) and "fd_fusion" not in server.metrics()


def start_that_fails(server):
    """Its ranks end by themselves and it is never ready. Returns fd_fusion.log.

    The server ends too, or FastDeploy's own parent hangs in its last step, as it now and then does (README.md).
    """
    try:
        with pytest.raises(AssertionError, match=r"the server ended|not ready"):
            server.wait_ready()
        assert server.has_no_ranks()
        return server.fusion_log()
    finally:
        server.stop()


def test_strict_fuses_where_it_can(tree, checkpoint, tmp_path):
    config, folder = {"strict": True, **KERNELS}, checkpoint("glm4_moe")
    with Server(tree, folder, tmp_path / "server", serve=config, env=INTERPRETED) as server:
        check_truth(folder, answers(server))
        assert sites(server) == [6]


def test_a_backend_that_is_not_there_ends_the_server_with_a_reason(tree, checkpoint, tmp_path):
    config = {"backend": "flashinfer", "timeout_s": 20}
    assert "FlashInfer" in start_that_fails(Server(tree, checkpoint("glm4_moe"), tmp_path / "server", serve=config))


@pytest.mark.parametrize("strict", [False, True])
def test_a_rank_without_the_config_is_named_and_the_server_ends(strict, tree, checkpoint, tmp_path):
    """As on two machines, of which one was started with a config: its ranks wait for the votes of the others. Without
    a profile run of the host, the forward that binds would wait for those ranks without end."""
    config = {"strict": strict, "timeout_s": 3}
    folder, env = checkpoint("glm4_moe"), {"SERVING_BARE_RANK": "1"}
    log = start_that_fails(Server(tree, folder, tmp_path / "server", serve=config, env=env))
    assert "rank 1 never voted within 3 s" in log
