"""What the commands print: a result as JSON that every reader takes; all else on stderr, behind one prefix."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_SILENT_S = 2.0


def say(text: object, code: int = 0) -> int:
    """Print a message. Returns `code`, for `return say(...)` of a command that fails."""
    print(f"fd_fusion: {str(text).removeprefix('fd_fusion: ')}", file=sys.stderr, flush=True)
    return code


class Parser(argparse.ArgumentParser):
    """Parse the arguments of a command; what is wrong with them is one message, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        sys.exit(say(f"{message}; `{self.prog} --help` lists the options", 2))

    def add_json(self) -> None:
        self.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")


def to_json(data: Any, indent: int | None = None) -> str:
    """Return `data` as JSON text; a float that is no finite number is null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextlib.contextmanager
def progress_line(text: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal, after two seconds, what the block does. Yields a function that sets the text."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    texts, ended = [text], threading.Event()

    def show() -> None:
        wait_s = _SILENT_S
        while not ended.wait(wait_s):
            print(f"\r\x1b[Kfd_fusion: {texts[-1]}", end="", file=sys.stderr, flush=True)
            wait_s = 0.5
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield texts.append
    finally:
        ended.set()
        thread.join()
