"""Real FastDeploy servers on CPU ranks. Opt-in: FASTDEPLOY_SRC names a source tree; make_venv.sh makes the Python.

FASTDEPLOY_SRC=/path/to/FastDeploy python -m pytest tests/serving
"""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

_NEEDED = ("fastapi", "transformers", "paddleformers", "psutil")


def why_not():
    """Why no server can be started here, or None."""
    if "FASTDEPLOY_SRC" not in os.environ:
        return "FASTDEPLOY_SRC names no source tree of FastDeploy"
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}; run in the environment of make_venv.sh" if missing else None


def pytest_configure(config):
    """Ended from outside, the suite ends its server as it does at Ctrl-C."""
    if why_not() is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_ignore_collect(collection_path):
    """Files that import what only that environment has are not even read elsewhere."""
    return True if why_not() and collection_path.name not in ("test_skipped.py", "serving") else None


@pytest.fixture(scope="session")
def tree():
    return Path(os.environ["FASTDEPLOY_SRC"]).resolve()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(kind): the folder of that model, made once. With changes of its config, or a seed of its own."""
    from serving.checkpoint import write_checkpoint

    made = {}

    def make(kind, **changes):
        key = kind, *sorted(changes.items())
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("models") / kind, kind, **changes)
        return made[key]

    return make
