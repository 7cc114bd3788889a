"""The examples are complete programs: each runs on two ranks, and a type checker finds no fault in them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ["two_ranks.py", "own_model.py"]


def test_the_model_of_one_s_own_runs_on_two_ranks(tmp_path):
    """`two_ranks.py` is a command of the README, which CI runs."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, str(ROOT / "examples/own_model.py")], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    logs = "".join(file.read_text() for file in sorted(tmp_path.glob("workerlog.*")))
    assert done.returncode == 0 and "6 sites, triton" in logs, done.stderr + logs


def test_a_type_checker_finds_bind_and_no_fault(tmp_path):
    """mypy reads this package's own annotations; those of Paddle are left out, since reading them takes a minute."""
    pytest.importorskip("mypy")
    options = ["--follow-imports=silent", "--no-error-summary", "--cache-dir=/dev/null"]
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import fd_fusion\nfd_fusion.bind(None, pairs=3).no_such\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *(f"examples/{name}" for name in EXAMPLES), str(wrong)],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    second, first = done.stdout.splitlines()  # of wrong.py alone
    assert 'wrong.py:2: error: Argument "pairs" to "bind"' in first, done.stdout + done.stderr
    assert 'wrong.py:2: error: "Report" has no attribute "no_such"' in second
