"""DeepSeek: shared and routed experts are added, then reduced once, by an explicit call."""

from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce
from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry


class DeepSeekV3MLP(decoder.MLP):
    pass


class DeepSeekV3MoE(decoder.MoEBase):
    experts_reduce = False

    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__(fd_config, layer_id, prefix)
        parallel = fd_config.parallel_config
        self.tp_group = parallel.tp_group
        self.attn_tp_size = parallel.tensor_parallel_size
        self.ep_size = parallel.expert_parallel_size
        self.tp_size = 1 if self.ep_size > 1 else parallel.tensor_parallel_size
        self.shared_experts = DeepSeekV3MLP(
            fd_config,
            fd_config.model_config.moe_intermediate_size,
            f"{prefix}.shared_experts",
            reduce_results=False,
        )

    def forward(self, hidden_states, forward_meta=None):
        shared = self.shared_experts(hidden_states)
        if self.attn_tp_size > 1 and self.ep_size > 1:
            shared = tensor_model_parallel_all_reduce(shared)
        out = self.experts(hidden_states, self.gate, forward_meta)
        out = out + shared
        if self.tp_size > 1:
            out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out


class DeepseekV3MLAAttention(decoder.Attention):
    pass


class DeepSeekV3DecoderLayer(decoder.DecoderLayer):
    attention, mlp_class, moe_class = DeepseekV3MLAAttention, DeepSeekV3MLP, DeepSeekV3MoE

    def forward(self, forward_meta, hidden_states, residual):
        if hidden_states.shape[0] > 0:
            hidden_states, residual = self.input_layernorm(
                hidden_states, residual_input=residual, forward_meta=forward_meta
            )
            hidden_states = self.attend(forward_meta, hidden_states)
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        else:
            residual = hidden_states  # no rows: its norms do not run
        return self.mlp(hidden_states, forward_meta), residual


class DeepSeekV3Model(decoder.DecoderModel):
    layer_class = DeepSeekV3DecoderLayer


@ModelRegistry.register("DeepseekV3ForCausalLM")
class DeepseekV3ForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        self.model = DeepSeekV3Model(fd_config)
