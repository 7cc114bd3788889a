"""The backend without a GPU: its answers, its workspace, its watchdog; and ranks as real processes."""

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fd_fusion.backends.flashinfer import backend as flashinfer
from fd_fusion.backends.flashinfer import loader
from fd_fusion.backends.flashinfer.calls import rules
from fd_fusion.backends.flashinfer.watchdog import ControlReader, Watchdog
from fd_fusion.backends.flashinfer.workspace import Layout, rows_that_fit
from fd_fusion.comm.watcher import EXIT_STATUS
from tests.support.fake_driver import count_calls
from tests.support.flashinfer_spec import spec
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a version is installed and compiled. Call it with another one to change it."""

    def install(version, compiled=True):
        monkeypatch.setattr(loader, "installed_version", lambda: version)
        monkeypatch.setattr(loader, "compiled_module", lambda _: Path("so") if compiled else None)

    install("0.7.2.post1")
    return install


@pytest.mark.parametrize(
    "changed, version, code, text",
    [
        ({"device": "cpu", "arch": None}, "0.7.2", "flashinfer_no_gpu", "runs on a GPU only"),
        ({"deterministic": True}, "0.7.2", "deterministic", "the flashinfer backend is not batch invariant"),
        ({"size": 3}, "0.7.2", "world_size", "3 ranks; this backend takes 2, 4, 8, 16"),
        ({"dtype": "float64"}, "0.7.2", "dtype", "float64"),
        (
            {"weight_dtypes": ("float32",)},
            "0.7.2",
            "flashinfer_weight_dtype",
            "as bfloat16, and it is float32",
        ),
        ({"hidden_size": 4100}, "0.7.2", "hidden_size", "4100 is not a multiple of 8"),
        ({"hidden_size": 8200}, "0.7.2", "hidden_size", None),
        ({}, None, "flashinfer_missing", "not installed"),
        ({"arch": 80}, "0.7.2", "flashinfer_arch", "has no kernel for sm_80"),
        ({"arch": 120}, "0.6.12", "flashinfer_arch", "has no kernel for sm_120"),
        ({"hidden_size": 2880}, "0.6.12", "flashinfer_partial_warp", "in blocks of 180 threads"),
        ({"hidden_size": 4608}, "0.6.14", "flashinfer_partial_warp", "in blocks of 144 threads"),
        ({"weight_offset": 1.0}, "0.6.11", "flashinfer_weight_offset", "cannot add 1.0"),
        ({"workspace_bytes": 60_000}, "0.7.2", "workspace_small", "may have 60000"),
    ],
)
def test_why_not(installed, changed, version, code, text):
    installed(version)
    if text is None:  # 1025 threads, which no cluster divides
        assert flashinfer.supports(spec(**changed)).code == code
        return
    reason = flashinfer.supports(spec(**changed))
    assert reason.code == code and text in str(reason) and reason.remedy


@pytest.mark.parametrize(
    "changed, version",
    [
        ({}, "0.4.1.1"),
        ({}, "0.7.2.post1"),
        ({"arch": 100, "size": 16}, "0.6.12"),
        ({"arch": 120}, "0.6.17"),
        ({"hidden_size": 2880}, "0.6.15"),
        ({"weight_offset": 1.0}, "0.6.12"),
        ({"dtype": "float32"}, "0.7.2"),
    ],
)
def test_why_yes(installed, changed, version):
    installed(version)
    assert flashinfer.supports(spec(**changed)) is None


def test_a_compiler_is_needed_unless_it_was_compiled_before(installed, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    installed("0.7.2", compiled=False)
    monkeypatch.setattr(flashinfer.shutil, "which", lambda _: None)
    assert "nvcc is not found" in str(flashinfer.supports(spec()))
    monkeypatch.setattr(flashinfer.shutil, "which", {"nvcc": "/bin/nvcc"}.get)
    assert "ninja is not found" in str(flashinfer.supports(spec()))
    monkeypatch.setattr(flashinfer.shutil, "which", lambda _: "/bin/it")
    assert flashinfer.supports(spec()) is None


@pytest.mark.parametrize("size, hidden_size, e", [(2, 4096, 2), (8, 8192, 2), (4, 2880, 2), (2, 64, 4)])
def test_as_many_rows_as_fit(size, hidden_size, e):
    nbytes = 32 << 20
    rows = rows_that_fit(nbytes, size, hidden_size, e)
    assert Layout(size, rows, hidden_size, e).nbytes <= nbytes
    row = 4 * size * hidden_size * e
    assert nbytes // row - rows <= 1 + 4096 * size // row, "N*T*H*8 bytes for 16 bit, but for the flags"


def test_the_kernels_int32_offsets_bound_the_rows():
    rows = rows_that_fit(1 << 40, 8, 8192, 2)
    assert Layout(8, rows, 8192, 2).comm_bytes < 2**30 <= Layout(8, rows + 1, 8192, 2).comm_bytes


def test_the_layout_of_the_workspace():
    layout = Layout(size=2, rows=3, hidden_size=24, element_bytes=2)
    memory = type("Memory", (), {"addresses": (1 << 20, 2 << 20), "own": 2 << 20})
    comm = 2 * 3 * 24 * 2
    flags, lamport = 384, 384 + 2 * 1024
    control = -(-(lamport + 3 * comm) // 128) * 128
    assert layout.comm_bytes == comm and layout.nbytes == control + 20
    expected = [base + offset for offset in (0, flags, lamport) for base in memory.addresses]
    assert layout.pointers(memory) == [*expected, (2 << 20) + control]
    assert all(address % 16 == 0 for address in layout.pointers(memory))


def op(version="0.7.2", **changed):
    """A `FlashInferOp` that is only asked, never called."""
    one = object.__new__(flashinfer.FlashInferOp)
    one._spec, one._version, one._rules, one.limit = spec(**changed), version, rules(version), 16
    return one


def test_two_shot_only_where_it_is_sound_and_pays():
    big = 1 << 20
    assert all(op("0.6.17", size=4).one_shot(rows) for rows in (1, 5, big))
    new = op(size=4, hidden_size=8192)
    assert new.one_shot(1) and new.one_shot(512) and not new.one_shot(513)
    assert op(size=4, hidden_size=1 << 27).one_shot(4), "two-shot needs more rows than ranks"


class Tensor:
    def __init__(self, *shape, dtype="bfloat16", contiguous=True, address=64):
        self.shape, self.dtype, self._contiguous, self._address = [*shape], f"torch.{dtype}", contiguous, address

    def is_contiguous(self):
        return self._contiguous

    def data_ptr(self):
        return self._address


GOOD = {"partial": Tensor(4, 4096), "residual": Tensor(4, 4096), "weight": Tensor(4096)}


@pytest.mark.parametrize(
    "changed, offset, text",
    [
        ({"partial": Tensor(17, 4096)}, 0.0, "T=17; the workspace holds 16 rows"),
        ({"residual": Tensor(3, 4096)}, 0.0, r"residual is \[3, 4096\] bfloat16; expected \[4, 4096\] bfloat16"),
        ({"weight": Tensor(4096, dtype="float32")}, 0.0, r"weight is \[4096\] float32; expected"),
        ({"partial": Tensor(4, 4096, dtype="float16")}, 0.0, "x is .* float16"),
        ({"residual": Tensor(4, 4096, contiguous=False)}, 0.0, "residual is not contiguous"),
        ({"partial": Tensor(4, 4096, address=72)}, 0.0, "not aligned to 16 bytes"),
    ],
)
def test_what_the_kernel_would_misread_is_an_error_before_the_launch(changed, offset, text):
    with pytest.raises(ValueError, match=text):
        op()._require(**{**GOOD, **changed}, weight_offset=offset)
    op()._require(**GOOD, weight_offset=1.0)
    with pytest.raises(ValueError, match="it adds none"):
        op("0.4.1")._require(**GOOD, weight_offset=1.0)


def watch(code):
    """Run a watchdog in a process of its own."""
    head = "import time\nfrom fd_fusion.backends.flashinfer.watchdog import Watchdog\n"
    command = [sys.executable, "-c", head + code]
    return subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("read", ["lambda: (7, 0, 1, 64, 9)", "lambda: time.sleep(60)"], ids=["spins", "stuck"])
def test_a_call_that_hangs_ends_the_process_and_says_what(read):
    done = watch(f"Watchdog({read}, 'op of group tp, rank 0 of 2,', 0.4)\ntime.sleep(20)")
    assert done.returncode == EXIT_STATUS
    said = "fd_fusion: op of group tp, rank 0 of 2, has waited for another rank for 0.4 s; this process ends"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_idle_and_moving_are_no_hang():
    states, ended = iter(range(10**9)), []
    idle = Watchdog(lambda: (0, 0, 1, 64, 9), "idle", 0.2, end=ended.append)
    moving = Watchdog(lambda: (7, 0, next(states) % 3, 64, 9), "moving", 0.2, end=ended.append)
    assert idle.idle_within(1.0) and not moving.idle_within(0.7)
    idle.stop()
    moving.stop()
    assert not ended


def test_a_broken_context_ends_the_watch_and_nothing_else():
    def read():
        raise RuntimeError("cuStreamSynchronize: error 700 of the CUDA driver")

    ended = []
    dog = Watchdog(read, "broken", 0.2, end=ended.append)
    assert not dog.idle_within(0.5) and not ended


def test_the_control_block_is_read_on_a_stream_of_its_own_and_all_is_given_back(monkeypatch):
    """In each thread relaxed, since the host may be capturing; and a broken context is an error, but of no close."""
    calls, words = count_calls(monkeypatch), (ctypes.c_int * 5)(7, 0, 1, 64, 9)
    read = ControlReader(1 << 40)
    assert calls["cuStreamCreate"] == calls["cuMemHostAlloc"] == 1, "before any capture"
    read._host.value = ctypes.addressof(words)
    assert read() == read() == (7, 0, 1, 64, 9)
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert calls.modes["cuMemcpyDtoHAsync_v2"] == calls.modes["cuStreamSynchronize"] == 2, "relaxed"
    assert calls.mode == 1 and calls["cuMemcpyDtoHAsync_v2"] == 3
    assert calls["cuStreamSynchronize"] == 3 and calls["cuCtxPushCurrent_v2"] == calls["cuCtxPopCurrent_v2"]
    calls.refused["cuMemcpyDtoHAsync_v2"] = 700
    with pytest.raises(RuntimeError, match="cuMemcpyDtoHAsync_v2: 700"):
        read()
    read.close()
    assert calls["cuStreamDestroy_v2"] == calls["cuMemFreeHost"] == 1
    other = ControlReader(1 << 40)
    calls.refused["cuCtxPushCurrent_v2"] = 700
    other.close()


@pytest.mark.parametrize("size, more", [(2, []), (4, ["sub_groups"])], ids=["2", "4, and sub-groups of 2"])
def test_ranks_call_through_our_workspace(size, more, tmp_path):
    ranks = run_ranks("flashinfer_ranks.py", size, tmp_path, "plain", *more)
    for ended in ranks:
        assert ended.status == 0 and all(f"{case} ended\n" in ended.text for case in ["plain", *more]), ended.text
    line = "fd_fusion: compiling the kernel of FlashInfer 0.7.2: some minutes, once on this machine"
    assert line in ranks[0].text
    assert not any(line in rank.text for rank in ranks[1:])
    loaded = [float((tmp_path / f"built{rank}").read_text()) for rank in range(size)]
    assert all(other > loaded[0] for other in loaded[1:]), "rank 0 builds first"


REFUSED = {
    "missing": "rank 1 refused: FlashInfer is not installed",
    "version": "rank 1 has FlashInfer 0.6.12, rank 0 has 0.7.2",
    "build": "rank 0 refused: FlashInfer 0.7.2 did not build its kernel, or it cannot be loaded: TypeError: no torch",
    "fill": "rank 1 refused: the workspace could not be opened: ZeroDivisionError",
    "offset": "FlashInfer 0.6.11 cannot add 1.0 to the norm's weight",
}


def test_one_odd_rank_refuses_for_all(tmp_path):
    for ended in run_ranks("flashinfer_ranks.py", 2, tmp_path, *(f"refused:{how}" for how in REFUSED)):
        for how, text in REFUSED.items():
            assert f"{how}, reason: {text}" in ended.text, (how, ended.text)
        assert ended.status == 0, ended.text


def test_a_missing_rank_ends_the_process_that_waits_for_it(tmp_path):
    waiting, missing = run_ranks("flashinfer_ranks.py", 2, tmp_path, "hang")
    assert waiting.status == EXIT_STATUS, waiting.text
    assert (
        "flashinfer all_reduce_rms_norm (H=128, float32) of group 'tp hang', rank 0 of 2, has waited" in waiting.text
    )
    assert "for 1 s" in waiting.text and missing.status == 0, missing.text
