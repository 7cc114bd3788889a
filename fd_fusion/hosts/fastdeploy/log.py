"""The log of fusion in a FastDeploy process: fd_fusion.log, under FD_LOG_DIR, by the host's own logger."""

from __future__ import annotations

import logging
import os
from typing import Any

from fd_fusion import __version__
from fd_fusion.reasons import Reason, because

logger = logging.getLogger("fd_fusion")
ENV_RUN = "FD_FUSION_RUN"  # the server of this process: `fd-fusion serve` sets it, and reads the lines with its mark


class _ToHost(logging.Handler):
    """Pass records on to the host's logger."""

    def __init__(self, target: logging.Logger):
        super().__init__()
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        self._target.handle(record)


def mark_of(run: str) -> str:
    """Return the end of every line of one server, in a log that several may share."""
    return f" [server {run}]"


def _mark(record: logging.LogRecord) -> bool:
    """Keep every record, and name its server at its end. Metrics stay a line that ends with JSON."""
    if (run := os.environ.get(ENV_RUN)) and not record.msg.startswith("fd_fusion metrics"):
        record.msg, record.args = record.getMessage() + mark_of(run), ()
    return True


def log_to_host() -> None:
    """Send this package's log to the host's too, once a process."""
    if any(isinstance(handler, _ToHost) for handler in logger.handlers):
        return
    logger.addFilter(_mark)  # a second time it is not added
    try:
        from fastdeploy.utils import get_logger

        target = get_logger("fd_fusion", "fd_fusion.log")
    except Exception as error:  # only the place of the log is lost
        path = f"fastdeploy.utils.get_logger ({type(error).__name__}: {error})"
        logger.warning("fd_fusion: this log goes to stderr: %s", because("symbol_moved", path=path))
        return
    if target is not logger:  # an older version gives out the logger of that very name
        logger.addHandler(_ToHost(target))
    logger.setLevel(logging.INFO)


def log_file() -> str:
    """Return the file in which the host's logger writes, or a link to it: for those who cannot use a logger."""
    return os.path.join(os.environ.get("FD_LOG_DIR", "log"), "fd_fusion.log")


def say_off(model: Any, reason: Reason) -> None:
    """Log one warning: this model runs as stock, and why."""
    logger.warning("fd_fusion %s: %s: off: %s", __version__, type(model).__name__, reason)


def unreadable(model: Any, error: Exception) -> Reason:
    """Return why a model of an unforeseen shape is off; the traceback goes to the log at debug level."""
    cls = type(model)
    logger.debug("fd_fusion: %s could not be read", cls.__name__, exc_info=error)
    return because("symbol_moved", path=f"{cls.__module__}.{cls.__name__} ({type(error).__name__}: {error})")
