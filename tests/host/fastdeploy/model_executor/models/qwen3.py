"""Qwen3: Qwen2's decoder layer with the norm of q and k."""

from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry
from fastdeploy.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2MLP


class Qwen3MLP(Qwen2MLP):
    pass


class Qwen3Attention(decoder.QKNormAttention):
    pass


class Qwen3DecoderLayer(Qwen2DecoderLayer):
    attention = Qwen3Attention


class Qwen3Model(decoder.DecoderModel):
    layer_class = Qwen3DecoderLayer


@ModelRegistry.register("Qwen3ForCausalLM")
class Qwen3ForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        self.model = Qwen3Model(fd_config)
