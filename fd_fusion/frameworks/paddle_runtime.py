"""What Paddle gives us, behind plain functions: its version, its store, its device, its present caller.

A framework is imported when it is used: `import fd_fusion` must load neither Paddle nor Triton.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from fd_fusion.reasons import FusionError, Reason, because

MIN_PADDLE = (3, 3)
_logger = logging.getLogger("fd_fusion")


def require_paddle() -> Any:
    """Import Paddle. Raises FusionError when it is missing or older than 3.3."""
    try:
        import paddle
    except ImportError as error:
        raise FusionError(because("no_paddle", detail=str(error))) from None
    if refusal := too_old(paddle.__version__):
        raise FusionError(refusal)
    return paddle


def too_old(version: str) -> Reason | None:
    """Return the reason why this version of Paddle cannot be used, or None. Nightly builds have version 0.0.0."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    need = ".".join(map(str, MIN_PADDLE))
    return because("old_paddle", got=version, need=need) if (0, 0) != numbers < MIN_PADDLE else None


class TcpStore:
    """A second connection to the job's TCPStore, with a lock.

    A connection carries one request at a time, and Paddle uses its connection whenever it makes a communicator. A
    request of another thread over Paddle's connection in the same moment would mix up both answers.
    """

    def __init__(self, host: str, port: int, world_size: int, timeout_s: int):
        from paddle.base.core import TCPStore

        self._client = TCPStore(host, port, False, world_size, timeout_s)
        _send_at_once(port)
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self._client.set(key, value)

    def get(self, key: str) -> bytes:
        with self._lock:
            return self._client.get(key)

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            return self._client.add(key, amount)


def _send_at_once(port: int) -> None:
    """Send small packets of connections to `port` at once: a request then takes 0.1 ms, measured, and not 44 ms.

    Paddle's client writes a request in pieces, and each piece waits until the one before was acknowledged. The client
    does not expose its socket, so this process's sockets are searched. Where that fails, votes are slow.
    """
    folder = "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError):
            if not os.readlink(f"{folder}/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.getpeername()[1] == port:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def tcp_store() -> TcpStore | None:
    """Connect to the job's store, which Paddle's launcher or spawn announces; None where there is no job (yet)."""
    address = store_address(os.environ)
    size = os.environ.get("PADDLE_TRAINERS_NUM", "")
    try:
        return address and _connect(*address, int(size) if size.isdecimal() else 1)
    except (RuntimeError, ValueError, OSError) as error:  # no store is served at that address
        _logger.warning("fd_fusion: no store at %s:%s: %s", *address, error)
        return None


def store_address(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return host and port, found as `init_parallel_env` finds them; spawn sets none: the first rank's are used."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT", "")
    if not (host and port):
        first = environ.get("PADDLE_TRAINER_ENDPOINTS", "").partition(",")[0]
        host, _, port = (environ.get("PADDLE_MASTER") or first).rpartition(":")
    return (host, int(port)) if host and port.isdecimal() else None


@functools.cache
def _connect(host: str, port: int, world_size: int) -> TcpStore:
    return TcpStore(host, port, world_size, 30)


def caller_function() -> Callable[[], Hashable]:
    """Return a function that returns the caller: the thread, and on a GPU the current stream.

    The function is made once, since every eager forward calls it twice a pair.
    """
    if device_of()[0] == "cpu":
        return threading.get_ident
    import paddle

    stream = functools.partial(paddle._C._cuda_getCurrentRawStream, paddle.cuda.current_device())
    return lambda: (threading.get_ident(), stream())


def is_capturing() -> bool:
    """Return whether the current stream is being captured into a CUDA graph, or its state cannot be read."""
    if device_of()[0] == "cpu":
        return False
    import ctypes

    import paddle

    status, stream = ctypes.c_int(), paddle._C._cuda_getCurrentRawStream(paddle.cuda.current_device())
    code = ctypes.CDLL("libcuda.so.1").cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status))
    return bool(code or status.value)


def device_of() -> tuple[str, int | None]:
    """Return where Paddle puts new tensors: ("gpu", 90) for an sm_90 GPU, ("cpu", None) for a CPU."""
    import paddle

    if not (paddle.is_compiled_with_cuda() and paddle.device.get_device().startswith("gpu")):
        return "cpu", None
    major, minor = paddle.device.cuda.get_device_capability()
    return "gpu", 10 * major + minor
