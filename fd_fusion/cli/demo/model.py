"""The demo's decoder in Paddle: GLM-4.5's structure, split over the ranks of the default group.

Every rank holds the whole embedding, router, norms and lm_head, so that hidden states and logits are the same on
all ranks. Attention is split by heads, each MLP and each expert by its intermediate size. One sequence, no batch.
Quantised, what reads a norm, except the router, is an `Fp8Linear`, and the norms give FP8.

    T: tokens of this call, S: tokens in the cache after it, H: hidden size, D: head size
"""

from __future__ import annotations

import paddle
from paddle import nn
from paddle.nn import functional as F

from fd_fusion.cli.demo.checkpoint import Checkpoint
from fd_fusion.cli.demo.config import DecoderConfig
from fd_fusion.frameworks.paddle_ops import group_of
from fd_fusion.layers.fp8 import Fp8Linear, Quantised
from fd_fusion.layers.qk_rms_norm import QKRMSNorm
from fd_fusion.layers.rms_norm import RMSNorm
from fd_fusion.layers.row_parallel_linear import RowParallelLinear, reduce_or_hand_over
from fd_fusion.spec import Fp8

Turn = tuple[paddle.Tensor, paddle.Tensor]  # cos and sin of each position's angles, [T, 1, rotary dim / 2]
# Keys and values of one sequence, by layer, [S, kv heads of this rank, D] each; empty before its first call.
Cache = dict[int, tuple[paddle.Tensor, paddle.Tensor]]


def _linear(config: DecoderConfig, out_features: int, bias: bool = False) -> nn.Layer:
    """Return a linear that reads a norm."""
    if config.quantised:
        return Fp8Linear(config.hidden_size, out_features, dtype="float32", bias=bias)
    return nn.Linear(config.hidden_size, out_features, bias_attr=None if bias else False)


def _norm(config: DecoderConfig, keeps_norm: bool = False) -> RMSNorm:
    form = Fp8(keeps_norm=keeps_norm) if config.quantised else None
    return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=config.dtype, quantised=form)


class DemoAttention(nn.Layer):
    """Causal grouped-query attention with QK-RMSNorm and partial RoPE; o_proj ends it with a partial sum."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        ranks, size = group_of().size, config.head_dim
        self.layer, self.head_dim = layer, size
        self.heads, self.kv_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        self.q_proj = _linear(config, self.heads * size, config.attention_bias)
        self.k_proj = _linear(config, self.kv_heads * size, config.attention_bias)
        self.v_proj = _linear(config, self.kv_heads * size, config.attention_bias)
        self.o_proj = RowParallelLinear(config.num_attention_heads * size, config.hidden_size, dtype=config.dtype)
        self.qk_norm = None
        if config.use_qk_norm:
            self.qk_norm = QKRMSNorm(size, self.heads, self.kv_heads, config.rms_norm_eps)

    def forward(self, x: paddle.Tensor | Quantised, turn: Turn, cache: Cache) -> paddle.Tensor:
        """Attend, x [T, H] -> [T, H]."""
        qkv = paddle.concat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        if self.qk_norm is not None:
            qkv = self.qk_norm(qkv)
        heads = qkv.reshape([qkv.shape[0], -1, self.head_dim])  # [T, q|k|v heads, D]
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], axis=1)
        k = _rotate(k, turn)
        if self.layer in cache:
            k, v = (paddle.concat([old, new]) for old, new in zip(cache[self.layer], (k, v)))
        cache[self.layer] = k, v
        q, k, v = (t.transpose([1, 0, 2]) for t in (_rotate(q, turn), k, v))  # [heads, T or S, D]
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, axis=0) for t in (k, v))
        rows, keys = q.shape[1], k.shape[1]
        later = paddle.triu(paddle.full([rows, keys], float("-inf")), diagonal=keys - rows + 1)
        scores = q @ k.transpose([0, 2, 1]) * self.head_dim**-0.5 + later  # [heads, T, S]
        out = F.softmax(scores, axis=-1) @ v
        return self.o_proj(out.transpose([1, 0, 2]).reshape([rows, -1]).astype(self.o_proj.weight.dtype))


def _rotate(x: paddle.Tensor, turn: Turn) -> paddle.Tensor:
    """Rotate the first 2n dimensions of each head, dimension i with i + n; x [T, heads, D]."""
    cos, sin = turn  # [T, 1, n]
    n = cos.shape[-1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return paddle.concat([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


class DemoMLP(nn.Layer):
    """Compute down(silu(gate x) * up x). Without `reduce_results` the caller reduces the partial sum."""

    def __init__(self, config: DecoderConfig, intermediate_size: int, reduce_results: bool = True):
        super().__init__()
        shard, how = intermediate_size // group_of().size, {"reduce_results": reduce_results, "dtype": config.dtype}
        self.gate_proj, self.up_proj = _linear(config, shard), _linear(config, shard)
        self.down_proj = RowParallelLinear(intermediate_size, config.hidden_size, **how)

    def forward(self, x: paddle.Tensor | Quantised) -> paddle.Tensor:
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner.astype(self.down_proj.weight.dtype))


class DemoRouter(nn.Layer):
    """Choose experts: a weight for each row and expert, zero for those not chosen.

    score = sigmoid(W x); the top k of score + correction bias are chosen; their scores, normalised, are the weights.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.weight = self.create_parameter([config.n_routed_experts, config.hidden_size], dtype="float32")
        self.e_score_correction_bias = self.create_parameter([config.n_routed_experts], dtype="float32", is_bias=True)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Route x [T, H] -> [T, experts] in float32."""
        scores = F.sigmoid(x.astype("float32") @ self.weight.T)
        _, chosen = (scores + self.e_score_correction_bias).topk(self.config.num_experts_per_tok, axis=-1)
        weights = paddle.take_along_axis(scores, chosen, axis=-1)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        return paddle.put_along_axis(paddle.zeros_like(scores), chosen, weights, axis=-1)


class DemoMoE(nn.Layer):
    """Add the partial sums of shared and routed experts, and reduce once."""

    site = None

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.group, self.reduce_results = None, True
        size, self.dtype = config.moe_intermediate_size, config.dtype
        self.gate = DemoRouter(config)
        self.shared_experts = DemoMLP(config, size * config.n_shared_experts, reduce_results=False)
        self.experts = nn.LayerList([DemoMLP(config, size, False) for _ in range(config.n_routed_experts)])

    def forward(self, x: paddle.Tensor | Quantised) -> paddle.Tensor:
        weights = self.gate(x.norm if isinstance(x, Quantised) else x)
        y = self.shared_experts(x).astype("float32")
        for number in (weights != 0).any(axis=0).nonzero().flatten().tolist():
            y = y + weights[:, number : number + 1] * self.experts[number](x).astype("float32")
        return reduce_or_hand_over(self, y.astype(self.dtype))


class DemoDecoderLayer(nn.Layer):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        dense = config.is_dense(layer)
        self.input_layernorm = _norm(config)
        self.self_attn = DemoAttention(config, layer)
        self.post_attention_layernorm = _norm(config, keeps_norm=not dense)  # the router reads it
        self.mlp = DemoMLP(config, config.intermediate_size) if dense else DemoMoE(config)

    def forward(self, x, residual, turn, cache):
        """Run the layer. x is the last block's output, not yet added to the residual; both [T, H]."""
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, turn, cache), residual)
        return self.mlp(x), residual


class DemoDecoder(nn.Layer):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.LayerList([DemoDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=config.dtype)

    def forward(self, tokens: paddle.Tensor, cache: Cache) -> paddle.Tensor:
        """Decode tokens [T] -> normalised hidden states [T, H]."""
        rotary = self.config.rotary_dim
        steps = self.config.rope_theta ** (-paddle.arange(0, rotary, 2, dtype="float64") / rotary)
        start = cache[0][0].shape[0] if cache else 0
        positions = paddle.arange(start, start + tokens.shape[0], dtype="float64")
        # In float64, since float32 has few digits left for the angle of a late position.
        angles = (positions.unsqueeze(1) * steps).unsqueeze(1)  # [T, 1, rotary / 2]
        turn = angles.cos().astype("float32"), angles.sin().astype("float32")
        x, residual = self.embed_tokens(tokens).astype(self.config.dtype), None
        for layer in self.layers:
            x, residual = layer(x, residual, turn, cache)
        return self.norm(x, residual)[0]


class DemoForCausalLM(nn.Layer):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = DemoDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias_attr=False)

    def forward(self, tokens: paddle.Tensor, cache: Cache) -> paddle.Tensor:
        """Append tokens [T] int64 to the cache -> logits [T, vocabulary]."""
        return self.lm_head(self.model(tokens, cache).astype("float32"))


def load_model(checkpoint: Checkpoint) -> DemoForCausalLM:
    """Build the decoder and fill it with this rank's part of the checkpoint."""
    ranks = group_of()
    model = DemoForCausalLM(checkpoint.config)
    model.eval()
    left, parameters = set(checkpoint.stored), model.state_dict()
    for key, parameter in parameters.items():
        name = key.replace(".qk_norm.", ".")  # the one layer that the checkpoint does not know
        if name.endswith("_scale_inv"):
            continue  # filled with its weight
        left.remove(name)
        if parameter.dtype == paddle.float8_e4m3fn:
            codes, scales = checkpoint.read_blocks(name, ranks.rank, ranks.size)
            parameter.set_value(paddle.to_tensor(codes).view("float8_e4m3fn"))
            parameters[f"{key}_scale_inv"].set_value(scales)
            continue
        value = checkpoint.read(name, ranks.rank, ranks.size)
        # The checkpoint keeps linears as [out, in], Paddle as [in, out].
        is_linear = name.endswith("_proj.weight") or name == "lm_head.weight"
        value = (value.T if is_linear else value).astype("float32")
        parameter.set_value(paddle.to_tensor(value).astype(parameter.dtype))
    assert not left, f"no parameter took {sorted(left)}"
    return model
