"""The configs of a worker: each copies the arguments that it has an attribute for, and no others."""

import json
import os

import paddle.distributed as dist


def _copy(target, args):
    for key, value in args.items():
        if hasattr(target, key):
            setattr(target, key, value)


class ModelConfig:
    def __init__(self, args):
        self.model = ""
        self.architectures = ["Qwen3ForCausalLM"]
        self.hidden_size, self.intermediate_size, self.moe_intermediate_size = 32, 48, 24
        self.num_hidden_layers, self.num_attention_heads, self.head_dim, self.vocab_size = 3, 4, 8, 64
        self.num_experts, self.first_k_dense_replace = 4, 1
        self.rms_norm_eps, self.attention_bias = 1e-6, True
        self.o_proj_bias = self.mlp_bias = False
        self.dtype = "float32"  # of weights and activations
        self.norm_dtype = self.post_norm_dtype = None  # of the norms' weights, where they have their own
        self.qk_norm_needs_meta, self.quantization = True, None
        _copy(self, args)
        path = os.path.join(self.model, "config.json")
        if os.path.exists(path):
            with open(path) as file:
                _copy(self, json.load(file))
        self.registry.modules[self.architectures[0]]  # an architecture that nobody knows is an error here

    @property
    def registry(self):
        """Imports the package of models, and with it the plugins, in whatever process builds a ModelConfig."""
        from fastdeploy.model_executor.models.model_base import ModelRegistry

        return ModelRegistry


class ParallelConfig:
    def __init__(self, args):
        self.tensor_parallel_rank, self.tensor_parallel_size = 0, 1
        self.expert_parallel_rank, self.expert_parallel_size = 0, 1
        self.data_parallel_rank, self.data_parallel_size = 0, 1
        self.enable_expert_parallel = False
        self.use_sequence_parallel_moe = False
        self.disable_custom_all_reduce = False
        self.enable_flashinfer_allreduce_fusion = False
        self.do_profile = False
        self.tp_group = None
        _copy(self, args)

    def set_communicate_group(self):
        """The tensor-parallel group of this rank. With gloo every rank creates every group, one after the other."""
        size = self.tensor_parallel_size
        for index in range(self.data_parallel_size):
            group = dist.new_group(range(index * size, (index + 1) * size))
            if dist.get_world_size() > 1:
                dist.barrier()
            if index == self.data_parallel_rank:
                self.tp_group = group


class LoadConfig:
    def __init__(self, args):
        pass


class SpeculativeConfig:
    def __init__(self, args):
        self.method, self.model_type, self.sharing_model = None, "main", None
        _copy(self, args or {})


class GraphOptimizationConfig:
    def __init__(self, args):
        self.graph_opt_level, self.use_cudagraph = 0, True
        _copy(self, args or {})

    def to_json_string(self):
        return json.dumps(self.__dict__)


class BlockWiseFP8Config:
    weight_block_size, deepgemm_scale_ue8m0 = [128, 128], False


class FDConfig:
    def __init__(self, model_config, parallel_config, load_config, speculative_config, graph_opt_config):
        self.model_config, self.parallel_config = model_config, parallel_config
        self.load_config, self.speculative_config = load_config, speculative_config
        self.graph_opt_config, self.quant_config = graph_opt_config, None
        if model_config.quantization == "block_wise_fp8":
            self.quant_config = BlockWiseFP8Config()
