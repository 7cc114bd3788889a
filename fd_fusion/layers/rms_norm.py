"""RMSNorm with an optional residual, which finishes the reduction of a Site where it has one."""

from __future__ import annotations

import paddle
from paddle import nn

from fd_fusion.config import FusionConfig
from fd_fusion.frameworks import paddle_ops
from fd_fusion.frameworks.tensors import dtype_name
from fd_fusion.layers.finish_op import finish
from fd_fusion.layers.shapes import cannot_fit, known_sizes
from fd_fusion.site import Site


class RMSNorm(nn.Layer):
    """Add the residual, normalise each row; with a Site, finish the all-reduce of x in the same kernel.

        s = x + residual;   out = s * rsqrt(mean(s^2) + eps) * (weight + weight_offset);   residual_out = s

    Args:
        hidden_size: H.
        eps: added to the mean of squares.
        weight_offset: added to the weight in float32; 1.0 for Gemma.
        dtype: of the weight; the default dtype when None. A float32 weight with half x is allowed.
        fusion_config: kept for `bind`; this layer alone fuses nothing.
    Parameters: weight [H], ones at first.
    """

    site: Site | None = None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        weight_offset: float = 0.0,
        dtype: str | None = None,
        fusion_config: FusionConfig | None = None,
    ):
        super().__init__()
        self.hidden_size, self.eps, self.weight_offset = hidden_size, eps, weight_offset
        self.fusion_config = fusion_config
        self.weight = self.create_parameter(
            [hidden_size],
            dtype=dtype or self._helper.get_default_dtype(),
            default_initializer=nn.initializer.Constant(1.0 - weight_offset),
        )

    def forward(self, x: paddle.Tensor, residual_input: paddle.Tensor | None = None):
        """Normalise x + residual_input, both [..., H] of one dtype -> (out, residual_out), like x.

        Without a residual, residual_out is x (or its sum over the ranks). T = 0 is allowed.
        Raises: ValueError: another hidden size, or a residual of another shape or dtype.
        """
        self._check(x, residual_input)
        if self.site is None:
            return self.stock_forward(x, residual_input)
        return finish(self.site, x, residual_input, self.weight)

    def stock_forward(self, x: paddle.Tensor, residual_input: paddle.Tensor | None = None):
        """Compute the norm alone: x is already the whole sum."""
        return paddle_ops.rms_norm(
            x, self.weight, eps=self.eps, weight_offset=self.weight_offset, residual=residual_input
        )

    def _check(self, x, residual_input) -> None:
        if cannot_fit(x.shape[-1:], [self.hidden_size]):
            raise ValueError(
                f"RMSNorm: x has shape {known_sizes(x.shape)}, expected a last dimension of {self.hidden_size}"
            )
        if residual_input is None:
            return
        if cannot_fit(residual_input.shape, x.shape) or residual_input.dtype != x.dtype:
            raise ValueError(
                f"RMSNorm: the residual is {known_sizes(residual_input.shape)} {dtype_name(residual_input)}, "
                f"expected {known_sizes(x.shape)} {dtype_name(x)} like x"
            )
