"""The outputs of two forwards of a model, bit by bit, and where in it they part ways."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from fd_fusion.frameworks.tensors import dtype_name, numbers
from fd_fusion.reasons import Reason, because


def tensors_of(outputs: Any, *, inside: frozenset[int] = frozenset()) -> list[Any]:
    """Copy all tensors and arrays in lists, tuples, dicts and plain objects: a host may reuse the tensors.

    An iterator is not run: it would be used up. Of Python's numbers NaN alone counts: others may be times.
    Args: inside: the ids of what `outputs` is a part of: one that holds itself is gone through once.
    """
    if isinstance(outputs, np.ndarray):
        return [paddle.to_tensor(outputs, place="cpu")] if outputs.dtype.kind in "fiub" else []
    if hasattr(outputs, "dtype") and hasattr(outputs, "clone"):
        return [outputs.clone()]
    if isinstance(outputs, float | np.floating):
        return [paddle.to_tensor(float(outputs), place="cpu")] if outputs != outputs else []
    if id(outputs) in inside or isinstance(outputs, type):
        return []
    if isinstance(outputs, Mapping):
        parts = list(outputs.values())
    elif isinstance(outputs, list | tuple):
        parts = outputs
    else:
        parts = [*getattr(outputs, "__dict__", {}).values(), *_slots_of(outputs)]
    inside |= {id(outputs)}
    return [tensor for part in parts for tensor in tensors_of(part, inside=inside)]


def _slots_of(thing: Any) -> list[Any]:
    slots = [one.__dict__.get("__slots__", ()) for one in type(thing).__mro__]
    names = [name for own in slots for name in ([own] if isinstance(own, str) else own)]
    return [
        getattr(thing, name) for name in names if name not in ("__dict__", "__weakref__") and hasattr(thing, name)
    ]


NOT_COMPARED = object()  # what a host's example returns where a forward moves a state: no two can be compared


def nothing_shown(tensors: Sequence[Any]) -> Reason | None:
    """Return why outputs are no evidence, whatever others are compared with them, or None."""
    if all(0 in tensor.shape for tensor in tensors):
        return because("no_outputs")
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and 0 not in tensor.shape]
    if floating and len(floating) == len(tensors) and not any(map(_has_finite_row, floating)):
        return because("not_finite", what="the stock forward's output")
    return None


def _has_finite_row(tensor: Any) -> bool:
    values = numbers(tensor)
    return bool(np.isfinite(values.reshape(-1, values.shape[-1] if values.ndim else 1)).all(axis=-1).any())


def first_difference(got: Sequence[Any], want: Sequence[Any]) -> int | str | None:
    """Return the number of the first output that is not the same bits (NaN where NaN is), "count", or None."""
    if len(got) != len(want):
        return "count"
    return next((i for i, pair in enumerate(zip(got, want)) if not _same(*pair)), None)


def within_spread(got: Sequence[Any], want: Sequence[Any], again: Sequence[Any]) -> int | str | None:
    """Return the first output of `got` that is farther from `want` than twice what `again`, stock too, is."""
    for i, (ours, stock, second) in enumerate(zip(got, want, again)):
        if _same(ours, stock):
            continue
        flat = [numbers(one).reshape(1, -1) for one in (ours, stock, second)]
        if len({one.shape for one in flat}) != 1:
            return i
        if not relative_errors(flat[0], flat[1])[0] <= 2 * relative_errors(flat[2], flat[1])[0] < np.inf:
            return i
    return None if len(got) == len(want) == len(again) else "count"


class Trace:
    """The input and output of each pair's norm in a forward, by the pair's name: hashes of first and last row.

    With it a difference of the outputs is given the name of the first Site at which the forwards part.
    """

    def __init__(self, norms: Mapping[str, Any]):
        self._layers, self.norms = norms, {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        layers = {name: layer for name, layer in self._layers.items() if layer is not None}
        built = [(layer, layer.__dict__.get("_built")) for layer in layers.values()]  # a call with a hook sets it
        hooks = [
            layer.register_forward_post_hook(lambda _, inputs, outputs, name=name: self._add(name, inputs, outputs))
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, before in built:
                if before is not None:
                    layer.__dict__["_built"] = before

    def _add(self, name: str, inputs: Any, outputs: Any) -> None:
        first = outputs
        while isinstance(first, list | tuple):  # also the first of a norm that is quantised
            first = next(one for one in first if one is not None)
        first = first.view("uint8") if dtype_name(first) == "float8_e4m3fn" else first  # Paddle cuts no FP8
        self.norms.setdefault(name, (digest(inputs[0]) if inputs else None, digest(first)))

    def parts_at(self, other: Trace) -> str | None:
        """Return the first pair, in the order of the forward, whose norm gave something else in `other`."""
        theirs = other.norms
        return next((name for name, (_, out) in self.norms.items() if theirs.get(name, (0, out))[1] != out), None)


def digest(tensor: Any) -> str:
    """Hash the bits of the first and the last row."""
    flat = tensor.reshape([-1, tensor.shape[-1]])
    rows = [_bits(flat[i : i + 1] if i >= 0 else flat[i:]) for i in (0, -1)] if flat.shape[0] else []
    return hashlib.blake2b(b"".join(row.tobytes() for row in rows), digest_size=8).hexdigest()


def relative_errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Return ||got - want|| / ||want|| of each row, over finite values; inf where the others are not the same."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    odd = ~((finite == np.isfinite(got)) & (finite | (np.isnan(got) == np.isnan(want)))).all(axis=-1)
    with np.errstate(invalid="ignore"):
        difference = np.where(finite & np.isfinite(got), got - want, 0.0)
    size = np.linalg.norm(np.where(finite, want, 0.0), axis=-1)
    error = np.linalg.norm(difference, axis=-1)
    return np.where(odd, np.inf, np.where(error == 0, 0.0, error / np.maximum(size, np.finfo(np.float32).tiny)))


def _same(a: Any, b: Any) -> bool:
    if a.dtype != b.dtype or list(a.shape) != list(b.shape):
        return False
    ours, theirs = _bits(a), _bits(b)
    if ours.tobytes() == theirs.tobytes():
        return True
    if not a.is_floating_point():
        return False
    nan = np.isnan(numbers(a)), np.isnan(numbers(b))
    return bool((nan[0] == nan[1]).all() and (ours == theirs)[~nan[0]].all())


def _bits(tensor: Any) -> np.ndarray:
    values = np.ascontiguousarray(tensor.detach().numpy())
    return values.view(f"uint{8 * values.itemsize}") if values.dtype.kind == "f" else values
