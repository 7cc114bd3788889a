"""Ctrl-C and SIGTERM, around what starts processes and what ends them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

_ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """SIGTERM as an exit, so that `finally` runs."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A signal that comes while this block starts a process arrives after it, when the process has a name.

    Inside `Popen` it would leave a child that nobody can end. What is ignored stays ignored, by the child too.
    """
    came: list[int] = []
    numbers = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda got, _: came.append(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """While cleaning up, a second Ctrl-C is ignored."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
