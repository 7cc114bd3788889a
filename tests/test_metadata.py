"""The built metadata: what installs what, and that nothing can replace the host's GPU build of Paddle."""

import os
import shutil
import subprocess
import sys
import zipfile
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


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The sources as a clone has them, in a folder of the package's own name."""
    folder = tmp_path_factory.mktemp("where") / "fd_fusion"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fd_fusion", folder / "fd_fusion", ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def built_wheel(clone, into, hook):
    """What `pip install` asks setuptools for, without pip: nothing is fetched."""
    code = f"import sys; from setuptools import build_meta as b; print(b.{hook}(sys.argv[1]))"
    pytest.importorskip("wheel", reason="setuptools and wheel are not installed: pip install -e .[test] brings them")
    run = subprocess.run([sys.executable, "-c", code, into], cwd=clone, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return Path(into, run.stdout.splitlines()[-1])


def test_the_wheel_says_that_it_has_types(clone, tmp_path):
    with zipfile.ZipFile(built_wheel(clone, tmp_path, "build_wheel")) as wheel:
        names = set(wheel.namelist())
    assert "fd_fusion/py.typed" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fd_fusion").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def test_the_folder_above_an_editable_clone(clone, tmp_path):
    """`import fd_fusion` there must not find the clone's folder, a package without a file."""
    with zipfile.ZipFile(built_wheel(clone, tmp_path, "build_editable")) as wheel:
        wheel.extractall(tmp_path / "site")
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r})"
    (tmp_path / "sitecustomize.py").write_text(code)  # .pth files count in such a folder alone
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    argv = [sys.executable, "-m", "fd_fusion", "--version"]
    run = subprocess.run(argv, cwd=clone.parent, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"fd_fusion {fd_fusion.__version__}\n"), run.stderr
