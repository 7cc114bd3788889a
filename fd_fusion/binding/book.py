"""Which models are bound: each holds its own state, and this module keeps no model alive.

A state reaches the model's layers, and a layer may hold its model. A book that kept the state, even under a weak key,
would keep such a model for ever; a state that the model keeps is a cycle, which the garbage collector takes whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

_ATTRIBUTE = "_fd_fusion_state"


class Book:
    """model -> its state. A state must give None where it is copied or pickled: it belongs to this model alone.

    A state that reaches no layer (`reaches_layers`) is kept by the book, and leaves no trace in its model.
    """

    def __init__(self) -> None:
        self._states: weakref.WeakKeyDictionary[Any, Callable[[], Any]] = weakref.WeakKeyDictionary()

    def __setitem__(self, model: Any, state: Any) -> None:
        if state.reaches_layers:
            model.__dict__[_ATTRIBUTE] = state
            self._states[model] = weakref.ref(state)
        else:
            self._states[model] = lambda: state

    def get(self, model: Any, default: Any = None) -> Any:
        found = self._states.get(model)
        state = None if found is None else found()
        return default if state is None else state

    def pop(self, model: Any, default: Any = None) -> Any:
        state = self.get(model, default)
        if self._states.pop(model, None) is not None:
            model.__dict__.pop(_ATTRIBUTE, None)
        return state

    __delitem__ = pop

    def values(self) -> list[Any]:
        states = [found() for found in list(self._states.values())]
        return [state for state in states if state is not None]

    def __len__(self) -> int:
        return len(self.values())
