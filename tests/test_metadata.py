"""The built metadata: what installs what, and that nothing can replace the host's GPU build of Paddle."""

from importlib import metadata
from pathlib import Path

import pytest

import fd_fusion

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built():
    try:
        return metadata.distribution("fd_fusion")
    except metadata.PackageNotFoundError:
        pytest.skip("fd_fusion is not installed here: pip install -e . builds the metadata that is read")


def test_extras(built):
    requires = built.requires
    assert set(built.metadata.get_all("Provides-Extra")) == {"cpu", "test", "bench"}
    assert not any("paddlepaddle-gpu" in line.replace("_", "-").lower() for line in requires)
    assert all("extra ==" in line for line in requires), "installed beside FastDeploy, it requires nothing"
    cpu = [line for line in requires if 'extra == "cpu"' in line]
    assert any(line.startswith("paddlepaddle>=3.3") for line in cpu) and any(
        line.startswith("triton") for line in cpu
    )


def test_name_licence_python_version(built):
    info = built.metadata
    assert info["Name"].replace("-", "_") == "fd_fusion" and info["Requires-Python"] == ">=3.10"
    assert (info["License"] or info["License-Expression"]) == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert info["Version"] == fd_fusion.__version__


def test_entry_points(built):
    points = {(point.group, point.name): point.value for point in built.entry_points}
    assert points["console_scripts", "fd-fusion"] == "fd_fusion.__main__:main"
