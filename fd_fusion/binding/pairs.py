"""Which (producer, norm) pairs a decoder has: read off the structure of the built model, by a table.

Nothing is guessed from prefixes or weight names. A decoder class that is not in the table has no pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fd_fusion.binding.attributes import follow
from fd_fusion.comm.group import Group
from fd_fusion.reasons import because
from fd_fusion.site import Rejected, Stock


@dataclass(frozen=True)
class Decoder:
    """Where a decoder class keeps what its pairs are made of: paths of attributes.

    In each layer the attention's output projection feeds `post_norm`. The MLP feeds the `input_norm` of the next
    layer, and in the last layer `final_norm`. A first `input_norm` reads the embedding: it has no pair.
    """

    layers: str = "layers"
    attention: str = "self_attn.o_proj"
    post_norm: str = "post_attention_layernorm"
    mlp: tuple[str, ...] = ("mlp.down_proj", "mlp")  # the first one that is there
    input_norm: str = "input_layernorm"
    final_norm: str = "norm"


@dataclass(frozen=True)
class Link:
    """A pair as the structure shows it: `producer` (a layer) feeds `norm` (a layer)."""

    name: str
    producer: Any
    norm: Any


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

    @property
    def eps(self) -> float:
        return self.stock.numbers()[0]

    @property
    def weight_offset(self) -> float:
        return self.stock.numbers()[1]

    @property
    def hooks(self) -> tuple[Any, ...]:
        """The hooks that would see a partial sum: after the producer, and before the norm."""
        hooks = (self.producer, "_forward_post_hooks"), (self.reader, "_forward_pre_hooks")
        return tuple(getattr(layer, name) for layer, name in hooks if layer is not None)


def holders(model: Any, pairs: Sequence[Pair]) -> list[Any]:
    """The layers inside `model` that hold both ends of every pair: a forward may be started at any of them."""
    ends = {id(end) for pair in pairs for end in (pair.producer, pair.reader)}
    return [layer for layer in model.sublayers() if ends <= {id(part) for part in layer.sublayers()}]


def without_hooked(pairs: Sequence[Pair | Rejected]) -> list[Pair | Rejected]:
    """The pairs; one that has a hook between its ends is rejected, and the layer with the hook named."""

    def hooked(pair: Pair | Rejected) -> bool:
        return isinstance(pair, Pair) and any(pair.hooks)

    return [Rejected(pair.name, because("hooked", layer=pair.name)) if hooked(pair) else pair for pair in pairs]


TABLE: dict[str, Decoder] = {"DemoDecoder": Decoder()}


def find_links(model: Any, table: Mapping[str, Decoder] = TABLE) -> list[Link]:
    """Every link of every known decoder inside `model`, in the order of the forward pass.

    A layer that lacks one of the attributes gives no link there; `model` is not changed.
    """
    links = []
    for prefix, part in model.named_sublayers(include_self=True):
        decoder = table.get(type(part).__name__)
        if decoder is not None:
            links += _links_of(part, decoder, f"{prefix}." if prefix else "")
    return links


def _links_of(part: Any, decoder: Decoder, prefix: str) -> list[Link]:
    links = []
    layers = list(follow(part, decoder.layers) or ())
    for i, layer in enumerate(layers):
        here = f"{prefix}{decoder.layers}.{i}."
        _add(links, here, layer, (decoder.attention,), here + decoder.post_norm, follow(layer, decoder.post_norm))
        if i + 1 < len(layers):
            path = f"{prefix}{decoder.layers}.{i + 1}.{decoder.input_norm}"
            _add(links, here, layer, decoder.mlp, path, follow(layers[i + 1], decoder.input_norm))
        else:
            path = prefix + decoder.final_norm
            _add(links, here, layer, decoder.mlp, path, follow(part, decoder.final_norm))
    return links


def _add(links: list[Link], here: str, layer: Any, producers: tuple[str, ...], norm_path: str, norm: Any) -> None:
    for path in producers:
        producer = follow(layer, path)
        if producer is not None and norm is not None:
            links.append(Link(f"{here}{path} -> {norm_path}", producer, norm))
            return
