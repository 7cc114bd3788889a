"""The FP8 model of `bench decode --fp8`: what reads a norm, except the router, multiplies in FP8.

That is q, k and v, and the first product of MLP and experts, whose weights have a scale for each block of 128 x 128.
o and the second products are bf16, as the caches and the head. By torch's scaled product where it takes the shape,
else by a kernel of this benchmark, which the experts always take. Every way of reducing but ours has a quantiser
behind its norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench import decode_kernels, rivals
from bench.decode_model import Model
from bench.quantiser import Quantiser
from fd_fusion.spec import Fp8

ALONE, BOTH = Fp8(by_column=True, keeps_norm=False), Fp8(by_column=True)


class Quantised(NamedTuple):
    norm: torch.Tensor | None  # [T, H], for the router
    codes: torch.Tensor  # e4m3 [T, H]
    scales: torch.Tensor  # [T, H / 128], by columns


class Weight(NamedTuple):
    codes: torch.Tensor  # e4m3 [E, OUT, IN], or without E
    scales: torch.Tensor  # [E, OUT / 128, IN / 128]
    for_torch: torch.Tensor  # the same [IN / 128, OUT / 128] by columns, each in whole fours


class Fused(rivals.Fused):
    """This package's op with FP8 out: beside the norm where the router reads it."""

    def call(self, x, residual, weight, routed=True):
        *quantised, residual = self.op.finish_fp8(x, residual, weight, self._eps, 0.0, BOTH if routed else ALONE)
        return Quantised(*quantised), residual


class Behind(rivals.Rival):
    """Another way of reducing, and a quantiser behind its norm."""

    def __init__(self, way: Any, quantise: Callable[[torch.Tensor], Quantised]):
        self._way, self._quantise, self.buffer = way, quantise, way.buffer

    def call(self, x, residual, weight, routed=True):
        norm, residual = self._way.call(x, residual, weight)
        return self._quantise(norm), residual


class Fp8Model(Model):
    """`without` gets why torch's product is not used; every product is compared with float32 first."""

    def __init__(self, without: list[str], *args: Any):
        super().__init__(*args)
        kind = "gpu" if self.device == "cuda" else "cpu"
        self._quantiser, self._torch_takes = Quantiser(self.shape.hidden, 512, 4, kind), self.device == "cuda"
        try:
            for rows in (3, 16, 64, 128) if self._torch_takes else (3,):
                self._compare(rows)
        except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:  # of torch's product
            if not self._torch_takes:
                raise
            without.append(f"torch's scaled product, but the kernel of this benchmark: {str(error).splitlines()[0]}")
            self._torch_takes = False
            self._compare(16)

    def _compare(self, rows: int) -> None:
        x, weight = self.quantise(self.embedding[:rows]), self.blocks[0]["qkv"]
        wide = x.codes.float() * x.scales.repeat_interleave(128, 1)
        truth = wide @ wide_weight(weight).T
        error = ((self._product(x, weight).float() - truth).norm() / truth.norm()).item()
        assert error < 0.01, f"T={rows}: wrong numbers, {error}"

    def _block(self) -> dict[str, Any]:
        made = super()._block()
        return made | {name: in_blocks(made[name]) for name in ("qkv", "up", "expert up") if name in made}

    def quantise(self, norm: torch.Tensor) -> Quantised:
        made = self._quantiser(norm, BOTH)
        return Quantised(norm, made.codes, made.scales)

    def step(self, x: torch.Tensor, reduce: Any, qk_norm: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        rows, ones = len(x), self.blocks[0]["ones"]
        residual, x = x.clone(), self.quantise(F.rms_norm(x, x.shape[1:], ones, 1e-5))
        for number, block in enumerate(self.blocks):
            partial = torch.mm(self._attention(number, block, x, qk_norm), block["o"].T, out=reduce.buffer(rows))
            x, residual = reduce.call(partial, residual, ones, bool(self.shape.experts))
            x, residual = reduce.call(self._mlp(number, block, x, reduce.buffer(rows)), residual, ones, False)
        return x.codes, residual

    def _product(self, x: Quantised, weight: Weight) -> torch.Tensor:
        rows, width = len(x.codes), len(weight.codes)
        if self._torch_takes and rows % 16 == 0 and width % 128 == 0:
            kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
            scales = x.scales, kinds[0], weight.for_torch, kinds[1]
            return F.scaled_mm(x.codes, weight.codes.T, *scales, output_dtype=self.dtype)
        out = torch.empty(rows, width, dtype=self.dtype, device=x.codes.device)
        self._launch(x, weight, out, None, None, 32)
        return out

    def _routed(self, x: Quantised) -> torch.Tensor:
        return x.norm

    def _experts_up(self, x: Quantised, weight: Weight, out, scales, order, starts, columns: int) -> None:
        self._launch(x, weight, out, order, starts, columns)

    def _launch(self, x: Quantised, weight: Weight, out, order, starts, columns: int) -> None:
        is_experts, shape = order is not None, self.shape
        grid = (shape.experts if is_experts else 1), -(-out.shape[1] // columns)
        nothing = x.codes if order is None else order
        decode_kernels.fp8_product[grid](
            x.codes, x.scales, *x.scales.stride(), weight.codes, weight.scales, out, nothing,
            nothing if starts is None else starts, len(out), x.codes.shape[1], out.shape[1],
            shape.top if is_experts else 1, is_experts, 16, columns, num_warps=4, num_stages=4)  # fmt: skip


def in_blocks(weight: torch.Tensor) -> Weight:
    """Quantise [..., OUT, IN] in blocks of 128 x 128."""
    *_, height, width = weight.shape
    padded = F.pad(weight.float(), (0, 0, 0, -height % 128)).unflatten(-2, (-1, 128)).unflatten(-1, (-1, 128))
    scales = (padded.abs().amax((-3, -1)) / 448).clamp(min=1e-10)  # [..., OUT / 128, IN / 128]
    codes = (padded / scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)[..., :height, :]
    for_torch = F.pad(scales, (0, -(width // 128) % 4)).mT if weight.dim() == 2 else scales
    return Weight(codes.to(torch.float8_e4m3fn).contiguous(), scales.contiguous(), for_torch)


def wide_weight(weight: Weight) -> torch.Tensor:
    wide = weight.scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.codes.float() * wide[: len(weight.codes)]
