"""The demo's decoder in NumPy, one process, whole sequence, no cache: written apart from the Paddle model.

In float64 it is the truth; in float32 its error from that truth is the measure of what float32 can do. A quantised
decoder quantises its norms in both; in float32 it rounds to bfloat16 too, where the model does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from fd_fusion.cli.demo.checkpoint import Checkpoint, wide_blocks
from fd_fusion.cli.demo.config import DecoderConfig
from fd_fusion.reference import FP8_GROUP, qk_rms_norm, quantise, rms_norm, round_to, value_of_e4m3


@dataclass
class ReferenceDecoder:
    """The decoder of a checkpoint in one dtype.

    A product with a row-parallel weight is a sum of `parts` products, as that many ranks compute it. `margin` is the
    smallest gap between an expert that was chosen and one that was not: where it is near the rounding error,
    another run may route otherwise.
    """

    checkpoint: Checkpoint
    dtype: type = np.float64
    parts: int = 1
    margin: float = field(default=np.inf)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits of every position of the sequence, [T, vocabulary]."""
        config = self.checkpoint.config
        x = self._w("model.embed_tokens.weight")[tokens]
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            h = self._quantised(self._norm(x, prefix + "input_layernorm"))
            x = self._round(x + self._attention(h, prefix + "self_attn."))
            h = self._norm(x, prefix + "post_attention_layernorm")
            dense, prefix = config.is_dense(layer), prefix + "mlp."
            x = self._round(x + (self._mlp(self._quantised(h), prefix) if dense else self._moe(h, prefix)))
        return self._norm(x, "model.norm") @ self._w("lm_head.weight").T

    def _w(self, name: str) -> np.ndarray:
        value = self.checkpoint.read(name)
        if self.checkpoint.config.quantised:
            if re.search(r"\.(q|k|v|gate|up)_proj\.weight$", name):
                codes, scales = self.checkpoint.read_blocks(name)
                value = value_of_e4m3(codes) * wide_blocks(scales)[: len(codes)]
            elif re.search(r"(layernorm|model\.norm|embed_tokens|[on]_proj)\.weight$", name):
                value = round_to(value, "bfloat16")
        return value.astype(self.dtype)

    def _round(self, x: np.ndarray) -> np.ndarray:
        """Round to bfloat16, as a quantised model does; not the truth."""
        rounds = self.checkpoint.config.quantised and self.dtype == np.float32
        return round_to(x, "bfloat16").astype(np.float32) if rounds else x

    def _quantised(self, x: np.ndarray) -> np.ndarray:
        """Return what the codes of a norm stand for."""
        if not self.checkpoint.config.quantised:
            return x
        codes, scales = quantise(x, "multiply")
        return (value_of_e4m3(codes) * scales.repeat(FP8_GROUP, axis=1)).astype(self.dtype)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        eps = self.checkpoint.config.rms_norm_eps
        return self._round(rms_norm(x, self._w(f"{name}.weight"), eps=eps, dtype=self.dtype))

    def _attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        config, rows = self.checkpoint.config, len(x)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        projected = []
        for name in ("q_proj", "k_proj", "v_proj"):
            out = x @ self._w(f"{prefix}{name}.weight").T
            projected.append(out + self._w(f"{prefix}{name}.bias") if config.attention_bias else out)
        qkv = np.concatenate(projected, axis=1)
        if config.use_qk_norm:
            weights = self._w(f"{prefix}q_norm.weight"), self._w(f"{prefix}k_norm.weight")
            sizes = {"q_heads": heads, "kv_heads": kv_heads, "eps": config.rms_norm_eps}
            qkv = qk_rms_norm(qkv, *weights, **sizes, dtype=self.dtype)
        qkv = qkv.reshape(rows, -1, config.head_dim)
        out = np.empty((rows, heads, config.head_dim), self.dtype)
        for head in range(heads):
            kv = heads + head // (heads // kv_heads)
            q, k, v = self._rope(qkv[:, head]), self._rope(qkv[:, kv]), qkv[:, kv + kv_heads]
            scores = q @ k.T / np.sqrt(self.dtype(config.head_dim))
            scores[np.arange(rows)[:, None] < np.arange(rows)] = -np.inf
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = scores / scores.sum(axis=1, keepdims=True) @ v
        return self._row_parallel(out.reshape(rows, -1), f"{prefix}o_proj")

    def _row_parallel(self, x: np.ndarray, name: str) -> np.ndarray:
        pieces = [np.array_split(t, self.parts, axis=1) for t in (x, self._w(f"{name}.weight"))]
        return sum(self._round(self._round(a) @ b.T) for a, b in zip(*pieces))

    def _rope(self, x: np.ndarray) -> np.ndarray:
        """Rotate dimension i of the first half of the rotary part with dimension i of its second half; x [T, D]."""
        config = self.checkpoint.config
        half = config.rotary_dim // 2
        angle = np.arange(len(x))[:, None] / config.rope_theta ** (np.arange(half) / half)
        turned = (x[:, :half] + 1j * x[:, half : 2 * half]) * np.exp(1j * angle).astype(
            np.result_type(self.dtype, np.complex64)
        )
        return np.concatenate([turned.real, turned.imag, x[:, 2 * half :]], axis=1).astype(self.dtype)

    def _mlp(self, x: np.ndarray, prefix: str) -> np.ndarray:
        gate = x @ self._w(f"{prefix}gate_proj.weight").T
        up = x @ self._w(f"{prefix}up_proj.weight").T
        return self._row_parallel(gate / (1 + np.exp(-gate)) * up, f"{prefix}down_proj")

    def _moe(self, x: np.ndarray, prefix: str) -> np.ndarray:
        config, top = self.checkpoint.config, self.checkpoint.config.num_experts_per_tok
        scores = 1 / (1 + np.exp(-(x @ self._w(f"{prefix}gate.weight").T)))
        ranked = scores + self._w(f"{prefix}gate.e_score_correction_bias")
        order = np.argsort(-ranked, axis=1)
        if top < config.n_routed_experts:
            ranked = np.take_along_axis(ranked, order, axis=1)
            self.margin = min(self.margin, float((ranked[:, top - 1] - ranked[:, top]).min()))
        x = self._quantised(x)
        y = self._mlp(x, f"{prefix}shared_experts.")
        for expert in range(config.n_routed_experts):
            rows = np.nonzero((order[:, :top] == expert).any(axis=1))[0]
            if len(rows):
                chosen = np.take_along_axis(scores[rows], order[rows, :top], axis=1)
                weight = scores[rows, expert] * self.dtype(config.routed_scaling_factor)
                if config.norm_topk_prob:
                    weight = weight / chosen.sum(axis=1)
                y[rows] += weight[:, None] * self._mlp(x[rows], f"{prefix}experts.{expert}.")
        return y


def difference(got: np.ndarray, want: np.ndarray, config: DecoderConfig) -> float:
    """Return the largest difference; inf where one of them is not a number, so that it is in no budget.

    Of a quantised model, that of the median token: where two experts are as good as equal, rounding to e4m3 chooses.
    """
    largest = np.nan_to_num(np.abs(got - want), nan=np.inf).max(axis=-1)
    return float(np.median(largest) if config.quantised and np.isfinite(largest).all() else largest.max())


@dataclass(frozen=True)
class Truth:
    """What the ranks are compared with. Logits [1 + steps, vocabulary]: after the prompt and after each step.

    `plain_error` is the largest error of plain float32 runs, by `difference`.
    """

    tokens: list[int]
    logits: np.ndarray
    plain_error: float
    margin: float


def make_truth(checkpoint: Checkpoint, prompt: list[int], steps: int) -> Truth:
    """Decode greedily in float64; then the same tokens in float32, as one, two and four ranks would add.

    The error is taken over every position and over the three, since one run alone may be lucky: of few numbers the
    largest error varies by more than the factor of two that the budget allows.
    """
    exact = ReferenceDecoder(checkpoint)
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(exact.logits(tokens)[-1].argmax()))
    logits = exact.logits(tokens)
    plain = [ReferenceDecoder(checkpoint, np.float32, parts).logits(tokens) for parts in (1, 2, 4)]
    error = max(difference(one, logits, checkpoint.config) for one in plain)
    return Truth(tokens, logits[len(prompt) - 1 :], error, exact.margin)
