"""Qwen3.5: some layers have linear attention, under another name and with a state that every forward moves on."""

import paddle

from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry
from fastdeploy.model_executor.models.qwen2 import Qwen2MLP
from fastdeploy.model_executor.models.qwen3 import Qwen3Attention


class Qwen3_5MLP(Qwen2MLP):
    pass


class Qwen3_5Attention(Qwen3Attention):
    pass


class Qwen3_5GatedDeltaNet(decoder.Attention):
    out_name = "out_proj"

    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__(fd_config, layer_id, prefix)
        self.steps = 0  # stands for the recurrent state

    def forward(self, forward_meta, hidden_states):
        self.steps += 1
        return super().forward(forward_meta, hidden_states + paddle.to_tensor(0.01 * self.steps))


class Qwen3_5DecoderLayer(decoder.DecoderLayer):
    mlp_class = Qwen3_5MLP

    def setup(self, fd_config, layer_id, prefix):
        self.layer_type = "full_attention" if layer_id % 2 else "linear_attention"
        if self.layer_type == "full_attention":
            self.self_attn = Qwen3_5Attention(fd_config, layer_id, f"{prefix}.self_attn")
        else:
            self.linear_attn = Qwen3_5GatedDeltaNet(fd_config, layer_id, f"{prefix}.linear_attn")

    def attend(self, forward_meta, hidden_states):
        layer = self.self_attn if self.layer_type == "full_attention" else self.linear_attn
        return layer(forward_meta=forward_meta, hidden_states=hidden_states)


class Qwen3_5Model(decoder.DecoderModel):
    layer_class = Qwen3_5DecoderLayer


@ModelRegistry.register("Qwen3_5ForConditionalGeneration")
class Qwen3_5ForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        self.model = Qwen3_5Model(fd_config)
