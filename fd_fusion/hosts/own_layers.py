"""Pairs of this package's own layers: a producer with `site`, `group` and `reduce_results`, and our `RMSNorm`."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from fd_fusion.binding.attributes import set_attribute, undo_in_turn
from fd_fusion.binding.pairs import Link, Pair, find_links
from fd_fusion.binding.qk_norms import QKNorm
from fd_fusion.frameworks import paddle_ops
from fd_fusion.frameworks.tensors import dtype_name
from fd_fusion.layers.qk_rms_norm import QKRMSNorm
from fd_fusion.layers.rms_norm import RMSNorm
from fd_fusion.reasons import because
from fd_fusion.site import Rejected, Site


def find_pairs(model: Any) -> list[Pair | Rejected]:
    """The pairs of `model` whose both ends are layers of this package."""
    return [_pair(link) for link in find_links(model) if isinstance(link.norm, RMSNorm) and _is_producer(link)]


def _is_producer(link: Link) -> bool:
    return all(hasattr(link.producer, name) for name in ("site", "group", "reduce_results"))


def _pair(link: Link) -> Pair | Rejected:
    inner = [layer for layer in link.producer.sublayers(include_self=True) if hasattr(layer, "group")]
    groups = {paddle_ops.group_of(layer.group).ranks for layer in inner}
    if len(groups) > 1:
        return Rejected(link.name, because("groups_differ", groups=sorted(map(list, groups))))
    if not link.producer.reduce_results:
        return Rejected(link.name, because("not_reduced", producer=link.name.partition(" -> ")[0]))
    reducing = [name for name, layer in link.producer.named_sublayers() if getattr(layer, "reduce_results", False)]
    if reducing:
        spec = {"inner": reducing[0], "producer": link.name.partition(" -> ")[0]}
        return Rejected(link.name, because("reduced_inside", **spec))
    norm = link.norm
    return Pair(
        name=link.name,
        group=paddle_ops.group_of(link.producer.group),
        hidden_size=norm.hidden_size,
        dtype=_partial_dtype(link.producer),
        weight_dtype=dtype_name(norm.weight),
        stock=OwnStock(link.producer, norm),
        producer=link.producer,
        reader=norm,
    )


class OwnStock:
    """What this package's layers do without a Site; `site.Stock` says what is asked of it."""

    def __init__(self, producer: Any, norm: RMSNorm):
        self._producer, self._norm, self.norm = producer, norm, norm.stock_forward

    def reduce(self, partial: Any) -> Any:
        return paddle_ops.all_reduce(partial, self._producer.group)

    def weight(self) -> Any:
        return self._norm.weight

    def numbers(self) -> tuple[float, float]:
        return self._norm.eps, self._norm.weight_offset

    def attach(self, site: Site) -> Callable[[], None]:
        """As a plain attribute of the instance."""
        undo = [set_attribute(end, "site", site) for end in (self._producer, self._norm)]
        return functools.partial(undo_in_turn, undo)


def _partial_dtype(producer: Any) -> str:
    """Of what is handed over: the dtype of the row-parallel layers, since a product has that of its weight. A block
    without any is taken by most of its numbers: its experts, not a router or a scale in float32 beside them.
    """
    elements: Counter[str] = Counter()
    for layer in producer.sublayers(include_self=True):
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "reduce_results") and weight is not None:
            elements[dtype_name(weight)] += math.prod(weight.shape)
    if not elements:
        for parameter in producer.parameters():
            elements[dtype_name(parameter)] += math.prod(parameter.shape)
    return elements.most_common(1)[0][0]


def find_qk_norms(model: Any) -> list[QKNorm]:
    """Every `QKRMSNorm` of `model`."""
    layers = model.named_sublayers(include_self=True)
    return [_qk_norm(name, layer) for name, layer in layers if isinstance(layer, QKRMSNorm)]


def _qk_norm(name: str, layer: QKRMSNorm) -> QKNorm:
    return QKNorm(
        name=name,
        q_heads=layer.q_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        width=(layer.q_heads + 2 * layer.kv_heads) * layer.head_dim,
        eps=layer.eps,
        weight_offset=layer.q_norm.weight_offset,
        weights=lambda: (layer.q_norm.weight, layer.k_norm.weight),
        stock=layer.stock_forward,
        attach=lambda kernel: set_attribute(layer, "kernel", kernel),
        numbers=lambda: (layer.eps, layer.q_norm.weight_offset),
    )
