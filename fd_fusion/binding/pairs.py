"""A (producer, norm) pair of a built model, as its host gives it to `bind`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fd_fusion.comm.group import Group
from fd_fusion.reasons import Reason, because
from fd_fusion.site import Rejected, Stock
from fd_fusion.spec import Fp8


@dataclass(frozen=True)
class Pair:
    """A (producer, norm) pair of a built model. `group` owns the reduction of the producer.

    `stock` is the host's own way; `producer` and `reader` are the layers at the two ends.
    """

    name: str
    group: Group
    hidden_size: int
    dtype: str
    weight_dtype: str
    stock: Stock
    producer: Any = None
    reader: Any = None
    fp8: Fp8 | Reason | None = None  # how the norm is quantised too, if it is; or why that is left to what reads it

    @property
    def eps(self) -> float:
        return self.stock.numbers()[0]

    @property
    def weight_offset(self) -> float:
        return self.stock.numbers()[1]

    @property
    def hooks(self) -> tuple[Any, ...]:
        """Return the hooks that would get a partial sum: after the producer, and before the norm."""
        hooks = (self.producer, "_forward_post_hooks"), (self.reader, "_forward_pre_hooks")
        return tuple(getattr(layer, name) for layer, name in hooks if layer is not None)


def holders(model: Any, pairs: Sequence[Pair]) -> list[Any]:
    """Return the layers inside `model` that hold both ends of every pair: a forward may be started at any of them."""
    ends = {id(end) for pair in pairs for end in (pair.producer, pair.reader)}
    return [layer for layer in model.sublayers() if ends <= {id(part) for part in layer.sublayers()}]


def without_hooked(pairs: Sequence[Pair | Rejected]) -> list[Pair | Rejected]:
    """Reject each pair that has a hook between its ends, with the layer's name; return the others as they are."""

    def hooked(pair: Pair | Rejected) -> bool:
        return isinstance(pair, Pair) and any(pair.hooks)

    return [Rejected(pair.name, because("hooked", layer=pair.name)) if hooked(pair) else pair for pair in pairs]
