"""The CUDA driver through ctypes: a dozen functions with stable names.

The `cuda-bindings` package would be one more thing to install beside the host, whose only install command is
`pip install --no-deps .`.
"""

from __future__ import annotations

import ctypes
from typing import Any

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class CudaError(RuntimeError):
    """A call of the CUDA driver failed: its name and the driver's name for the error."""


class CudaDriver:
    """Call the driver in the context that was current when this object was made, from any thread.

    Raises: CudaError: there is no driver or no context, or a call failed.
    """

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"the CUDA driver cannot be loaded: {error}") from error
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuCtxGetCurrent", ctypes.byref(self._context))
        if not self._context:
            raise CudaError("no CUDA context is current: put a tensor on the GPU first")

    def call(self, name: str, *args: Any) -> None:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            self._call(name, *args)
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def make_stream(self) -> None:
        """Make the stream of `read`, which is this object's own, so that a read waits for no kernel."""
        if not self._stream:
            self.call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)

    def drop_stream(self) -> None:
        if self._stream:
            self.call("cuStreamDestroy_v2", self._stream)
            self._stream = ctypes.c_void_p()

    def read(self, address: int, nbytes: int, into: Any) -> None:
        """Copy device memory to the host memory `into`, while kernels run and other threads capture graphs.

        A capture in global mode, of any thread, ends with an error when a thread that is not in relaxed mode waits
        for a stream. No capture concerns the stream of `read`, so this thread is in relaxed mode meanwhile.
        """
        mode = ctypes.c_int(_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            self.make_stream()
            self.call("cuMemcpyDtoHAsync_v2", into, ctypes.c_uint64(address), ctypes.c_size_t(nbytes), self._stream)
            self.call("cuStreamSynchronize", self._stream)
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._lib, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or str(code).encode()).decode()}")
