"""Symmetric memory between real processes, over POSIX shared memory; tests/gpu tests the CUDA provider."""

import ctypes
import os
import subprocess
import sys

import pytest

from fd_fusion.comm import cuda_driver, cuda_ipc, posix_shm
from fd_fusion.comm.group import Group
from fd_fusion.comm.symmetric_memory import _unreachable
from tests.support.fake_driver import count_calls
from tests.support.ranks import run_ranks


@pytest.fixture
def segments(tmp_path, monkeypatch):
    """Shared memory of this test alone: a function that lists what is in it."""
    monkeypatch.setattr(posix_shm, "FOLDER", tmp_path)
    return lambda: {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_reaches_every_buffer(size):
    for ended in run_ranks("memory.py", size, "plain"):
        assert ended.status == 0, ended.text
        assert "opened" in ended.text


@pytest.mark.parametrize(
    "what, expected",
    [
        (
            "full",
            "rank 1 refused: the workspace could not be opened: OSError: [Errno 28] No space left on device",
        ),
        ("full_device", "rank 1 refused: the workspace could not be opened: OSError: [Errno 28]"),
        ("nameless", "rank 1 refused: the workspace could not be opened: FileNotFoundError"),
        ("lossy", "what rank 1 stored into this rank's memory did not arrive"),
        ("lossy_device", "what rank 1 stored into this rank's memory did not arrive"),
        ("killed", "rank 1 never voted"),
    ],
)
def test_all_ranks_end_alike_and_leave_nothing(what, expected):
    ended = run_ranks("memory.py", 2, what)
    alive = ended[:1] if what == "killed" else ended
    for rank in alive:
        assert rank.status == 0, rank.text
        assert expected in rank.text


def test_a_segment_of_a_crashed_run_disturbs_nobody_and_is_removed(segments, tmp_path):
    ended = run_ranks("memory.py", 2, "killed_named", shm=tmp_path)
    assert "rank 1 never voted" in ended[0].text, ended[0].text
    left = segments()
    assert len(left) == 1, "rank 1 died with its segment's name in place"
    provider = posix_shm.PosixShm()
    own, _ = provider.allocate(4096)
    assert len(segments() - left) == 1 and not left & segments()
    posix_shm.remove_left()
    assert segments(), "a segment whose creator is alive stays"
    provider.free(own)
    assert not segments()


def test_a_segment_is_locked_before_it_has_its_name(segments, monkeypatch):
    """Another run that cleans up while its creator is held up in between must not take it for one that was left."""
    lock, others = posix_shm.fcntl.flock, []

    def late(fd, how):
        if how == posix_shm.fcntl.LOCK_EX:
            others.append(segments())
            posix_shm.remove_left()
        lock(fd, how)

    monkeypatch.setattr(posix_shm.fcntl, "flock", late)
    provider = posix_shm.PosixShm()
    own, token = provider.allocate(4096)
    assert len(others) == 1 and segments() == {posix_shm._path(token).name}
    provider.free(own)
    assert not segments()


def test_only_what_this_run_left_is_removed(segments, monkeypatch):
    """Not what is older, and not what may still be on its way to its name."""
    for hidden in (False, True):
        posix_shm._path(bytes(16), hidden=hidden).touch()
    old = posix_shm._path(bytes(16)).stat().st_ctime
    posix_shm.remove_left(old + 60)
    assert len(segments()) == 2
    posix_shm.remove_left(old)
    assert len(segments()) == 1
    monkeypatch.setattr(posix_shm, "_YOUNG_S", 0)
    posix_shm.remove_left()
    assert not segments()


def test_a_full_shared_memory_is_an_error_at_allocation(segments):
    provider = posix_shm.PosixShm()
    with pytest.raises(OSError):
        provider.allocate(1 << 50)
    assert not segments()


def test_a_foreign_or_shorter_segment_is_not_mapped(segments):
    provider = posix_shm.PosixShm()
    address, token = provider.allocate(8192)
    with pytest.raises(OSError, match="announced"):
        posix_shm.PosixShm().open(token, 4096)
    link = bytes(16)
    posix_shm._path(link).symlink_to(posix_shm._path(token))
    with pytest.raises(OSError):
        posix_shm.PosixShm().open(link, 8192)
    assert oct(posix_shm._path(token).stat().st_mode)[-3:] == "600"
    provider.free(address)


def test_ranks_that_cannot_share_memory_are_told_why():
    group = Group("g", 0, 2, (0, 1), None)
    one = {"boot": "a", "pid": 1, "nbytes": 64, "mig": False}

    def reason(**changes):
        refusal = _unreachable(({**one}, {**one, "pid": 2, **changes}), group)
        return refusal.code if refusal else None

    assert reason() is None
    assert reason(boot="b") == "other_machine"
    assert reason(mig=True) == "mig"
    assert reason(pid=1) == "same_pid"
    assert reason(nbytes=65) == "structure_differs"


def test_no_driver_or_no_context_is_a_reason_not_a_crash():
    code = "from fd_fusion.comm.cuda_ipc import *\ntry: CudaIpc()\nexcept CudaError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert cuda_ipc.CudaIpc.handle_bytes == 64


def test_the_cuda_provider_gives_back_what_it_took(monkeypatch):
    """Over a driver that only counts: what is made, opened or pushed, and what is undone."""
    calls = count_calls(monkeypatch)
    provider = cuda_ipc.CudaIpc()
    for _ in range(2):
        address, handle = provider.allocate(5)
        peer = provider.open(handle, 5)
        assert provider.read(address, 4) == provider.read(address, 4) == bytes(4)
        provider.close(peer)
        provider.free(address)
    assert calls["cuStreamCreate"] == 2
    for made, undone in (
        ("cuMemAlloc_v2", "cuMemFree_v2"),
        ("cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle"),
        ("cuStreamCreate", "cuStreamDestroy_v2"),
        ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"),
    ):
        assert calls[made] == calls[undone] > 0, calls


def test_another_process_sees_the_host_page():
    provider = posix_shm.PosixShm()
    host, _ = provider.host_page(4096)
    fd = provider.pages[host]
    ctypes.memset(host, 7, 3)
    code = f"import mmap; print(mmap.mmap({fd}, 4096)[:4].hex())"
    seen = subprocess.run([sys.executable, "-c", code], pass_fds=[fd], capture_output=True, text=True, check=True)
    assert seen.stdout == "07070700\n"
    provider.free_host_page(host)
    assert not provider.pages


def test_the_host_page_is_cleared_and_writable():
    provider = posix_shm.PosixShm()
    host, kernel = provider.host_page(4096)
    assert ctypes.string_at(kernel, 4096) == bytes(4096)
    provider.write(kernel, b"x")
    assert provider.read(host, 1) == b"x"
    provider.free_host_page(host)


@pytest.mark.parametrize("refuses", [None, "cuMemHostRegister_v2"])
def test_the_host_page_of_a_gpu_is_shared_or_the_driver_s_own(monkeypatch, refuses):
    """The calls of the driver for each, and that all is given back. Nobody else reads a page of the driver."""
    calls, own = [], ctypes.create_string_buffer(b"x" * 4096, 4096)

    def call(self, name, *args):
        calls.append(name)
        if name == refuses:
            raise cuda_ipc.CudaError(f"{name}: no")
        if name == "cuMemHostAlloc":
            args[0]._obj.value = ctypes.addressof(own)
        if name == "cuMemHostGetDevicePointer_v2":
            args[0]._obj.value = 1 << 40

    monkeypatch.setattr(cuda_driver.CudaDriver, "_call", call)
    provider, provider._cuda = object.__new__(cuda_ipc.CudaIpc), object.__new__(cuda_driver.CudaDriver)
    provider._host, provider._cuda._context = posix_shm.PosixShm(), ctypes.c_void_p()
    provider.pages = provider._host.pages
    host, device = provider.host_page(64)
    assert device == 1 << 40 and ctypes.string_at(host, 64) == bytes(64)
    assert (host in provider.pages) == (refuses is None)
    descriptors = list(provider.pages.values())
    provider.free_host_page(host)
    freed = "cuMemHostUnregister" if refuses is None else "cuMemFreeHost"
    assert freed in calls and not provider.pages and not provider._host._maps
    for fd in descriptors:
        with pytest.raises(OSError):
            os.fstat(fd)
    assert calls.count("cuCtxPushCurrent_v2") == calls.count("cuCtxPopCurrent_v2")


def test_a_read_ends_no_capture_of_another_thread(monkeypatch):
    """In global mode a capture fails when another thread waits for a stream, unless that one is in relaxed mode."""
    calls = count_calls(monkeypatch)
    provider = cuda_ipc.CudaIpc()
    address, _ = provider.allocate(5)
    provider.read(address, 4)
    assert calls.modes["cuMemAlloc_v2"] == calls.mode == 1, "the mode of this thread is its own again"
    assert {calls.modes[name] for name in ("cuStreamCreate", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize")} == {2}
    calls.refused["cuStreamSynchronize"] = 700
    with pytest.raises(cuda_ipc.CudaError):
        provider.read(address, 4)
    assert calls.mode == 1
