"""MiniMax-M2.5: every layer has experts; q and k are normalised over all their heads, with a sum over the ranks."""

import paddle
from paddle import nn

from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce
from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry


class MiniMaxRMSNorm(nn.Layer):
    def __init__(self, fd_config):
        super().__init__()
        self.size, self.eps = fd_config.parallel_config.tensor_parallel_size, fd_config.model_config.rms_norm_eps
        self.tp_group = fd_config.parallel_config.tp_group

    def forward(self, x):
        squares = (x * x).mean(-1, keepdim=True)
        if self.size > 1:
            squares = tensor_model_parallel_all_reduce(squares, self.tp_group) / self.size
        return x * paddle.rsqrt(squares + self.eps)


class MiniMaxM2_5Attention(decoder.Attention):
    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__(fd_config, layer_id, prefix)
        self.q_norm, self.k_norm = MiniMaxRMSNorm(fd_config), MiniMaxRMSNorm(fd_config)

    def forward(self, forward_meta, hidden_states):
        q, k, v = self.qkv_proj(hidden_states).astype("float32").chunk(3, axis=-1)
        out = paddle.tanh(self.q_norm(q) * self.k_norm(k)) + v
        return self.o_proj(out.astype(hidden_states.dtype))


class MiniMaxM2_5MoE(decoder.MoEBase):
    def forward(self, x):
        return self.experts(x, self.gate)


class MiniMaxM2_5DecoderLayer(decoder.DecoderLayer):
    attention, mlp_class, moe_class = MiniMaxM2_5Attention, None, MiniMaxM2_5MoE


class MiniMaxM2_5Model(decoder.DecoderModel):
    layer_class = MiniMaxM2_5DecoderLayer


@ModelRegistry.register("MiniMaxM2ForCausalLM")
class MiniMaxM2ForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        fd_config.model_config.first_k_dense_replace = 0
        self.model = MiniMaxM2_5Model(fd_config)
