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
    """Exit on SIGTERM, and on SIGHUP of a terminal that closes, so that `finally` runs; what is ignored stays so."""
    with _handling(not_ignored(signal.SIGTERM, signal.SIGHUP), lambda got, _: sys.exit(128 + got)):
        yield


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back a signal until this block has started a process, which then has a name.

    A signal inside `Popen` would leave a child that no one ends. What is ignored stays ignored, by the child too.
    """
    came: list[int] = []
    try:
        with _handling(not_ignored(*_ENDING), lambda got, _: came.append(got)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C while cleaning up."""
    with _handling(_ENDING, signal.SIG_IGN):
        yield


def not_ignored(*numbers: int) -> list[int]:
    """Return the signals that are not ignored, as nohup has SIGHUP ignored."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def _handling(numbers: Iterable[int], handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
