"""Ctrl-C, SIGTERM and SIGHUP, around what starts processes and what ends them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that closes, as an exit, so that `finally` runs. What is ignored stays so."""
    with _handling(heard(signal.SIGTERM, signal.SIGHUP), lambda got, _: sys.exit(128 + got)):
        yield


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes while this block starts a process arrives after it, when the process has a name.

    Inside `Popen` it would leave a child that nobody can end. What is ignored stays ignored, by the child too.
    """
    came: list[int] = []
    try:
        with _handling(heard(*_ENDING), lambda got, _: came.append(got)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While cleaning up, a second Ctrl-C is ignored."""
    with _handling(_ENDING, signal.SIG_IGN):
        yield


def heard(*numbers: int) -> list[int]:
    """Those that are not ignored, as nohup has SIGHUP ignored."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def _handling(numbers: Iterable[int], handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
