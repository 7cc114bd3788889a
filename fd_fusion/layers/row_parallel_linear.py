"""A linear layer whose input is split over the ranks: its product is a partial sum, reduced by it or the norm."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from fd_fusion.config import FusionConfig
from fd_fusion.frameworks import paddle_ops
from fd_fusion.layers.finish_op import all_reduce, hand_over
from fd_fusion.layers.shapes import cannot_fit, known_sizes
from fd_fusion.site import Site


class RowParallelLinear(nn.Layer):
    """Compute y = sum over the ranks of (x_r W_r) + bias; with a Site, hand the partial sum over unreduced.

    Args:
        in_features: of the whole layer; each rank holds in_features / N rows of W.
        out_features: H.
        has_bias: add a bias, once: the first rank adds it to its partial sum.
        reduce_results: False leaves the partial sum to the caller, who owes the reduction.
        group: the process group; the default one when None.
        dtype: of the parameters; the default dtype when None.
        fusion_config: kept for `bind`; this layer alone fuses nothing.
    Parameters: weight [in_features / N, H], bias [H] if asked for.
    Raises: ValueError: in_features is not a multiple of the number of ranks.
    """

    site: Site | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        has_bias: bool = False,
        reduce_results: bool = True,
        group: Any = None,
        dtype: str | None = None,
        fusion_config: FusionConfig | None = None,
    ):
        super().__init__()
        ranks = paddle_ops.group_of(group)
        if in_features % ranks.size:
            raise ValueError(
                f"RowParallelLinear: in_features={in_features} is not a multiple of the {ranks.size} ranks; "
                "choose another size or number of ranks"
            )
        self.in_features, self.out_features = in_features, out_features
        self.reduce_results, self.group, self.fusion_config = reduce_results, group, fusion_config
        self._adds_bias = ranks.rank == 0
        dtype = dtype or self._helper.get_default_dtype()
        self.weight = self.create_parameter([in_features // ranks.size, out_features], dtype=dtype)
        self.bias = self.create_parameter([out_features], dtype=dtype, is_bias=True) if has_bias else None

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Multiply x [..., in_features / N], this rank's columns -> [..., H]: the sum, or this rank's partial sum."""
        expected = self.weight.shape[0]
        if cannot_fit(x.shape[-1:], [expected]):
            raise ValueError(
                f"RowParallelLinear: x has shape {known_sizes(x.shape)}, expected a last dimension of {expected}"
            )
        bias = self.bias if self._adds_bias else None
        return reduce_or_hand_over(self, paddle_ops.linear(x, self.weight, bias))


def reduce_or_hand_over(layer: nn.Layer, partial: paddle.Tensor) -> paddle.Tensor:
    """End any layer that produces a partial sum: hand it to the Site, or all-reduce it.

    The layer has `site`, `group` and `reduce_results`. A block that adds several partial sums calls this once, on
    their sum, and its inner layers have `reduce_results=False`.
    """
    if layer.site is not None:
        return hand_over(layer.site, partial)
    return all_reduce(partial, layer.group) if layer.reduce_results else partial
