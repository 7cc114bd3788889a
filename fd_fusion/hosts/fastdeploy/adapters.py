"""How the layers of a FastDeploy model take a Site, and how they are put back: by attributes of instances alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import paddle

from fd_fusion.binding.attributes import set_attribute, undo_in_turn
from fd_fusion.binding.pairs import Pair
from fd_fusion.binding.qk_norms import QKNorm
from fd_fusion.frameworks import paddle_ops
from fd_fusion.frameworks.tensors import dtype_name
from fd_fusion.hosts.fastdeploy import fp8
from fd_fusion.hosts.fastdeploy.pairs import HostPair, norm_dtype
from fd_fusion.layers.finish_op import finish, hand_over, run_on_copy
from fd_fusion.site import Site
from fd_fusion.spec import Fp8

_UPSTREAM = "enable_all_reduce_fusion"  # the attribute by which a layer of the host takes part in the host's fusion

_NO_GRAPH = SimpleNamespace(step_use_cudagraph=False)  # a forward_meta outside a graph


def pair_of(found: HostPair, fd_config: Any) -> Pair:
    """Return the pair with all that a Site needs of this host."""
    tp_group, dtype = fd_config.parallel_config.tp_group, activation_dtype(fd_config)
    hidden_size = found.norm.weight.shape[-1]
    form = fp8.form_for(found.reader, hidden_size, dtype)
    return Pair(
        name=found.name,
        group=paddle_ops.group_of(tp_group),
        hidden_size=hidden_size,
        dtype=dtype,
        weight_dtype=norm_dtype(found.norm),
        stock=HostStock(found, tp_group, form if isinstance(form, Fp8) else None),
        producer=found.producer,
        reader=found.norm,
        fp8=form,
    )


class HostStock:
    """The host's own all-reduce and norm at a pair; `site.Stock` has the contract."""

    def __init__(self, found: HostPair, tp_group: Any, form: Fp8 | None = None):
        from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce

        self.norm, self._form = found.norm.forward, form
        self._found, self._tp_group, self._all_reduce = found, tp_group, tensor_model_parallel_all_reduce

    def reduce(self, partial: Any) -> Any:
        return self._all_reduce(partial, self._tp_group)

    def weight(self) -> Any:
        return self._found.norm.weight

    def numbers(self) -> tuple[float, float]:
        """Return eps and 0.0: the host adds Gemma's offset to the weight when it loads it."""
        return self._found.norm.eps, 0.0

    def attach(self, site: Site) -> Callable[[], None]:
        """Switch the producer's reduction and upstream's own fusion off and give both ends the Site.

        The constructors are long past: a bias was divided by the number of ranks when it was loaded, so the sum of
        the partial sums still holds it once.
        """
        found = self._found
        site.refuses_gradients = False  # the worker runs under no_grad; a host that does not reads no gradient either
        on = [(switch.layer, switch.attribute, getattr(switch.layer, switch.attribute)) for switch in found.switches]
        undo = [set_attribute(switch.layer, switch.attribute, switch.off) for switch in found.switches]
        ends = (found.producer, found.norm, *(switch.layer for switch in found.switches))
        for layer in {id(part): part for part in ends}.values():
            if getattr(layer, _UPSTREAM, False):
                undo.append(set_attribute(layer, _UPSTREAM, False))
        producer = _producer_forward(found.producer.forward, site, on if len(on) > 1 else ())
        undo.append(_set_forward(found.producer, producer))
        norm = _norm_forward(found.norm.forward, site)
        form = self._form
        if form is not None and site.quantises(form) and not (site.proven and site.takers == 0):
            undo.append(fp8.install())
            norm = _quantising_forward(norm, site, form)
        undo.append(_set_forward(found.norm, norm))
        return functools.partial(undo_in_turn, undo)


def qk_norms_of(model: Any, fd_config: Any) -> list[QKNorm]:
    """Return the host's layers that normalise q and k, for `bind`."""
    return [
        _qk_norm(name, layer, activation_dtype(fd_config))
        for name, layer in model.named_sublayers()
        if type(layer).__name__ == "QKRMSNorm" and hasattr(layer, "q_norm")
    ]


def _qk_norm(name: str, layer: Any, dtype: str) -> QKNorm:
    stock = layer.forward
    return QKNorm(
        name=name,
        q_heads=layer.q_size // layer.head_dim,
        kv_heads=layer.kv_size // layer.head_dim,
        head_dim=layer.head_dim,
        width=layer.q_size + 2 * layer.kv_size,
        # The host's own kernel takes layer.eps, which a caller may have left at its default.
        numbers=lambda: (layer.q_norm.eps, 0.0),
        weights=lambda: (layer.q_norm.weight, layer.k_norm.weight),
        stock=lambda qkv: stock(qkv, _NO_GRAPH),
        attach=lambda kernel: _set_forward(layer, _qk_forward(stock, kernel)),
        dtype=dtype,
    )


def _qk_forward(stock: Callable, kernel: Callable) -> Callable:
    """Return a forward that runs the kernel in place, with or without `forward_meta`; a proxy norm stays stock."""

    def forward(qkv_out, forward_meta=None, proxy_rmsnorm=None):
        if proxy_rmsnorm is not None:
            return stock(qkv_out, forward_meta, proxy_rmsnorm)
        return kernel(qkv_out) if paddle_ops.is_eager() else run_on_copy(qkv_out, kernel)

    forward.__wrapped__ = stock
    return forward


def _set_forward(layer: Any, forward: Callable) -> Callable[[], None]:
    undo = [set_attribute(layer, "forward", forward), set_attribute(layer, "_fd_fusion_bound", _NoCopy())]
    return functools.partial(undo_in_turn, undo)


class _NoCopy:
    """Raise where a bound layer is copied: the copy would run the forward of the layer that it was copied from."""

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError("fd_fusion: a bound layer cannot be copied; call fd_fusion.unbind(model) first")


@contextlib.contextmanager
def without_upstream_fusion(model: Any) -> Iterator[None]:
    """Switch upstream's fusion off for a forward that proves: all-reduce, then norm, in pairs without a Site too.

    Upstream's own fusion asserts where FlashInfer is missing, and in decoders other than GLM its norms reduce a sum
    that was reduced before: neither is what our results are to be compared with.
    """
    layers = model.sublayers(include_self=True)
    undo = [set_attribute(part, _UPSTREAM, False) for part in layers if getattr(part, _UPSTREAM, False)]
    try:
        yield
    finally:
        undo_in_turn(undo)


def _producer_forward(stock: Callable, site: Site, reductions: Sequence[tuple[Any, str, Any]]) -> Callable:
    """Return a forward that hands over what the producer's own returns, now a partial sum.

    reductions: those of a block that become one; its sum differs by roundings, so both are proven.
    """

    def forward(*args, **kwargs):
        if reductions and site.proving:
            site.whole = _with_own_reductions(stock, reductions, args, kwargs)
        return hand_over(site, stock(*args, **kwargs))

    forward.__wrapped__ = stock
    return forward


def _with_own_reductions(stock: Callable, reductions: Sequence, args: tuple, kwargs: dict) -> Any:
    undo = [set_attribute(layer, attribute, value) for layer, attribute, value in reductions]
    try:
        return stock(*args, **kwargs)
    finally:
        undo_in_turn(undo)


def _norm_forward(stock: Callable, site: Site) -> Callable:
    """Finish the partial sum. `forward_meta` matters only to norms that gather rows, and those have no Site."""

    def forward(x, residual_input=None, forward_meta=None, proxy_rmsnorm=None):
        if proxy_rmsnorm is None:
            return finish(site, x, residual_input)
        return _finish_by_proxy(site, stock, x, residual_input, forward_meta, proxy_rmsnorm)

    forward.__wrapped__ = stock
    return forward


def _quantising_forward(plain: Callable, site: Site, form: Fp8) -> Callable:
    """Finish as `plain` does, and in an eager call give the norm its codes and scales to carry: those that one kernel
    made with it; in the proving pass the host's own, so that its outputs show that no layer gets others."""

    def by_host(norm, form):
        if not site.proving or not len(norm):
            return None, None
        site.takers = 0
        return fp8.by_host(norm, form.by_column)[1:]

    def forward(x, residual_input=None, forward_meta=None, proxy_rmsnorm=None):
        if proxy_rmsnorm is not None or not paddle_ops.is_eager() or len(x.shape) != 2:
            return plain(x, residual_input, forward_meta, proxy_rmsnorm)
        norm, codes, scales, residual = site.finish_fp8(x, residual_input, form, by_host)
        if codes is not None:
            fp8.carry(norm, codes, scales, form, site)
        return norm, residual

    forward.__wrapped__ = plain
    return forward


def _finish_by_proxy(site: Site, stock: Callable, x, residual, forward_meta, proxy_rmsnorm):
    """Reduce, then run the host's own forward with the norm that it asked for. (SOT allows no closure above.)"""
    return site.finish_stock(x, residual, lambda total, r: stock(total, r, forward_meta, proxy_rmsnorm))


def activation_dtype(fd_config: Any) -> str:
    """Return the dtype of the tensors between the layers, "bfloat16": a quantised layer's weight does not show it."""
    return dtype_name(getattr(fd_config.model_config, "dtype", None) or paddle.get_default_dtype())
