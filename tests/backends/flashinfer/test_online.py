"""Installs the published releases, without their dependencies, and checks our table against them.

Run with: pytest -m online tests/backends/flashinfer/test_online.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.flashinfer_releases import RELEASES

pytestmark = pytest.mark.online
ROOT = Path(__file__).parents[3]
# What FlashInfer imports while it is imported, and Paddle does not bring.
NEEDS = ["apache-tvm-ffi==0.1.11", "click", "einops", "filelock", "jinja2", "markupsafe", "ninja", "nvidia-ml-py"]
NEEDS += ["packaging", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "tabulate", "tqdm"]
NEEDS += ["typing-extensions"]
# What the import under Paddle 3.3.1 came to, by release.
IMPORTS = {
    "0.4.1.1": "imported",
    "0.6.12": "ModuleNotFoundError: No module named 'paddle.torch_version'",
    "0.6.17": "ModuleNotFoundError: No module named 'paddle.torch_version'",
    "0.7.2.post1": "TypeError: unsupported operand type(s) for |: 'ProxyModule' and 'type'",
}


def pip_install(folder, *what):
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--target",
        str(folder),
    ]
    return subprocess.run([*command, *what], capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module", params=RELEASES, ids=lambda r: r.version)
def installed(request, tmp_path_factory):
    release, folder = request.param, tmp_path_factory.mktemp("release")
    done = pip_install(folder, f"{release.distribution}=={release.version}")
    if "No matching distribution" in done.stderr:
        pytest.skip(f"no wheel of {release.distribution} {release.version} is published here")
    assert done.returncode == 0, done.stderr
    return release, folder / "flashinfer"


def test_the_compiled_entry_takes_as_many_arguments(installed):
    release, package = installed
    source = (package / "data/csrc/trtllm_allreduce_fusion.cu").read_text()
    arguments = re.search(r"void trtllm_allreduce_fusion\((.*?)\)\s*{", source, re.S).group(1)
    assert arguments.count(",") + 1 == release.c_args


def test_the_kernel_reads_the_workspace_as_we_lay_it_out(installed):
    _, package = installed
    kernel = (package / "data/include/flashinfer/comm/trtllm_allreduce_fusion.cuh").read_text()
    for index, word in enumerate(("counter_ptr", "flag_ptr", "flag_ptr", None, "clear_ptr")):
        assert word is None or f"{word} = &reinterpret_cast<int*>(workspace[NRanks * 3])[{index}]" in kernel
    assert "workspace[2 * NRanks + r]" in kernel and "clear_offset * comm_size" in kernel
    assert "kBarrierFlagCount = 256" in kernel and "kARResidualRMSNorm = 1," in kernel


def test_the_import_under_paddle_is_as_the_readme_says(installed, tmp_path):
    release, package = installed
    done = pip_install(tmp_path, *NEEDS)
    assert done.returncode == 0, done.stderr
    code = """if True:
        from fd_fusion.backends.flashinfer import loader
        from fd_fusion.reasons import FusionError
        try:
            loader.run_build(loader.installed_version())
            print("imported")
        except FusionError as error:
            print(error.reason)
    """
    path = os.pathsep.join(map(str, (package.parent, tmp_path, ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert IMPORTS[release.version] in done.stdout, done.stdout + done.stderr
