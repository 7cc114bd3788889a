"""The proving pass in the place where it can run: at bind, or before the model's first eager forward."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from fd_fusion.binding.bound import Bound, give_up, logger
from fd_fusion.binding.forwards import ExampleOf, on_copies
from fd_fusion.binding.pairs import holders
from fd_fusion.binding.proving_pass import NOTHING_SHOWN, prove
from fd_fusion.binding.qk_norms import Kernel
from fd_fusion.frameworks.paddle_ops import is_eager
from fd_fusion.reasons import FusionError, Reason


def attach_and_prove(
    model: Any, state: Bound, example: Callable[[], Any] | None, example_of: ExampleOf | None
) -> None:
    """Run the proving pass now, or leave it to the first forward; install what is proven."""
    if not state.sites:
        state.undo += [norm.attach(Kernel(norm)) for norm in state.qk_norms]
        return
    state.undo.append(model.register_forward_pre_hook(state.forwards.start).remove)
    for layer in holders(model, [pair for pair, _ in state.sites]):
        state.undo.append(layer.register_forward_pre_hook(state.forwards.start_inside).remove)
    if example is None or not prove(model, state, example):
        _prove_in_first_forward(model, state, example_of or on_copies)


def _prove_in_first_forward(model: Any, state: Bound, example_of: ExampleOf) -> None:
    """Run the proving pass before the first eager forward, with its arguments; until then the model is stock.

    The forward that the caller asked for runs after the pass, once and on the caller's own arguments: bound if the
    pass proved it, else stock. So a miss is never an error of a request, whose output is right either way.
    """
    armed, stock, own, this = [True], model.forward, model.__dict__.get("forward"), weakref.ref(model)

    def prove_now(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            if prove(this(), state, example_of(stock, args, kwargs), first_forward=True):
                disarm()
        except BaseException as error:  # one that `strict` asks for, or no vote any more: undo it all
            give_up(state, error)
            if state.report.off.root.code == "out_of_step":
                state.undo.append(_stop(this(), own, state.report.off))
            raise
        state.report.log(logger)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_eager() and own is None:  # nothing that would break the graph, a copy's neither
            return type(self).forward(self, *args, **kwargs)
        if self is not this():  # a copy of the model: it has no Site
            return type(self).forward(self, *args, **kwargs)
        if armed[0] and is_eager() and _is_turn(state):
            prove_now(args, kwargs)
        return stock(*args, **kwargs)

    def disarm() -> None:
        was_armed, kept, armed[0] = armed[0], this(), False
        if was_armed and kept is not None and getattr(kept.__dict__.get("forward"), "__func__", None) is code():
            _give_back(kept, own)

    # Nothing that the state holds may keep the model alive.
    forward.__wrapped__, forward.binds_at_first_call, code = stock, True, weakref.ref(forward)
    forward.__signature__ = _with_self(stock)
    model.__dict__["forward"] = types.MethodType(forward, model)
    state.undo.append(disarm)


def _is_turn(state: Bound) -> bool:
    """Return whether this eager forward is tried: after one that showed nothing the 1st, 2nd, 4th, 8th ... is.

    A pass costs two forwards, and a layer may be zero for good. All ranks count the same forwards.
    """
    waiting = state.report.waiting
    if waiting is None or waiting.root.code not in NOTHING_SHOWN:
        return True
    state.since += 1
    return state.since & (state.since - 1) == 0


def _with_self(stock: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of the function behind a model's forward: to_static reads argument names off it."""
    signature = inspect.signature(stock)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[own, *signature.parameters.values()])


def _stop(model: Any, own: Any, reason: Reason) -> Callable[[], None]:
    """Make every forward of the model raise until it is unbound: its sums would be wrong. Returns the undo."""

    def forward(*_: Any, **__: Any) -> NoReturn:
        raise FusionError(reason)

    def undo() -> None:
        if (kept := this()) is not None and kept.__dict__.get("forward") is forward:
            _give_back(kept, own)

    this = weakref.ref(model)
    model.__dict__["forward"] = forward
    return undo


def _give_back(model: Any, own: Any) -> None:
    """Put back the forward that the instance had of its own, if it had one."""
    del model.__dict__["forward"]
    if own is not None:
        model.__dict__["forward"] = own
