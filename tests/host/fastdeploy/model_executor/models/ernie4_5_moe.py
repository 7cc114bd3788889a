"""Ernie 4.5: routed and shared experts each reduce, and the sums are added."""

import paddle
from paddle import nn

from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry


class Ernie4_5_MLP(decoder.MLP):
    pass


class Ernie4_5_MoE(decoder.MoEBase):
    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__(fd_config, layer_id, prefix)
        self.num_shared_experts = 1
        width = fd_config.model_config.moe_intermediate_size
        self.shared_experts = Ernie4_5_MLP(fd_config, width, f"{prefix}.shared_experts")

    def forward(self, hidden_states):
        out = self.experts(hidden_states, self.gate)
        return out + self.shared_experts(hidden_states)


class Ernie4_5_Attention(decoder.Attention):
    pass


class Ernie4_5_DecoderLayer(decoder.DecoderLayer):
    attention, mlp_class, moe_class = Ernie4_5_Attention, Ernie4_5_MLP, Ernie4_5_MoE


class Ernie4_5_Model(decoder.DecoderModel):
    layer_class = Ernie4_5_DecoderLayer


@ModelRegistry.register("Ernie4_5_MoeForCausalLM")
class Ernie4_5_MoeForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        self.model = Ernie4_5_Model(fd_config)


class Ernie4_5_MTPModel(nn.Layer):
    def __init__(self, fd_config):
        super().__init__()
        self.norm = fd_config.speculative_config.sharing_model.model.norm
        self.mtp_block = nn.LayerList([Ernie4_5_DecoderLayer(fd_config, prefix="mtp.0")])

    def forward(self, inputs, forward_meta):
        hidden_states, residual = self.mtp_block[0](forward_meta, paddle.tanh(inputs), None)
        return self.norm(hidden_states, residual, forward_meta=forward_meta)[0]


@ModelRegistry.register("Ernie4_5_MTPForCausalLM")
class Ernie4_5_MTPForCausalLM(nn.Layer):
    """A draft model: one decoder layer, and the last norm of the model that it drafts for."""

    def __init__(self, fd_config):
        super().__init__()
        self.model = Ernie4_5_MTPModel(fd_config)

    def forward(self, previous_hidden_states, forward_meta):
        return self.model(previous_hidden_states, forward_meta)
