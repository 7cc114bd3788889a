"""Qwen3-MoE: the experts reduce inside FusedMoE."""

from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry
from fastdeploy.model_executor.models.qwen3 import Qwen3Attention


class Qwen3MoeBlock(decoder.MoEBase):
    def forward(self, x):
        return self.experts(x, self.gate)


class Qwen3MLP(decoder.MLP):
    pass


class Qwen3DecoderLayer(decoder.DecoderLayer):
    attention, mlp_class, moe_class = Qwen3Attention, Qwen3MLP, Qwen3MoeBlock


class Qwen3MoeModel(decoder.DecoderModel):
    layer_class = Qwen3DecoderLayer


@ModelRegistry.register("Qwen3MoeForCausalLM")
class Qwen3MoeForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        self.model = Qwen3MoeModel(fd_config)
