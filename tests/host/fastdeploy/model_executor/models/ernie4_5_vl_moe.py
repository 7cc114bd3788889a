"""Ernie 4.5 VL: rows of text and of images go to experts of their own, and the block reduces their sums once."""

import paddle
from paddle import nn

from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce
from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.ernie4_5_moe import Ernie4_5_Attention, Ernie4_5_MLP
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry


class Ernie4_5_VLMLP(Ernie4_5_MLP):
    pass


class Ernie4_5_VLAttention(Ernie4_5_Attention):
    pass


class Ernie4_5_VLMoeBlock(decoder.MoEBase):
    experts_reduce = False

    def forward(self, hidden_states, forward_meta):
        return self.experts(hidden_states, self.gate, forward_meta)


def text_image_gather_scatter(hidden_states, text, image, is_image, to_parts):
    """Rows to the two parts, or back: in place, as the host's op does it."""
    rows = paddle.nonzero(is_image).flatten(), paddle.nonzero(~is_image).flatten()
    if to_parts:
        return hidden_states, hidden_states[rows[1]], hidden_states[rows[0]]
    for part, where in zip((image, text), rows):
        if where.shape[0]:
            hidden_states[where] = part
    return hidden_states, text, image


class Ernie4_5_VLMoE(nn.Layer):
    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__()
        self.tp_size = fd_config.parallel_config.tensor_parallel_size
        self.text_fused_moe = Ernie4_5_VLMoeBlock(fd_config, layer_id, f"{prefix}.text_fused_moe")
        width = fd_config.model_config.moe_intermediate_size
        self.image_fused_moe = Ernie4_5_VLMLP(fd_config, width, f"{prefix}.image_fused_moe", reduce_results=False)
        self.num_shared_experts = 1
        self.shared_experts = Ernie4_5_VLMLP(fd_config, width, f"{prefix}.shared_experts", reduce_results=False)

    def forward(self, hidden_states, forward_meta, vl_moe_meta):
        if self.num_shared_experts > 0:
            shared_experts_out = self.shared_experts(hidden_states)
        hidden_states, text_input, image_input = text_image_gather_scatter(
            hidden_states, None, None, vl_moe_meta, True
        )
        text_out = self.text_fused_moe(text_input, forward_meta)
        image_out = self.image_fused_moe(image_input, forward_meta)
        hidden_states, _, _ = text_image_gather_scatter(hidden_states, text_out, image_out, vl_moe_meta, False)
        if self.num_shared_experts > 0:
            hidden_states += shared_experts_out
        if self.tp_size > 1:
            hidden_states = tensor_model_parallel_all_reduce(hidden_states)
        return hidden_states


class Ernie4_5_VLDecoderLayer(decoder.DecoderLayer):
    attention, mlp_class, moe_class = Ernie4_5_VLAttention, Ernie4_5_VLMLP, Ernie4_5_VLMoE

    def forward(self, forward_meta, hidden_states, residual=None, vl_moe_meta=None):
        hidden_states, residual = self.input_layernorm(
            hidden_states, residual_input=residual, forward_meta=forward_meta
        )
        hidden_states = self.self_attn(hidden_states=hidden_states, forward_meta=forward_meta)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        if isinstance(self.mlp, Ernie4_5_VLMoE):
            hidden_states = self.mlp(hidden_states, forward_meta, vl_moe_meta)
        else:
            hidden_states = self.mlp(hidden_states, forward_meta)
        return hidden_states, residual


class Ernie4_5_VLModel(decoder.DecoderModel):
    layer_class = Ernie4_5_VLDecoderLayer

    def forward(self, ids_remove_padding, forward_meta):
        hidden_states = self.embed_tokens(ids_remove_padding).astype(self.embed_dtype)
        is_image = ids_remove_padding % 3 == 1
        residual = None
        for i in range(self.num_layers):
            hidden_states, residual = self.layers[i](forward_meta, hidden_states, residual, is_image)
        return self.norm(hidden_states, residual, forward_meta=forward_meta)[0]


@ModelRegistry.register("Ernie4_5_VLMoeForConditionalGeneration")
class Ernie4_5_VLMoeForConditionalGeneration(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        self.model = Ernie4_5_VLModel(fd_config)
