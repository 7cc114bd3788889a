"""The loader, each case in a process of its own: FlashInfer compiles in another, and nothing of it enters ours."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import fake_flashinfer

ROOT = Path(__file__).parents[3]
HOST = """
    import sys
    import paddle
    from fd_fusion.backends.flashinfer import loader
    from fd_fusion.reasons import FusionError

    def state():
        names = ("torch", "flashinfer")
        return [*sys.meta_path], {n: m for n, m in sys.modules.items() if n.split(".")[0] in names}

    def load(version):
        try:
            return loader.load(version)
        except FusionError as error:
            return error.reason

    before = state()
"""


def run(code, *paths):
    """Run the code with these folders on sys.path; what it said on stderr. It must exit with 0."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(HOST) + textwrap.dedent(code)],
        env={"PYTHONPATH": ":".join(map(str, (*paths, ROOT))), "PATH": "/usr/bin:/bin", "HOME": str(paths[0])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def built(folder, version="0.7.2"):
    """What the fake writes in the place of a compiled kernel."""
    return (folder / f".cache/flashinfer/{version}/90a/cached_ops/trtllm_comm/trtllm_comm.so").read_text()


needs_no_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")


@needs_no_torch
def test_it_is_compiled_under_paddle_in_a_process_of_its_own_and_once(tmp_path):
    fake_flashinfer.write(tmp_path)
    (tmp_path / "flashinfer" / "utils.py").write_text(
        "import paddle, torch, torch.nn.functional as F\n"
        "from torch.distributed import ProcessGroup\n"
        "assert torch.Tensor is paddle.Tensor and F.relu is paddle.nn.functional.relu\n"
    )
    said = run(
        """
        assert loader.installed_version() == "0.7.2" and loader.compiled_module("0.7.2") is None
        assert callable(load("0.7.2")) and load("0.7.2") == load("0.7.2")
        assert state() == before and not hasattr(paddle.distributed, "ProcessGroup")
        assert len(sys.modules["tvm_ffi"].LOADS) == 1
        """,
        tmp_path,
    )
    assert built(tmp_path) == "with real torch: False\n"
    assert "fd_fusion: compiling the kernel of FlashInfer 0.7.2: some minutes, once on this machine" in said
    assert "fd_fusion: the kernel of FlashInfer 0.7.2 is compiled, in " in said
    assert "compiling" not in run("""load("0.7.2")""", tmp_path), "the next process takes what there is"


def test_it_is_compiled_under_torch_where_there_is_one(tmp_path):
    fake_flashinfer.write_torch(fake_flashinfer.write(tmp_path))
    run("""assert callable(load("0.7.2")) and state() == before""", tmp_path)
    assert built(tmp_path) == "with real torch: True\n"


@pytest.mark.parametrize(
    "raises, text",
    [
        ("ModuleNotFoundError('no cuda_tile')", "ModuleNotFoundError: no cuda_tile"),
        ("AssertionError('libcudart is not loaded')", "AssertionError: libcudart is not loaded"),
        ("__import__('os').abort()", "it ended its process (exit code -6)"),
    ],
)
def test_a_build_that_fails_is_a_reason_and_is_not_tried_again(tmp_path, raises, text):
    fake_flashinfer.write(tmp_path, "0.6.12", raises=raises)
    said = run(
        f"""
        reason = load("0.6.12")
        assert reason.code == "flashinfer_build" and str(reason).endswith({text!r}), reason
        assert state() == before and load("0.6.12") is reason
        """,
        tmp_path,
    )
    assert said.count("compiling") == 1


def test_a_kernel_that_cannot_be_loaded_is_a_reason(tmp_path):
    fake_flashinfer.write(tmp_path)
    (tmp_path / "tvm_ffi.py").write_text("raise ImportError('libtvm_ffi.so')")
    run("""assert str(load("0.7.2")).endswith("it cannot be loaded: ImportError: libtvm_ffi.so")""", tmp_path)


def test_not_installed(tmp_path):
    run("assert loader.installed_version() is None", tmp_path)


def test_import_of_the_package_loads_nothing(tmp_path):
    run(
        """
        had = set(sys.modules)  # Paddle imports torch and tvm_ffi by itself, where they are installed
        import fd_fusion.backends.flashinfer.backend
        new = {n.split(".")[0] for n in set(sys.modules) - had}
        assert not new & {"flashinfer", "torch", "tvm_ffi"}, new
        """,
        fake_flashinfer.write(tmp_path),
    )
