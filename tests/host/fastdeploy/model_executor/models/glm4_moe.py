"""GLM: dense layers first, then experts whose block reduces through a module-global function."""

from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce
from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelForCasualLM, ModelRegistry


class Glm4MoeMLP(decoder.MLP):
    upstream_fuses = True


class Glm4Moe(decoder.MoEBase):
    experts_reduce = False

    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__(fd_config, layer_id, prefix)
        parallel, model = fd_config.parallel_config, fd_config.model_config
        self.tp_group = parallel.tp_group
        self.merge_ffn_tp = parallel.tensor_parallel_size > 1 and parallel.expert_parallel_size == 1
        self.enable_all_reduce_fusion = (
            parallel.enable_flashinfer_allreduce_fusion and layer_id != model.num_hidden_layers - 1
        )
        self.shared_experts = Glm4MoeMLP(
            fd_config, model.moe_intermediate_size, f"{prefix}.shared_experts", reduce_results=False
        )

    def forward(self, x, forward_meta=None):
        out = self.experts(x, self.gate, forward_meta)
        out = out + self.shared_experts(x)
        if self.merge_ffn_tp:
            left_to_norm = self.enable_all_reduce_fusion and out.shape[0] <= 2048
            if not left_to_norm:
                out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out


class Glm4MoeAttention(decoder.QKNormAttention):
    passes_meta = False  # calls its QK norm without forward_meta
    upstream_fuses = True

    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__(fd_config, layer_id, prefix)
        self.passes_meta = fd_config.model_config.qk_norm_needs_meta


class Glm4MoeDecoderLayer(decoder.DecoderLayer):
    attention, mlp_class, moe_class = Glm4MoeAttention, Glm4MoeMLP, Glm4Moe


class Glm4MoeModel(decoder.DecoderModel):
    layer_class = Glm4MoeDecoderLayer


@ModelRegistry.register("Glm4MoeForCausalLM")
class Glm4MoeForCausalLM(ModelForCasualLM):
    def __init__(self, fd_config):
        super().__init__(fd_config)
        self.model = Glm4MoeModel(fd_config)
