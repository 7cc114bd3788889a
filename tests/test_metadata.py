"""The built metadata: what installs what, and that nothing can replace the host's GPU build of Paddle."""

import os
import shutil
import subprocess
import sys
import tarfile
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
    skip = shutil.ignore_patterns("__pycache__", "*_cache")
    for name in ("fd_fusion", "patches", "examples", "tests", ".ci"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for path in ROOT.iterdir():
        if path.suffix in (".md", ".py", ".toml", ".in") or path.name == "LICENSE":
            shutil.copy(path, folder)
    return folder


def built_wheel(clone, into, hook):
    """What `pip install` and `python -m build` ask setuptools for, without them: nothing is fetched."""
    code = f"import sys; from setuptools import build_meta as b; print(b.{hook}(sys.argv[1]))"
    pytest.importorskip("wheel", reason="setuptools and wheel are not installed: pip install -e .[test] brings them")
    run = subprocess.run([sys.executable, "-c", code, into], cwd=clone, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return Path(into, run.stdout.splitlines()[-1])


def files_of(*folders):
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def test_the_sdist_holds_everything_and_its_wheel_types_and_patches(clone, tmp_path):
    """The wheel is built from the unpacked sdist, as a registry's user does, and its `patch` finds the patches."""
    with tarfile.open(built_wheel(clone, tmp_path, "build_sdist")) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    documents = {path.name for path in ROOT.glob("*.md")} | {"LICENSE", "setup.py", "pyproject.toml"}
    assert files_of("fd_fusion", "patches", "examples", "tests", ".ci") | documents <= names
    with zipfile.ZipFile(built_wheel(unpacked, tmp_path, "build_wheel")) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    sources = {name for name in files_of("fd_fusion") if name.endswith(".py")}
    patches = {f"fd_fusion/{name}" for name in files_of("patches")}
    assert {"fd_fusion/py.typed"} | sources | patches <= names
    (about,) = (tmp_path / "site").glob("*.dist-info/METADATA")
    assert "\nHome-page:" not in about.read_text(), "FastDeploy's page is the host's, not this package's"
    assert {name.split("/")[0] for name in names} == {"fd_fusion", f"fd_fusion-{fd_fusion.__version__}.dist-info"}
    argv = [sys.executable, "-m", "fd_fusion", "patch"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(argv, cwd=tmp_path / "site", env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith(f"{tmp_path}/site/fd_fusion/patches/fastdeploy-"), run.stderr


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
