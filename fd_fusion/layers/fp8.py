"""A norm that is quantised where it is made, and the linear layer that takes it so."""

from __future__ import annotations

from typing import NamedTuple

import paddle
from paddle import nn
from paddle.static import MetaTensor, register_op

from fd_fusion.frameworks import paddle_fp8
from fd_fusion.frameworks.paddle_ops import is_eager
from fd_fusion.layers.finish_op import quantise
from fd_fusion.reference import FP8_GROUP
from fd_fusion.spec import Fp8


class Quantised(NamedTuple):
    """The first result of an `RMSNorm` with `quantised=`."""

    norm: paddle.Tensor | None  # [T, H]; None without `Fp8.keeps_norm`
    codes: paddle.Tensor  # float8_e4m3fn [T, H]
    scales: paddle.Tensor | None  # float32 [T, H / 128]: the norm is about codes * scales; None for a static scale


class Fp8Linear(nn.Layer):
    """y = x W^T + b, x and W in FP8: x by groups of 128, W by blocks of 128 x 128, as published checkpoints have it.
    There is no gradient.

    The product multiplies in float32 what the codes stand for: set `product` for a kernel of the host,
    (codes, scales, weight, weight_scale_inv) -> [T, out_features].

    Args:
        in_features: a multiple of 128.
        out_features: of this rank.
        form: how an x that is a tensor is quantised.
        dtype: of y and b; the default dtype when None.
    Parameters: weight [out, in] float8_e4m3fn, weight_scale_inv [out / 128, in / 128] float32; with `bias` b [out].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        form: Fp8 | None = None,
        dtype: str | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if in_features % FP8_GROUP:
            raise ValueError(f"Fp8Linear: in_features={in_features} is not a multiple of {FP8_GROUP}")
        self.form, self.product = form or Fp8(), None
        self.dtype = dtype or self._helper.get_default_dtype()
        blocks = -(-out_features // FP8_GROUP), in_features // FP8_GROUP
        zero, one = (paddle.ParamAttr(initializer=nn.initializer.Constant(x), trainable=False) for x in (0.0, 1.0))
        self.weight = self.create_parameter([out_features, in_features], attr=zero, dtype="float8_e4m3fn")
        self.weight_scale_inv = self.create_parameter(list(blocks), attr=one, dtype="float32")
        self.bias = self.create_parameter([out_features], attr=zero, dtype=self.dtype) if bias else None

    def forward(self, x: paddle.Tensor | Quantised) -> paddle.Tensor:
        """Multiply x [T, in], quantised or not -> [T, out].

        Raises: ValueError: another number of columns, or an x with one scale for all, which blocks do not have.
        """
        codes, scales = x[1:] if isinstance(x, Quantised) else quantise(x, self.form)
        if scales is None:
            raise ValueError("Fp8Linear: x is without scales of groups, which this layer needs")
        multiply = _multiply if is_eager() else _multiply_traced
        y = multiply(codes, scales, self.weight, self.weight_scale_inv, self.product, self.dtype)
        return y if self.bias is None else y + self.bias


def _multiply(codes, scales, weight, weight_scale_inv, product, dtype):
    if codes.shape[1] != weight.shape[1]:
        raise ValueError(f"Fp8Linear: x is {codes.shape}, expected [T, {weight.shape[1]}]")
    if product is not None:
        return product(codes, scales, weight, weight_scale_inv)
    value = paddle_fp8.values(weight, weight_scale_inv, FP8_GROUP)
    return (paddle_fp8.values(codes, scales) @ value.T).astype(dtype)


# Opaque to a graph that is being traced, in which Paddle takes no shape of FP8.
_multiply_traced = register_op(
    name="fd_fusion_fp8_linear",
    infer_meta=lambda codes, scales, weight, weight_scale_inv, product, dtype: MetaTensor(
        shape=[codes.shape[0], weight.shape[0]], dtype=getattr(paddle, dtype)
    ),
    input_names=["codes", "scales", "weight", "weight_scale_inv"],
    output_names=["y"],
)(_multiply)
