"""Each patch applies to a tree of the right shape, comes off again, and carries any text unharmed to the ranks."""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.patched import PATCHES, build

ROOT = Path(__file__).parents[3]
CONFIGS = [
    '{"backend": "triton", "max_token_num": 64}',
    """{"backend": "it's \\"quoted\\""}""",
    '{"backend": "$(touch pwned) `touch pwned` $HOME ; touch pwned"}',
    '{"backend": "a\\\\nb & | > pwned #"}',
    "{}",
]


def apply(patch, folder, *options):
    subprocess.run(["git", "init", "-q", "."], cwd=folder, check=True)
    subprocess.run(["git", "apply", *options, str(patch)], cwd=folder, check=True)


@pytest.fixture(params=PATCHES, ids=lambda path: path.stem)
def patched(request, tmp_path, monkeypatch):
    """The modules of a patched tree."""
    build(request.param, tmp_path)
    apply(request.param, tmp_path)
    for part in ("fastdeploy", "fastdeploy/engine"):
        monkeypatch.syspath_prepend(str(tmp_path / part))
    names = ("config", "args_utils", "engine", "common_engine")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in names}
    yield SimpleNamespace(folder=tmp_path, worker=tmp_path / "fastdeploy/worker/worker_process.py", **modules)
    for name in names:
        sys.modules.pop(name, None)


def through(patched, launcher, arguments):
    """What a rank's ParallelConfig holds, for the arguments of the api server."""
    parser = patched.args_utils.EngineArgs.add_cli_args(argparse.ArgumentParser())
    engine_args = patched.args_utils.EngineArgs.from_cli_args(parser.parse_args(arguments))
    cfg = SimpleNamespace(parallel_config=engine_args.create_engine_config(), nnode=1)
    result = getattr(patched, launcher).Launcher(cfg).start(patched.worker)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("launcher", ["engine", "common_engine"])
@pytest.mark.parametrize("config", CONFIGS)
def test_any_text_arrives_unharmed(patched, launcher, config, monkeypatch):
    import json

    monkeypatch.chdir(patched.folder)
    assert json.loads(through(patched, launcher, ["--fusion-config", config])) == config
    assert not list(patched.folder.rglob("pwned")), "the shell ran a part of the text"


@pytest.mark.parametrize("launcher", ["engine", "common_engine"])
def test_without_the_argument_nothing_is_handed_on(patched, launcher):
    assert through(patched, launcher, []) == "null"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_it_comes_off_again(patch, tmp_path):
    build(patch, tmp_path)
    before = {path: path.read_text() for path in tmp_path.rglob("*.py")}
    apply(patch, tmp_path)
    assert {path: path.read_text() for path in before} != before
    apply(patch, tmp_path, "-R")
    assert {path: path.read_text() for path in before} == before


def test_the_ledger_names_every_patch_and_its_commit():
    ledger = (ROOT / "patches/README.md").read_text()
    assert PATCHES
    for patch in PATCHES:
        commit = re.search(r"\b[0-9a-f]{40}\b", patch.read_text())[0]
        assert patch.name in ledger and commit in ledger
        section = ledger.split(f"## `{patch.name}`")[1]
        assert all(f"**{part}" in section for part in ("Why", "How", "Upstream", "Remove when"))
