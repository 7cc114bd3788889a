"""GPT-OSS: every layer has experts, which reduce inside FusedMoE."""

from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry


class GptOssAttention(decoder.Attention):
    pass


class GptOssMoe(decoder.MoEBase):
    def forward(self, hidden_states):
        expert_output = self.experts(hidden_states, self.gate)
        return expert_output


class GptOssDecoderLayer(decoder.DecoderLayer):
    attention, mlp_class, moe_class = GptOssAttention, None, GptOssMoe


class GptOssModel(decoder.DecoderModel):
    layer_class = GptOssDecoderLayer


@ModelRegistry.register("GptOssForCausalLM")
class GptOssForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        fd_config.model_config.first_k_dense_replace = 0
        self.model = GptOssModel(fd_config)
