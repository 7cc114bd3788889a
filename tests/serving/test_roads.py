"""Every road by which fusion is asked for, and the ones on which it must stay off, in real servers."""

import shutil
import subprocess
from pathlib import Path

import pytest

from serving.server import Server
from serving.test_answers import answers, check_truth, sites

PATCH = next((Path(__file__).parents[2] / "patches").glob("*.patch"))
FLAG = ["--enable-flashinfer-allreduce-fusion"]
OURS = {"FD_PLUGINS": "fd_fusion"}
KERNELS = '{"backend": "triton", "max_token_num": 8}'  # longer prompts stay stock


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
        ({"FD_FUSION_CONFIG": KERNELS, "TRITON_INTERPRET": "1", **OURS}, FLAG, "FD_FUSION_CONFIG"),
    ],
    ids=["variable", "flag", "kernels, by variable over flag"],
)
def test_asked_for(env, args, source, tree, checkpoint, tmp_path):
    with Server(tree, checkpoint("glm4_moe"), tmp_path / "server", env=env, args=args) as server:
        check_truth(checkpoint("glm4_moe"), answers(server))
        assert sites(server) == [6] and f"config from {source}" in server.fusion_log()
        if "TRITON_INTERPRET" in env:
            assert 'fd_fusion_device_rows_total{backend="triton"}' in server.metrics()


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


def test_strict_and_a_backend_that_is_not_there_end_the_server_with_a_reason(tree, checkpoint, tmp_path):
    config = {"backend": "flashinfer", "timeout_s": 20}
    server = Server(tree, checkpoint("glm4_moe"), tmp_path / "server", serve=config)
    try:
        with pytest.raises(AssertionError, match="the server ended"):
            server.wait_ready()
        assert "FlashInfer" in server.fusion_log()
    finally:
        server.stop()
