"""Attributes of layers, classes and modules: follow a dotted path; set one, and undo it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


def follow(start: Any, path: str) -> Any:
    """Return the attribute at a dotted path, or None where the path ends early."""
    for name in path.split("."):
        start = getattr(start, name, None)
        if start is None:
            return None
    return start


def set_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of this very instance, class or module. Returns the undo, which leaves no trace.

    A layer's own `__setattr__` is not called: it would register parameters and sublayers.
    """
    kind, before = type if isinstance(owner, type) else object, vars(owner).get(name, _ABSENT)
    kind.__setattr__(owner, name, value)

    def undo() -> None:
        if before is not _ABSENT:
            kind.__setattr__(owner, name, before)
        elif name in vars(owner):
            kind.__delattr__(owner, name)

    return undo


def undo_in_turn(undos: list[Callable[[], None]]) -> None:
    """Run each, the last first, and leave the list empty."""
    while undos:
        undos.pop()()
