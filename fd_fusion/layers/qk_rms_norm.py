"""RMSNorm of every head of q and of k, on packed q|k|v rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn

from fd_fusion.config import FusionConfig
from fd_fusion.frameworks import paddle_ops
from fd_fusion.layers.finish_op import is_recorded, run_on_copy
from fd_fusion.layers.rms_norm import RMSNorm
from fd_fusion.layers.shapes import known_sizes
from fd_fusion.reasons import FusionError, because


class QKRMSNorm(nn.Layer):
    """Normalise each head of q and k; v is untouched.

        q_h = q_h * rsqrt(mean(q_h^2) + eps) * (q_weight + weight_offset), k likewise with k_weight

    Args:
        head_dim: D.
        q_heads, kv_heads: of this rank.
        eps: the same for q and k.
        weight_offset: added to the weights in float32; 1.0 for Gemma.
        dtype: of the weights; the default dtype when None.
        fusion_config: kept for `bind`.
    Parameters: q_norm.weight [D], k_norm.weight [D].
    """

    kernel: Callable[[Any], Any] | None = None  # given by `bind`: qkv -> qkv, changed in place

    def __init__(
        self,
        head_dim: int,
        q_heads: int,
        kv_heads: int,
        eps: float = 1e-5,
        *,
        weight_offset: float = 0.0,
        dtype: str | None = None,
        fusion_config: FusionConfig | None = None,
    ):
        super().__init__()
        self.head_dim, self.q_heads, self.kv_heads = head_dim, q_heads, kv_heads
        self.eps, self.fusion_config = eps, fusion_config
        self.q_norm = RMSNorm(head_dim, eps, weight_offset=weight_offset, dtype=dtype)
        self.k_norm = RMSNorm(head_dim, eps, weight_offset=weight_offset, dtype=dtype)

    def forward(self, qkv: paddle.Tensor, forward_meta: object = None) -> paddle.Tensor:
        """Normalise qkv [T, (q_heads + kv_heads) D + the width of v], rows may be strided, in place; return it.

        Under `to_static`, and where gradients are recorded, a new tensor is returned. `forward_meta` is accepted, as
        FastDeploy's layer does, and not needed. Raises: ValueError: fewer columns than q and k take, or not two
        dimensions. FusionError: gradients are recorded, and the layer is bound.
        """
        q_size, k_size = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        narrow = [size for size in known_sizes(qkv.shape[1:]) if size is not None and size < q_size + k_size]
        if qkv.ndim != 2 or narrow:
            raise ValueError(f"QKRMSNorm: qkv is {known_sizes(qkv.shape)}, expected [T, at least {q_size + k_size}]")
        traced = not paddle_ops.is_eager()
        recorded = not traced and is_recorded(qkv, self.q_norm.weight, self.k_norm.weight)
        if self.kernel is not None:
            if recorded:
                raise FusionError(because("gradients", layer=type(self).__name__))
            return run_on_copy(qkv, self.kernel) if traced else self.kernel(qkv)
        return self._concatenated(qkv) if traced or recorded else self.stock_forward(qkv)

    def stock_forward(self, qkv: paddle.Tensor) -> paddle.Tensor:
        """Compute the formula in Paddle's own ops, in place."""
        q_size, k_size = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        with paddle.no_grad():
            qkv[:, :q_size], qkv[:, q_size : q_size + k_size] = self._q_and_k(qkv)
        return qkv

    def _concatenated(self, qkv: paddle.Tensor) -> paddle.Tensor:
        """Compute the formula into a new tensor: a graph may not change its input."""
        q, k = self._q_and_k(qkv)
        return paddle.concat([q, k, qkv[:, q.shape[1] + k.shape[1] :]], axis=-1)

    def _q_and_k(self, qkv: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        q_size, k_size = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        q = self._normalise(self.q_norm, qkv[:, :q_size], self.q_heads)
        k = self._normalise(self.k_norm, qkv[:, q_size : q_size + k_size], self.kv_heads)
        return q, k

    def _normalise(self, norm: RMSNorm, part: paddle.Tensor, heads: int) -> paddle.Tensor:
        """Normalise each head by itself, [T, heads D] -> [T, heads D]."""
        by_head = part.reshape([-1, heads, self.head_dim])
        out, _ = paddle_ops.rms_norm(by_head, norm.weight, eps=self.eps, weight_offset=norm.weight_offset)
        return out.reshape([-1, heads * self.head_dim])
