"""Qwen2: dense, with biases of q, k and v."""

from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry


class Qwen2MLP(decoder.MLP):
    pass


class Qwen2Attention(decoder.Attention):
    pass


class Qwen2DecoderLayer(decoder.DecoderLayer):
    attention, mlp_class = Qwen2Attention, Qwen2MLP


class Qwen2Model(decoder.DecoderModel):
    layer_class = Qwen2DecoderLayer


@ModelRegistry.register("Qwen2ForCausalLM")
class Qwen2ForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        self.model = Qwen2Model(fd_config)
