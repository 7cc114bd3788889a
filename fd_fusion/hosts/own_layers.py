"""`fd_fusion.bind`, for a model of this package's own layers: its pairs, its q and k norms, its config."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from fd_fusion.binding import bind as binding
from fd_fusion.binding.attributes import set_attribute, undo_in_turn
from fd_fusion.binding.pairs import Pair
from fd_fusion.binding.qk_norms import QKNorm
from fd_fusion.binding.report import Report
from fd_fusion.config import FusionConfig, Resolved, resolve
from fd_fusion.frameworks import paddle_ops
from fd_fusion.frameworks.tensors import dtype_name
from fd_fusion.hosts.decoder import Link, Pairs, links_by_order, named_links, unnamed
from fd_fusion.layers.qk_rms_norm import QKRMSNorm
from fd_fusion.layers.rms_norm import RMSNorm
from fd_fusion.reasons import because
from fd_fusion.site import Rejected, Site


def bind(
    model: Any,
    config: FusionConfig | Mapping[str, Any] | str | None = None,
    *,
    pairs: Pairs | None = None,
    example: Callable[[], Any] | None = None,
    deterministic: bool = False,
    source: str = "an argument",
) -> Report:
    """Collective: fuse each all-reduce of `model` with the residual add and the RMSNorm behind it.

    Every rank calls `bind` with the same arguments. The model's class and its attributes may have any names; the
    model is made of:
    - layers that end in an all-reduce: `RowParallelLinear`, or a block with `site = None`, `group` and
      `reduce_results` whose forward ends in `fd_fusion.layers.reduce_or_hand_over`;
    - `RMSNorm`, called with the very tensor that such a layer returned, and which no other layer or line reads;
    - `QKRMSNorm`, which needs no pair.

    Which layer feeds which norm, by dotted paths: {i} is every number at its place, {i+1} the next one, -1 the last:
        bind(model, pairs=[("blocks.{i}.attn.out", "blocks.{i}.norm2"),
                           ("blocks.{i}.ffn.down", "blocks.{i+1}.norm1"),
                           ("blocks.-1.ffn.down", "last_norm")])
    or by a `Decoder`, which gives each role its path. With neither, n such layers and n + 1 norms of their width are
    paired in the order in which the model defines them. The proving pass finds a wrong pair: the model stays stock,
    or, with a named backend or under `strict`, `bind` raises BindError.

    Nothing is fused before a proving pass, in eager mode, has shown on all ranks:
    1. Data flow: with the hand-overs in place, nothing fused, and NaN in every tensor that was handed over, the
       model's outputs are the bits of a stock forward. Where two stock forwards differ from each other they are
       within twice that, and the report has a `spread`. What does not reach an output is not compared.
    2. Kernel: every variant that can be launched gave known answers at open (`paddle` has no kernel of its own). At
       each Site, with and without the residual, the fused call gives the same sums as the host on exact integers, and
       norms within roundings of the host's; and on up to four rows of the real partial sums, at sixteen columns, the
       contract's bits (FlashInfer: within six standard deviations of independent roundings), and norms within a
       rounding of their own sums.
    3. Where two-shot serves more than two ranks: with NaN in each residual that the next norm takes as that very
       tensor, and that norm going on from the whole one, the outputs are still the stock forward's bits, no norm
       gives more NaN, no hook gets such a residual, none is kept, and no layer's buffer holds NaN of it. Then
       two-shot leaves these residuals with the owners of their rows; all others, and all of the model otherwise, it
       sends back. A branch that the pass did not take must not read a residual.
    The pass holds for the inputs and weights of that forward. Zero sums, no rows, no finite row, or no output tensor
    prove nothing: the model stays stock, and the 1st, 2nd, 4th, 8th ... eager forward after the pass is tried (under
    `strict` the fourth pass in vain is an error). Where the first forward raises, or a rank misses the vote before
    it, up to three forwards are tried in all.

    Args:
        model: a built `paddle.nn.Layer`, its weights loaded.
        config: asks for fusion; without it the config that the layers carry, or the environment's, counts.
        pairs: see above.
        example: runs a forward of two rows and returns the model's outputs, the same input on all ranks. `bind` runs
            the example twice, a third time if the outputs are not the same bits, and once more for 3. Without one,
            the pass runs before the model's first eager forward, on copies of the arguments of that forward: give an
            example where they hold large caches, or where a forward changes the model.
        deterministic: every number of rows must give the same bits.
        source: where `config` comes from, for the log.
    Returns: the report. Binding twice with one config returns the first report, unless something failed: then it is
        tried again.
    Raises: ValueError: a malformed config, or a path in `pairs` that leads to no such layer. BindError: something is
        off that `strict`, or a named backend, insists on; on all ranks alike. FusionError (`out_of_step`): a rank
        left a forward of the pass where others went on; on all ranks, by the first forward where there is no
        example. Restart the ranks.
    """
    resolved = _resolve(model, config, source)
    found, qk_norms = [], []
    if resolved.config is not None:
        found, qk_norms = find_pairs(model, pairs), find_qk_norms(model)
    more = {"example": example, "deterministic": deterministic}
    return binding.bind(model, found, qk_norms, resolved, **more, freezes_itself=True)


def _resolve(model: Any, config: Any, source: str) -> Resolved:
    """Return the config that wins; the layers' own one where none is given."""
    if config is None:
        carried = {
            layer.fusion_config: None
            for layer in model.sublayers(include_self=True)
            if getattr(layer, "fusion_config", None) is not None
        }
        if len(carried) > 1:
            first, second = list(carried)[:2]
            raise ValueError(str(because("two_configs", first=first, second=second)))
        config, source = next(iter(carried), None), "the model's layers"
    return resolve(config, explicit_source=source)


def find_pairs(model: Any, pairs: Pairs | None = None) -> list[Pair | Rejected]:
    """Return the pairs that were named, or that the order of the model's layers shows."""
    if pairs is not None:
        links = named_links(model, pairs)
        left = [Rejected(path, because("unnamed", layer=path)) for path in unnamed(model, links)]
        return [*map(_pair, links), *left]
    links, unclear = links_by_order(model)
    return [Rejected(type(model).__name__, unclear)] if unclear else [_pair(link) for link in links]


def _pair(link: Link) -> Pair | Rejected:
    inner = [layer for layer in link.producer.sublayers(include_self=True) if hasattr(layer, "group")]
    groups = {paddle_ops.group_of(layer.group).ranks for layer in inner}
    if len(groups) > 1:
        return Rejected(link.name, because("groups_differ", groups=sorted(map(list, groups))))
    if not link.producer.reduce_results:
        return Rejected(link.name, because("not_reduced", producer=link.name.partition(" -> ")[0]))
    reducing = [name for name, layer in link.producer.named_sublayers() if getattr(layer, "reduce_results", False)]
    if reducing:
        facts = {"inner": reducing[0], "producer": link.name.partition(" -> ")[0]}
        return Rejected(link.name, because("reduced_inside", **facts))
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
        fp8=norm.quantised,
    )


class OwnStock:
    """This package's layers without a Site; `site.Stock` has the contract."""

    def __init__(self, producer: Any, norm: RMSNorm):
        self._producer, self._norm, self.norm = producer, norm, norm.stock_forward

    def reduce(self, partial: Any) -> Any:
        return paddle_ops.all_reduce(partial, self._producer.group)

    def weight(self) -> Any:
        return self._norm.weight

    def numbers(self) -> tuple[float, float]:
        return self._norm.eps, self._norm.weight_offset

    def attach(self, site: Site) -> Callable[[], None]:
        """Set the Site as a plain attribute of both instances."""
        undo = [set_attribute(end, "site", site) for end in (self._producer, self._norm)]
        return functools.partial(undo_in_turn, undo)


def _partial_dtype(producer: Any) -> str:
    """Return the dtype of what is handed over: that of the row-parallel layers, since a product has that of its
    weight. A block without any has the dtype of most of its numbers: its experts, not a router or a scale in float32
    beside them.
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
    """Return every `QKRMSNorm` of `model`."""
    layers = model.named_sublayers(include_self=True)
    return [_qk_norm(name, layer) for name, layer in layers if isinstance(layer, QKRMSNorm)]


def _qk_norm(name: str, layer: QKRMSNorm) -> QKNorm:
    return QKNorm(
        name=name,
        q_heads=layer.q_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        width=(layer.q_heads + 2 * layer.kv_heads) * layer.head_dim,
        numbers=lambda: (layer.eps, layer.q_norm.weight_offset),
        weights=lambda: (layer.q_norm.weight, layer.k_norm.weight),
        stock=layer.stock_forward,
        attach=lambda kernel: set_attribute(layer, "kernel", kernel),
    )
