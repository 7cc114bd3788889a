"""What the decoders of this host share; each model file names its own classes, as the host's do."""

import paddle
from paddle import nn

from fastdeploy.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from fastdeploy.model_executor.layers.moe.moe import FusedMoE
from fastdeploy.model_executor.layers.normalization import QKRMSNorm, RMSNorm


class MLP(nn.Layer):
    upstream_fuses = False  # GLM alone asks for upstream's own fusion

    def __init__(self, fd_config, intermediate_size, prefix="", reduce_results=True):
        super().__init__()
        hidden = fd_config.model_config.hidden_size
        self.up_gate_proj = MergedColumnParallelLinear(
            fd_config, f"{prefix}.up_gate_proj", hidden, 2 * intermediate_size
        )
        self.down_proj = RowParallelLinear(
            fd_config,
            f"{prefix}.down_proj",
            intermediate_size,
            hidden,
            with_bias=fd_config.model_config.mlp_bias,
            reduce_results=reduce_results,
            enable_all_reduce_fusion=self.upstream_fuses,
        )

    def forward(self, x, forward_meta=None):
        a, b = self.up_gate_proj(x).astype("float32").chunk(2, axis=-1)
        return self.down_proj((paddle.nn.functional.silu(a) * b).astype(x.dtype))


class Attention(nn.Layer):
    """Reads one row at a time, so that any split of the rows gives the same numbers."""

    qk_norm_class, passes_meta, out_name, upstream_fuses = None, True, "o_proj", False

    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__()
        model = fd_config.model_config
        self.fd_config, self.head_dim = fd_config, model.head_dim
        width = model.num_attention_heads * model.head_dim
        self.size = width // fd_config.parallel_config.tensor_parallel_size
        self.qkv_proj = QKVParallelLinear(fd_config, f"{prefix}.qkv_proj", with_bias=model.attention_bias)
        out = RowParallelLinear(
            fd_config,
            f"{prefix}.{self.out_name}",
            width,
            model.hidden_size,
            with_bias=model.o_proj_bias,
            layer_id=layer_id,
            enable_all_reduce_fusion=self.upstream_fuses,
        )
        setattr(self, self.out_name, out)
        if self.qk_norm_class:
            self.qk_norm = self.qk_norm_class(
                fd_config, self.head_dim, self.size, self.size, eps=model.rms_norm_eps, prefix=prefix
            )

    def forward(self, forward_meta, hidden_states):
        qkv = self.qkv_proj(hidden_states)
        if self.qk_norm_class:
            qkv = self.qk_norm(qkv, forward_meta) if self.passes_meta else self.qk_norm(qkv)
        q, k, v = qkv.astype("float32").chunk(3, axis=-1)
        out = paddle.tanh(q * k) + v
        return getattr(self, self.out_name)(out.astype(hidden_states.dtype))


class QKNormAttention(Attention):
    qk_norm_class = QKRMSNorm


class MoEBase(nn.Layer):
    """Gate and experts; what is reduced where is each model's own."""

    experts_reduce = True

    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__()
        model = fd_config.model_config
        self.gate = ReplicatedLinear(
            fd_config, f"{prefix}.gate", model.hidden_size, model.num_experts, weight_dtype="float32"
        )
        self.experts = FusedMoE(
            fd_config,
            reduce_results=self.experts_reduce,
            moe_intermediate_size=model.moe_intermediate_size,
            num_experts=model.num_experts,
            top_k=2,
            layer_idx=layer_id,
        )


class DecoderLayer(nn.Layer):
    attention, mlp_class, moe_class, attention_name = Attention, MLP, None, "self_attn"

    def __init__(self, fd_config, prefix=""):
        super().__init__()
        model, layer_id = fd_config.model_config, int(prefix.split(".")[-1])
        self.setup(fd_config, layer_id, prefix)
        if self.moe_class and layer_id >= model.first_k_dense_replace:
            self.mlp = self.moe_class(fd_config, layer_id, f"{prefix}.mlp")
        else:
            self.mlp = self.mlp_class(fd_config, model.intermediate_size, f"{prefix}.mlp")
        norms = {"hidden_size": model.hidden_size, "eps": model.rms_norm_eps}
        self.input_layernorm = RMSNorm(
            fd_config, prefix=f"{prefix}.input_layernorm", layer_id=layer_id, dtype=model.norm_dtype, **norms
        )
        self.post_attention_layernorm = RMSNorm(
            fd_config,
            prefix=f"{prefix}.post_attention_layernorm",
            layer_id=layer_id,
            dtype=model.post_norm_dtype or model.norm_dtype,
            **norms,
        )

    def setup(self, fd_config, layer_id, prefix):
        self.self_attn = self.attention(fd_config, layer_id, f"{prefix}.self_attn")

    def attend(self, forward_meta, hidden_states):
        return self.self_attn(forward_meta=forward_meta, hidden_states=hidden_states)

    def forward(self, forward_meta, hidden_states, residual=None):
        hidden_states, residual = self.input_layernorm(
            hidden_states, residual_input=residual, forward_meta=forward_meta
        )
        hidden_states = self.attend(forward_meta, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class DecoderModel(nn.Layer):
    layer_class = DecoderLayer

    def __init__(self, fd_config):
        super().__init__()
        model = fd_config.model_config
        self.num_layers = model.num_hidden_layers
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.embed_dtype = model.dtype
        self.layers = nn.LayerList(
            [self.layer_class(fd_config, prefix=f"model.layers.{i}") for i in range(self.num_layers)]
        )
        self.norm = RMSNorm(
            fd_config, model.hidden_size, model.rms_norm_eps, prefix="model.norm", dtype=model.norm_dtype
        )

    def forward(self, ids_remove_padding, forward_meta):
        hidden_states = self.embed_tokens(ids_remove_padding).astype(self.embed_dtype)
        residual = None
        for i in range(self.num_layers):
            hidden_states, residual = self.layers[i](forward_meta, hidden_states, residual)
        return self.norm(hidden_states, residual, forward_meta=forward_meta)[0]
