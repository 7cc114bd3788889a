"""One rank's share of some decoder layers, on torch tensors, with random weights of real shapes: for `bench decode`.

What a layer does: q, k and v; their norm where the model has one; RoPE and the write of the cache; attention over a
context; the output projection; all-reduce, residual and norm; a dense MLP or routed experts with shared ones; the
same reduction again. Which experts a row takes is drawn once, so that all ways of reducing load the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from bench import decode_kernels as kernels


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the config.json of a decoder says about its layers."""

    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dense: int  # width of a dense MLP
    vocabulary: int
    qk_norm: bool = False
    experts: int = 0
    top: int = 1
    expert: int = 0  # width of an expert
    shared: int = 0  # width of the shared experts together

    def layer_bytes(self, size: int, itemsize: int = 2) -> int:
        """Weights that one row reads in one layer on one of `size` ranks."""
        attention = (2 * self.q_heads + 2 * self.kv_heads) * self.head_dim
        mlp = 3 * (self.top * self.expert + self.shared if self.experts else self.dense)
        return self.hidden * (attention + mlp) // size * itemsize


MODELS = {
    "GLM-4.5-Air": Shape(4096, 46, 96, 8, 128, 10944, 151552, False, 128, 8, 1408, 1408),
    "Qwen3-32B": Shape(5120, 64, 64, 8, 128, 25600, 151936, True),
    "Qwen3-30B-A3B": Shape(2048, 48, 32, 4, 128, 6144, 151936, True, 128, 8, 768),
    "tiny": Shape(256, 2, 4, 2, 32, 128, 96, True, 4, 2, 64, 64),  # for a CPU
}


def shape_of(name: str) -> Shape:
    """One of `MODELS`, or the file of a config.json. Raises: ValueError: neither, or it lacks something."""
    if name in MODELS:
        return MODELS[name]
    try:
        config = json.loads(Path(name).read_text())
        config = config.get("text_config", config)
        heads, expert = config["num_attention_heads"], config.get("moe_intermediate_size", 0)
        experts = config.get("n_routed_experts") or config.get("num_experts") or 0
        qk_norm = config.get("use_qk_norm", str(config.get("model_type", "")).startswith("qwen3"))
        return Shape(
            config["hidden_size"],
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim") or config["hidden_size"] // heads,
            config.get("intermediate_size", 0),
            config["vocab_size"],
            bool(qk_norm),
            experts,
            config.get("num_experts_per_tok", 1),
            expert,
            expert * (config.get("n_shared_experts") or 0),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--models {name}: one of {', '.join(MODELS)}, or a config.json: {error!r}") from None


def check_split(shape: Shape, size: int) -> None:
    """Raise ValueError where a model does not split over so many ranks."""
    if shape.kv_heads % size or (shape.expert or shape.dense) % (8 * size):
        raise ValueError(f"{shape.kv_heads} kv heads and an MLP of {shape.dense} do not split over {size} ranks")


class Model:
    """`layers` layers of one rank, caches of `context` tokens for `most_rows` sequences, and the head."""

    def __init__(self, shape: Shape, size: int, rank: int, layers: int, context: int, most_rows: int, dtype: Any):
        check_split(shape, size)
        self.shape, self.layers, self.context, self.dtype = shape, layers, context, dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._mine = torch.Generator(self.device).manual_seed(1 + rank)
        self._common = torch.Generator(self.device).manual_seed(0)
        self.q, self.kv = shape.q_heads // size, shape.kv_heads // size
        self.expert, self.shared, self.dense = shape.expert // size, shape.shared // size, shape.dense // size
        self.blocks = [self._block() for _ in range(layers)]
        cache = most_rows, self.kv, context, shape.head_dim
        self.caches = [(self._draw(cache, 1), self._draw(cache, 1)) for _ in range(layers)]
        self.embedding = self._draw((shape.vocabulary, shape.hidden), 1, common=True)
        self.head = self._draw((shape.vocabulary // size, shape.hidden), shape.hidden)
        if shape.experts:
            scores = torch.rand(layers, most_rows, shape.experts, generator=self._common, device=self.device)
            self.chosen = scores.topk(shape.top).indices.to(torch.int32)

    def _draw(self, size: tuple, fan_in: int, common: bool = False) -> torch.Tensor:
        generator = self._common if common else self._mine
        made = torch.empty(size, dtype=self.dtype, device=self.device)
        return made.normal_(0, fan_in**-0.5, generator=generator)

    def _block(self) -> dict[str, torch.Tensor]:
        shape, draw = self.shape, self._draw
        made = {
            "qkv": draw(((self.q + 2 * self.kv) * shape.head_dim, shape.hidden), shape.hidden),
            "o": draw((shape.hidden, self.q * shape.head_dim), shape.q_heads * shape.head_dim),
            "ones": torch.ones(shape.hidden, dtype=self.dtype, device=self.device),
            "head ones": torch.ones(shape.head_dim, dtype=self.dtype, device=self.device),
        }
        if shape.experts:
            made["router"] = draw((shape.experts, shape.hidden), shape.hidden, common=True)
            made["expert up"] = draw((shape.experts, 2 * self.expert, shape.hidden), shape.hidden)
            made["expert down"] = draw((shape.experts, shape.hidden, self.expert), shape.expert)
        if width := self.shared if shape.experts else self.dense:
            made["up"] = draw((2 * width, shape.hidden), shape.hidden)
            made["down"] = draw((shape.hidden, width), width * 2)
        return made

    def step(self, x: torch.Tensor, reduce: Any, qk_norm: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """One decode step of the layers: (normalised output, residual). `reduce`: a rival of `rivals.py`."""
        rows, ones = len(x), self.blocks[0]["ones"]
        residual, x = x.clone(), F.rms_norm(x, x.shape[1:], ones, 1e-5)
        for number, block in enumerate(self.blocks):
            partial = torch.mm(self._attention(number, block, x, qk_norm), block["o"].T, out=reduce.buffer(rows))
            x, residual = reduce.call(partial, residual, ones)
            finish = reduce.call if number + 1 < self.layers else reduce.last
            x, residual = finish(self._mlp(number, block, x, reduce.buffer(rows)), residual, ones)
        return x, residual

    def _attention(self, number: int, block: dict, x: torch.Tensor, qk_norm: Callable) -> torch.Tensor:
        shape, dim = self.shape, self.shape.head_dim
        qkv = self._product(x, block["qkv"])
        rows = len(qkv)
        if shape.qk_norm:
            qk_norm(qkv, block["head ones"], self.q, self.kv, dim)
        keys, values = (cache[:rows] for cache in self.caches[number])
        grid = rows, self.q + 2 * self.kv
        kernels.rope_and_cache[grid](qkv, keys, values, self.context - 1, self.context, self.q, self.kv, dim)
        # The heads of one kv head stand as rows of one query, so that its keys are read once.
        queries = qkv[:, : self.q * dim].view(rows, self.kv, self.q // self.kv, dim)
        with _flash(qkv):
            out = F.scaled_dot_product_attention(queries, keys, values)
        return out.transpose(1, 2).reshape(rows, self.q * dim)  # in the order in which attention wrote it

    def _mlp(self, number: int, block: dict, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        rows, shape, shared = len(out), self.shape, None
        if "up" in block:
            gate_up = self._product(x, block["up"])
            width = gate_up.shape[1] // 2
            inner = torch.empty(rows, width, dtype=out.dtype, device=out.device)
            kernels.silu_and_multiply[rows, -(-width // 1024)](gate_up, inner, width, 1024)
            if not shape.experts:
                return torch.mm(inner, block["down"].T, out=out)
            shared = torch.mm(inner, block["down"].T)
        chosen, scales = self.chosen[number, :rows], torch.empty(rows, shape.top, device=out.device)
        width = triton.next_power_of_2(shape.top)
        kernels.route[rows,](
            F.linear(self._routed(x), block["router"]), chosen, scales, shape.experts, shape.top, width
        )
        parts = self._experts(block, x, chosen, scales, out.dtype)
        grid = rows, -(-shape.hidden // 1024)
        has_shared = shared is not None
        shared = shared if has_shared else parts
        kernels.sum_of_choices[grid](parts, shared, out, shape.top, shape.hidden, has_shared, 1024)
        return out

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    def _routed(self, x: torch.Tensor) -> torch.Tensor:
        """What the router reads of a norm."""
        return x

    def _experts(self, block: dict, x: Any, chosen: torch.Tensor, scales: torch.Tensor, dtype: Any) -> torch.Tensor:
        shape, pairs = self.shape, chosen.numel()
        integers = {"dtype": torch.int32, "device": chosen.device}
        order, starts = torch.empty(pairs, **integers), torch.empty(shape.experts + 1, **integers)
        grid = (-(-max(pairs, shape.experts + 1) // 64),)
        kernels.order_by_expert[grid](chosen, order, starts, pairs, shape.experts, 64)
        inner = torch.empty(pairs, self.expert, dtype=dtype, device=order.device)
        parts = torch.empty(pairs, shape.hidden, dtype=dtype, device=order.device)
        columns = 32 if len(chosen) <= 4 else 64
        self._experts_up(x, block["expert up"], inner, scales, order, starts, columns)
        self._launch_experts(inner, block["expert down"], parts, scales, order, starts, columns, False)
        return parts

    def _experts_up(self, *args: Any) -> None:
        self._launch_experts(*args, True)

    def _launch_experts(self, x, weights, to, scales, order, starts, columns: int, gated: bool) -> None:
        grid, tile = (self.shape.experts, -(-to.shape[1] // columns)), (16, columns, 64)
        kernels.experts[grid](x, weights, to, scales, order, starts, x.shape[1], to.shape[1], self.shape.top, gated,
                              *tile, num_warps=4, num_stages=4)  # fmt: skip


def _flash(x: torch.Tensor) -> Any:
    if not x.is_cuda:
        return contextlib.nullcontext()
    attention = importlib.import_module("torch.nn.attention")
    return attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION)
