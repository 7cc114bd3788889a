"""`finish` of a Site, and the all-reduce, as opaque ops: a traced graph holds neither decision nor collective.

Under `paddle.jit.to_static` (AST and SOT) the op's body runs as Python whenever the graph runs, with real tensors:
`fuses(T)` is decided there, for the T of that run. The op has no gradient: eager and under SOT it raises where one is
recorded, and a whole graph that is to be differentiated is refused by Paddle.
"""

from __future__ import annotations

import math
from typing import Any

import paddle
from paddle.static import MetaTensor, register_op

from fd_fusion.frameworks import paddle_fp8, paddle_ops
from fd_fusion.frameworks.paddle_ops import is_eager
from fd_fusion.reasons import FusionError, because
from fd_fusion.reference import FP8_GROUP
from fd_fusion.site import Site, site_of
from fd_fusion.spec import Fp8


def _like_partial(partial, *rest):
    """Give both results the shape and dtype of the partial sum."""
    return tuple(MetaTensor(shape=partial.shape, dtype=partial.dtype) for _ in range(2))


@register_op(
    name="fd_fusion_finish",
    infer_meta=lambda partial, residual, site: _like_partial(partial),
    input_names=["partial", "residual"],
    output_names=["norm_out", "residual_out"],
)
def _finish(partial, residual, site):
    site = site_of(site)
    refuse_gradients(site, partial, residual)
    return site.complete(_own(partial, site), residual)


@register_op(
    name="fd_fusion_finish_without_residual",
    infer_meta=lambda partial, site: _like_partial(partial),
    input_names=["partial"],
    output_names=["norm_out", "residual_out"],
)
def _finish_without_residual(partial, site):
    site = site_of(site)
    refuse_gradients(site, partial)
    return site.complete(_own(partial, site), None)


def _own(partial, site):
    """Return the partial sum, or a copy where it is reduced in place, or given back as the residual.

    A graph may reuse the memory of an input, and two equal products are one value in it, which would be summed twice.
    """
    return partial if site.fuses(math.prod(partial.shape[:-1])) else partial.clone()


def finish(site: Site, partial: paddle.Tensor, residual: paddle.Tensor | None, weight: paddle.Tensor | None = None):
    """Finish by `site.finish` in eager mode, with its checks; by the opaque op while a graph is being traced."""
    if is_eager():
        refuse_gradients(site, partial, residual, weight)
        return site.finish(partial, residual)
    alone = residual is None  # SOT breaks the graph at `if <tensor> is None`, and takes the two apart
    if alone:
        return _finish_without_residual(partial, site.number)
    return _finish(partial, residual, site.number)


def finish_fp8(site: Site, partial, residual, weight, form: Fp8):
    """Return (norm_out or None, codes, scales, residual_out): by one kernel where the Site can; a traced graph
    quantises by Paddle's ops, behind the opaque op."""
    if is_eager():
        refuse_gradients(site, partial, residual, weight)
        return site.finish_fp8(partial, residual, form, quantise)
    norm, residual = finish(site, partial, residual, weight)
    return norm if form.keeps_norm else None, *quantise(norm, form), residual


def _like_quantised(norm, formula, static_scale):
    groups = MetaTensor(shape=[norm.shape[0], norm.shape[1] // FP8_GROUP], dtype=paddle.float32)
    return MetaTensor(shape=norm.shape, dtype=paddle.float8_e4m3fn), groups


@register_op(
    name="fd_fusion_quantise",
    infer_meta=_like_quantised,
    input_names=["norm"],
    output_names=["codes", "scales"],
)
def _quantise(norm, formula, static_scale):
    codes, scales = paddle_fp8.quantise(norm, formula, False, static_scale)  # Paddle's executor knows no strides
    return codes, paddle.ones([norm.shape[0], norm.shape[1] // FP8_GROUP]) if scales is None else scales


def quantise(norm: paddle.Tensor, form: Fp8) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """Return codes and scales of a norm [T, H]: `paddle_fp8.quantise`, opaque to a graph that is being traced, whose
    scales lie by rows, whatever the form says.

    Raises: FusionError: a gradient would have to pass; without a word it would be zero.
    """
    if is_eager():
        if is_recorded(norm):
            raise FusionError(because("gradients", layer="FP8"))
        return paddle_fp8.quantise(norm, form.formula, form.by_column, form.static_scale)
    codes, scales = _quantise(norm, form.formula, form.static_scale)
    return codes, None if form.formula == "static" else scales


def refuse_gradients(site: Site, *tensors: paddle.Tensor | None) -> None:
    """Raise FusionError if a gradient would have to pass to one of these tensors; it would be zero, with no error."""
    refuses = site.refuses_gradients and paddle.is_grad_enabled()  # first: it is off wherever this must cost nothing
    if refuses and is_recorded(*(tensor for tensor in tensors if tensor is not None)):
        raise FusionError(because("gradients", layer=site.name))


def is_recorded(*tensors: paddle.Tensor) -> bool:
    """Return whether what is computed from these, eager, will have a gradient."""
    return paddle.is_grad_enabled() and any(not tensor.stop_gradient for tensor in tensors)


def hand_over(site: Site, partial: paddle.Tensor) -> paddle.Tensor:
    """Hand over by `site.hand_over` in eager mode; record nothing while a graph is being traced."""
    if is_eager():
        return site.hand_over(partial)
    return partial


@register_op(
    name="fd_fusion_all_reduce",
    infer_meta=lambda x, group: MetaTensor(shape=x.shape, dtype=x.dtype),
    input_names=["x"],
    output_names=["total"],
)
def _all_reduce(x, group):
    return paddle_ops.all_reduce(x.clone(), group)  # in place, or x itself: see _own


def all_reduce(x: paddle.Tensor, group: Any) -> paddle.Tensor:
    """Sum x over the group: in place in eager mode, into a new tensor in a traced graph."""
    if is_eager():
        return paddle_ops.all_reduce(x, group)
    return _all_reduce(x, group)


@register_op(
    name="fd_fusion_run_on_copy",
    infer_meta=lambda x, kernel: MetaTensor(shape=x.shape, dtype=x.dtype),
    input_names=["x"],
    output_names=["out"],
)
def run_on_copy(x, kernel):
    """Run kernel(a copy of x), opaque to a graph; `kernel` works in place and returns its argument."""
    return kernel(x.clone())
