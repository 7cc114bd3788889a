"""The loader, each case in a process of its own: FlashInfer sees Paddle as torch, and nobody else notices."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import fake_flashinfer

ROOT = Path(__file__).parents[3]
HOST = """
    import builtins, sys, threading, time
    import paddle
    from fd_fusion.backends.flashinfer import loader
    from fd_fusion.reasons import FusionError

    seen, stop = [], threading.Event()

    def host():
        while not stop.is_set():
            try:
                import torch
                seen.append(torch)
            except ImportError:
                seen.append(None)
            time.sleep(0.0002)

    def another_look():
        looks, deadline = len(seen), time.monotonic() + 60
        while len(seen) < looks + 2:
            assert time.monotonic() < deadline, "the host's thread cannot import while FlashInfer is loaded"
            time.sleep(0.0002)

    builtins.during_import = lambda: another_look() if host_threads else None
    host_threads = []

    def watched():
        host_threads.append(threading.Thread(target=host))
        host_threads[0].start()
        another_look()
        library = load()
        another_look()
        stop.set()
        host_threads[0].join()
        return library

    def state():
        return [*sys.meta_path], {n: m for n, m in sys.modules.items() if n.split(".")[0] == "torch"}

    def load():
        try:
            return loader.load()
        except FusionError as error:
            return error.reason
"""


def run(code, *paths, then=""):
    """Run the code with these folders on sys.path; what it printed. It must exit with 0."""
    path = ":".join(map(str, (*paths, ROOT)))
    code = "".join(map(textwrap.dedent, (HOST, code, then)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(paths[0]) if paths else "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


BOUND = """
    assert isinstance(library, loader.FlashInfer), library
    import flashinfer
    assert library.function is flashinfer.comm.trtllm_allreduce_fusion
    assert flashinfer.utils.torch.Tensor is paddle.Tensor
    assert flashinfer.utils.F.relu is paddle.nn.functional.relu
    assert flashinfer.comm.trtllm_ar.lazy().Tensor is paddle.Tensor, "an import inside a function, after the load"
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return fake_flashinfer.write(tmp_path_factory.mktemp("flashinfer"))


@pytest.fixture(scope="module")
def fake_torch(tmp_path_factory):
    return fake_flashinfer.write_torch(tmp_path_factory.mktemp("torch"))


@pytest.fixture(params=["fake", "real"])
def torch_path(request, fake_torch):
    if request.param == "fake":
        return [fake_torch]
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    return []


def test_without_torch(package):
    if importlib.util.find_spec("torch"):
        pytest.skip("torch is installed")
    run(
        """
        before = state()
        library = watched()
        assert set(seen) == {None} and state() == before
        assert library.version == "0.7.2" and library.framework is paddle
        import importlib.util
        assert importlib.util.find_spec("torch") is None
        """,
        package,
        then=BOUND,
    )


def test_torch_imported_before_stays_the_same_object_in_every_thread(package, torch_path):
    run(
        """
        import torch
        before = state()
        library = watched()
        assert all(one is torch for one in seen)
        assert torch.Tensor is not paddle.Tensor
        (path, modules), (old_path, old_modules) = state(), before
        assert path == old_path and modules == old_modules, set(modules) ^ set(old_modules)
        """,
        package,
        *torch_path,
        then=BOUND,
    )


def test_torch_imported_after_or_during_is_the_real_one(package, torch_path):
    run(
        """
        library = watched()
        import torch
        assert torch.Tensor is not paddle.Tensor and all(one is torch for one in seen)
        """,
        package,
        *torch_path,
        then=BOUND,
    )


def test_an_import_that_fails_is_a_reason_and_leaves_nothing(tmp_path):
    fake_flashinfer.write(tmp_path, "0.6.12", raises="ERROR")
    run(
        """
        before = state()
        for error in (
            ModuleNotFoundError("no cuda_tile"),
            AssertionError("libcudart is not loaded"),
            TypeError("unsupported operand"),
            AttributeError("torch_version"),
            OSError("libcudart.so.13"),
            RuntimeError("no CUDA"),
        ):
            builtins.ERROR, loader._state = error, None
            reason = load()
            assert reason.code == "flashinfer_import", reason
            assert str(reason).endswith(f"does not import under paddle: {type(error).__name__}: {error}"), reason
            assert state() == before and not [n for n in sys.modules if n.startswith("flashinfer")]
            assert load() is reason
        """,
        tmp_path,
    )


def test_a_torch_module_that_paddle_lacks_is_named(package, tmp_path):
    fake_flashinfer.write(tmp_path, "0.6.12")
    (tmp_path / "flashinfer" / "utils.py").write_text("from torch.torch_version import TorchVersion\n")
    run("""assert "paddle.torch_version" in str(load())""", tmp_path)
    (tmp_path / "flashinfer" / "utils.py").write_text("from torch.nn import nothing_like_it\n")
    run("""assert "nothing_like_it" in str(load())""", tmp_path)


def test_process_group_is_lent_to_the_stand_in_alone(tmp_path):
    fake_flashinfer.write(tmp_path, "0.4.1.1")
    (tmp_path / "flashinfer" / "utils.py").write_text("from torch.distributed import ProcessGroup\n")
    run("""assert load().version == "0.4.1.1" and not hasattr(paddle.distributed, "ProcessGroup")""", tmp_path)


def test_a_version_that_has_the_unified_interface_alone_is_a_reason(tmp_path):
    fake_flashinfer.write(tmp_path, "0.9.0")
    names = "create_allreduce_fusion_workspace = allreduce_fusion = print\n"
    (tmp_path / "flashinfer" / "comm" / "__init__.py").write_text(names)
    run("""assert load().code == "flashinfer_no_kernel" and "FlashInfer 0.9.0 has no" in str(load())""", tmp_path)


def test_not_installed(tmp_path):
    run("""assert load().code == "flashinfer_missing" """, tmp_path)


def test_paddle_without_a_proxy(package):
    run(
        """
        sys.modules["paddle.compat.proxy"] = None
        assert load().code == "no_torch_proxy"
        """,
        package,
    )


def test_a_flashinfer_bound_to_torch_is_refused_and_left_alone(package, fake_torch):
    run(
        """
        import flashinfer.comm, torch
        reason = load()
        assert reason.code == "flashinfer_foreign" and "another framework than paddle" in str(reason)
        assert flashinfer.utils.torch is torch and sys.modules["flashinfer"] is flashinfer
        """,
        package,
        fake_torch,
    )


@pytest.mark.parametrize("when", ["imported", "only enabled"])
def test_a_host_that_uses_paddles_own_scope(package, when):
    run(
        f"""
        paddle.enable_compat(scope={{"flashinfer"}}, silent=True)
        if {when == "imported"}:
            import flashinfer.comm
        before = [*sys.meta_path]
        library = load()
        assert [*sys.meta_path] == before
        import flashinfer
        assert library.function is flashinfer.comm.trtllm_allreduce_fusion
        assert flashinfer.utils.torch.Tensor is paddle.Tensor
        """,
        package,
    )


def test_two_threads_load_once(package):
    run(
        """
        found = []
        threads = [threading.Thread(target=lambda: found.append(load())) for _ in range(4)]
        [thread.start() for thread in threads]; [thread.join() for thread in threads]
        assert len(found) == 4 and all(one is found[0] for one in found)
        assert isinstance(found[0], loader.FlashInfer), found[0]
        """,
        package,
    )


def test_the_compiled_module_serves_where_the_import_fails(tmp_path):
    fake_flashinfer.write(tmp_path, "0.6.12", raises="TypeError('no')")
    (tmp_path / "flashinfer_python-0.6.12.dist-info").mkdir()
    (tmp_path / "flashinfer_python-0.6.12.dist-info" / "METADATA").write_text(
        "Name: flashinfer-python\nVersion: 0.6.12\n"
    )
    cached = tmp_path / ".cache" / "flashinfer" / "0.6.12" / "90a" / "cached_ops" / "trtllm_comm"
    cached.mkdir(parents=True)
    (cached / "trtllm_comm.so").write_text("")
    (tmp_path / "tvm_ffi.py").write_text(
        "class load_module:\n"
        "    def __init__(self, path): self.path = path\n"
        "    def trtllm_allreduce_fusion(self): return self.path\n"
    )
    run(
        """
        library = load()
        assert library.function is None and "TypeError: no" in library.note
        assert library.build()().endswith("0.6.12/90a/cached_ops/trtllm_comm/trtllm_comm.so")
        """,
        tmp_path,
    )


def test_import_of_the_package_loads_nothing(package):
    run(
        """
        before = set(sys.modules)  # Paddle imports torch and tvm_ffi by itself, where they are installed
        import fd_fusion.backends.flashinfer.backend
        new = {n.split(".")[0] for n in set(sys.modules) - before}
        assert not new & {"flashinfer", "torch", "tvm_ffi"}, new
        """,
        package,
    )
