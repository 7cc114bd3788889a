"""The provider of symmetric memory for GPU ranks: CUDA IPC, by the driver API alone.

The memory is our own `cuMemAlloc`, never a framework's pool: pools sub-allocate, or use virtual memory that has no
handle of this kind.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

from fd_fusion.comm.cuda_driver import CudaDriver, CudaError
from fd_fusion.comm.posix_shm import PosixShm

_BLOCK = 2 << 20  # smaller allocations share a block, and a handle exports the whole block
_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_PORTABLE_MAPPED = 3  # CU_MEMHOSTREGISTER_PORTABLE | _DEVICEMAP; CU_MEMHOSTALLOC_* are the same numbers


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * 64)]


class CudaIpc:
    """Allocate, export and open device memory in the calling thread's current context."""

    handle_bytes = ctypes.sizeof(_IpcHandle)
    free_waits_for_peers = True  # memory that a peer has mapped must not be freed

    def __init__(self) -> None:
        self._cuda, self._host = CudaDriver(), PosixShm()
        self.pages = self._host.pages

    def identity(self) -> dict[str, Any]:
        """Return whether this is a part of a GPU (MIG), which reaches no other one."""
        device, gpu, part = ctypes.c_int(), ctypes.create_string_buffer(16), ctypes.create_string_buffer(16)
        self._cuda.call("cuCtxGetDevice", ctypes.byref(device))
        self._cuda.call("cuDeviceGetUuid", gpu, device)
        self._cuda.call("cuDeviceGetUuid_v2", part, device)  # of the MIG instance, if this is one
        return {"mig": gpu.raw != part.raw}

    def multiprocessors(self) -> int:
        device, count = ctypes.c_int(), ctypes.c_int()
        self._cuda.call("cuCtxGetDevice", ctypes.byref(device))
        self._cuda.call("cuDeviceGetAttribute", ctypes.byref(count), _MULTIPROCESSOR_COUNT, device)
        return count.value

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """Allocate device memory, not cleared: its address in this process, and the handle by which peers open it."""
        address, handle = ctypes.c_uint64(), _IpcHandle()
        self._cuda.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(-(-nbytes // _BLOCK) * _BLOCK))
        try:
            self._cuda.call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        except CudaError:
            self._cuda.call("cuMemFree_v2", address)
            raise
        return address.value, bytes(handle)

    def open(self, handle: bytes, nbytes: int) -> int:
        """Map a peer's memory, with access over NVLink or PCIe where it lies on another GPU."""
        address = ctypes.c_uint64()
        got = _IpcHandle.from_buffer_copy(handle)
        self._cuda.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), got, _PEER_ACCESS)
        return address.value

    def opened_everywhere(self) -> None:
        """Do nothing: handles have no name to remove."""

    def close(self, address: int) -> None:
        self._cuda.call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def free(self, address: int) -> None:
        self._cuda.call("cuMemFree_v2", ctypes.c_uint64(address))
        self._cuda.drop_stream()

    def read(self, address: int, nbytes: int) -> bytes:
        data = ctypes.create_string_buffer(nbytes)
        self._cuda.read(address, nbytes, data)
        return data.raw

    def write(self, address: int, data: bytes) -> None:
        self._cuda.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))

    def fill(self, address: int, nbytes: int, byte: int = 0) -> None:
        self._cuda.call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(byte), ctypes.c_size_t(nbytes))

    def synchronize(self) -> None:
        self._cuda.call("cuCtxSynchronize")

    def host_page(self, nbytes: int) -> tuple[int, int]:
        """Pin cleared host memory that a kernel can write: its address for the host, and for the kernel.

        By a descriptor in `pages` a process beside this one can read the page. Where the system or the driver pins no
        such memory, the page is the driver's own, and no other process reads it.
        """
        try:
            return self._shared_page(nbytes)
        except (CudaError, OSError):
            host, device = ctypes.c_void_p(), ctypes.c_uint64()
            self._cuda.call("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(nbytes), _PORTABLE_MAPPED)
            self._cuda.call("cuMemHostGetDevicePointer_v2", ctypes.byref(device), host, 0)
            ctypes.memset(host, 0, nbytes)
            return host.value, device.value

    def _shared_page(self, nbytes: int) -> tuple[int, int]:
        nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages are pinned
        (host, _), device = self._host.host_page(nbytes), ctypes.c_uint64()
        try:
            size = ctypes.c_size_t(nbytes)
            self._cuda.call("cuMemHostRegister_v2", ctypes.c_void_p(host), size, _PORTABLE_MAPPED)
            self._cuda.call("cuMemHostGetDevicePointer_v2", ctypes.byref(device), ctypes.c_void_p(host), 0)
        except CudaError:
            self._host.free_host_page(host)
            raise
        return host, device.value

    def free_host_page(self, address: int) -> None:
        shared = address in self.pages
        self._cuda.call("cuMemHostUnregister" if shared else "cuMemFreeHost", ctypes.c_void_p(address))
        if shared:
            self._host.free_host_page(address)


def process_identity() -> dict[str, Any]:
    """Return the machine's boot and this process: ranks share the first, not the second."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return {"boot": boot, "pid": os.getpid()}
