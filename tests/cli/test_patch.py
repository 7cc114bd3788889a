"""`python -m fd_fusion patch`: where the patch is, whether it applies, and the command for it."""

import json
import shlex
import subprocess

import pytest
from support.patched import PATCHES, build

from fd_fusion.cli import patch


def test_without_a_tree_it_says_where_and_how(capsys):
    assert patch.main([]) == 0
    out = capsys.readouterr().out
    assert str(PATCHES[0]) in out and f"git -C FASTDEPLOY apply {PATCHES[0]}" in out and "give --tree" in out


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a repository"])
def test_a_tree(inside, capsys, tmp_path):
    """Each printed command does what was said, so that the next look finds the other state."""
    tree = tmp_path / "a tree"
    build(PATCHES[0], tree)
    if inside:  # whose root the paths of the patch do not start from
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    before = {path: path.read_bytes() for path in tree.rglob("*.py")}
    for state in ("applies", "applied", "applies"):
        assert patch.main(["--tree", str(tree), "--json"]) == 0
        (one,) = json.loads(capsys.readouterr().out)["patches"]
        assert (one["state"], one["detail"], one["path"]) == (state, "", str(PATCHES[0]))
        assert patch.main(["--tree", str(tree)]) == 0 and one["command"] in capsys.readouterr().out
        assert (before == {path: path.read_bytes() for path in tree.rglob("*.py")}) == (state == "applies")
        subprocess.run(shlex.split(one["command"]), check=True, stdout=subprocess.DEVNULL)
    for path in before:
        path.write_text("")
    assert patch.main(["--tree", str(tree)]) == 1
    out = capsys.readouterr().out
    assert "does not apply to this tree; `python -m fd_fusion serve` needs no patch" in out
    assert len(out.splitlines()) == 3 and "exit code" not in out.splitlines()[2]


def test_a_folder_that_is_no_fastdeploy(capsys, tmp_path):
    assert patch.main(["--tree", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fd_fusion: --tree {tmp_path}: there is no folder fastdeploy in it\n"


def test_without_git(capsys, monkeypatch, tmp_path):
    (tmp_path / "fastdeploy").mkdir()
    monkeypatch.setattr(patch.shutil, "which", lambda name: None)
    assert patch.main(["--tree", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("fd_fusion: git is not found")
