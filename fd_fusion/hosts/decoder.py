"""Which layer of a model of this package's layers feeds which norm: by paths, by a `Decoder`, or by its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paddle import nn

from fd_fusion.layers.qk_rms_norm import QKRMSNorm
from fd_fusion.layers.rms_norm import RMSNorm
from fd_fusion.reasons import Reason, because


@dataclass(frozen=True)
class Decoder:
    """Where a decoder keeps the layers that make its pairs, for `bind(model, pairs=Decoder(...))`.

        attention   feeds   post_norm of the same layer
        mlp         feeds   input_norm of the next layer, and after the last layer final_norm

    `layers` and `final_norm` are paths from the model, the others from one of its layers. `attention` and `mlp` may
    name several paths: the first one that a layer has counts. A path leads to the layer that ends in the all-reduce,
    a `RowParallelLinear` or a block that ends in `reduce_or_hand_over`.
    """

    layers: str = "layers"
    attention: str | tuple[str, ...] = "self_attn.o_proj"
    post_norm: str = "post_attention_layernorm"
    mlp: str | tuple[str, ...] = ("mlp.down_proj", "mlp")
    input_norm: str = "input_layernorm"
    final_norm: str = "norm"

    def pairs(self) -> list[tuple[tuple[str, ...], str]]:
        """Return the same as patterns: {i} is every number, {i+1} the next, -1 the last."""
        every, following, last = (f"{self.layers}.{number}." for number in ("{i}", "{i+1}", "-1"))
        attention, mlp = map(_several, (self.attention, self.mlp))
        return [
            (tuple(every + path for path in attention), every + self.post_norm),
            (tuple(every + path for path in mlp), following + self.input_norm),
            (tuple(last + path for path in mlp), self.final_norm),
        ]


Pairs = Decoder | Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Link:
    """A pair as the structure shows it: `producer` (a layer) feeds `norm` (a layer)."""

    name: str
    producer: Any
    norm: Any


def named_links(model: Any, pairs: Pairs) -> list[Link]:
    """Return the pairs that were named. Raises ValueError: a path leads nowhere, or to a layer of another kind."""
    named = pairs.pairs() if isinstance(pairs, Decoder) else pairs
    for pair in named:
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not all(path and isinstance(path, str) for end in pair for path in _several(end)):
            raise ValueError(f"bind: pairs: {pair!r} is not (path of a layer that all-reduces, path of its norm)")
    return [link for producers, norm in named for link in _links_of(model, _several(producers), norm)]


def unnamed(model: Any, links: Sequence[Link]) -> list[str]:
    """Return the paths of the layers that all-reduce by themselves and stand in no pair."""
    named, (producers, _) = {id(link.producer) for link in links}, _producers_and_norms(model)
    return [path for path, layer in producers if layer.reduce_results and id(layer) not in named]


def links_by_order(model: Any) -> tuple[list[Link], Reason | None]:
    """Return the pairs of a model that names none, or why it is not clear which they are.

    A decoder of n layers that all-reduce has n + 1 norms of their width: each layer feeds the norm behind it, and the
    first norm reads the embedding. The orders in which the model defines the layers and the norms are taken for those
    in which they run. No forward is needed, and so no collective of the host that a rank could leave alone: where
    the guess is wrong, the proving pass, which votes, leaves the model stock.
    """
    producers, norms = _producers_and_norms(model)
    widths = {getattr(layer, "out_features", None) for _, layer in producers} - {None}
    norms = [(path, norm) for path, norm in norms if norm.hidden_size in widths or not widths]
    if producers and len(norms) != len(producers) + 1:
        counts = {"producers": len(producers), "norms": len(norms)}
        return [], because("unclear_pairs", model=type(model).__name__, **counts)
    ends = zip(producers, norms[1:])
    return [Link(f"{path} -> {other}", producer, norm) for (path, producer), (other, norm) in ends], None


def _producers_and_norms(model: Any) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Return (path, layer) of each, in the order of definition, without those inside a producer or a QKRMSNorm."""
    producers, norms, inside = [], [], ()
    for path, layer in model.named_sublayers():
        if path.startswith(inside):
            continue
        if is_producer(layer):
            producers.append((path, layer))
        elif isinstance(layer, RMSNorm):
            norms.append((path, layer))
        if is_producer(layer) or isinstance(layer, QKRMSNorm):
            inside += (f"{path}.",)
    return producers, norms


def is_producer(layer: Any) -> bool:
    """Return whether the layer can leave its reduction to a Site."""
    return all(hasattr(layer, name) for name in ("site", "group", "reduce_results"))


def _several(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return paths if isinstance(paths, tuple) else (paths,)


def _links_of(model: Any, producers: tuple[str, ...], norm: str) -> list[Link]:
    """Return the pairs of one pattern: a layer without a producer has none, and an error if no layer has one."""
    head, is_pattern, _ = f".{producers[0]}".partition(".{i}")
    holder = _at(model, head[1:], 0)[1] if head and is_pattern else model
    count = _count(holder) if is_pattern else 1
    links, is_found = [], False
    for number in range(count):
        found = [_at(model, path, number) for path in producers]
        end = next((end for end in found if is_producer(end[1])), None)
        is_found = is_found or end is not None
        if end is None or ("{i+1}" in norm and number + 1 == count):
            continue
        reader = _at(model, norm, number)
        if not isinstance(reader[1], RMSNorm):
            raise ValueError(_unfit(model, *reader, "an RMSNorm of this package"))
        links.append(Link(f"{end[0]} -> {reader[0]}", end[1], reader[1]))
    if not is_found:
        first = _at(model, producers[0], 0) if count else (producers[0], None)
        raise ValueError(_unfit(model, *first, "a RowParallelLinear, or a block that ends in reduce_or_hand_over"))
    return links


def _at(model: Any, path: str, number: int) -> tuple[str, Any]:
    """Return (the path with its numbers, the layer at that path or None)."""
    names, layer = [], model
    for name in path.replace("{i}", str(number)).replace("{i+1}", str(number + 1)).split("."):
        names.append(str(_count(layer) - 1) if name == "-1" else name)
        layer = getattr(layer, names[-1], None)
    return ".".join(names), layer


def _count(layer: Any) -> int:
    return len(list(layer.children())) if isinstance(layer, nn.Layer) else 0


def _unfit(model: Any, path: str, layer: Any, expected: str) -> str:
    """Describe what is wrong with a path, and which layers are there."""
    if layer is not None:
        return f"bind: pairs: {path!r} is of class {type(layer).__name__}, expected {expected}"
    holder, names = model, path.split(".")
    while (inner := getattr(holder, names[0], None)) is not None:
        holder, _ = inner, names.pop(0)
    has = ", ".join(name for name, _ in holder.named_children()) if isinstance(holder, nn.Layer) else "no layers"
    return f"bind: pairs: {path!r} is not in {type(model).__name__}: expected {names[0]!r} among {has}"
