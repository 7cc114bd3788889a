"""The registry of model classes, and what every causal language model does the same way."""

import importlib
from typing import ClassVar

import paddle
from paddle import nn

from fastdeploy import envs


class ModelRegistry:
    _classes: ClassVar[dict] = {}
    # Where an architecture lives, for the version that imports models only when they are asked for.
    modules: ClassVar[dict] = {
        "Glm4MoeForCausalLM": "glm4_moe",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "Qwen3MoeForCausalLM": "qwen3moe",
        "DeepseekV3ForCausalLM": "deepseek_v3",
        "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
        "Ernie4_5_MTPForCausalLM": "ernie4_5_moe",
        "MiniMaxM2ForCausalLM": "minimax_m2_5",
        "Qwen3_5ForConditionalGeneration": "qwen3_5",
    }

    @classmethod
    def register(cls, architecture):
        def decorate(model_class):
            cls._classes[architecture] = model_class
            return model_class

        return decorate

    @classmethod
    def get_class(cls, architecture):
        if envs.HOST_LAZY_MODELS:
            importlib.import_module(f"fastdeploy.model_executor.models.{cls.modules[architecture]}")
        return cls._classes[architecture]


class ModelForCasualLM(nn.Layer):
    stacked = (
        ("qkv_proj", "q_proj", "q"),
        ("qkv_proj", "k_proj", "k"),
        ("qkv_proj", "v_proj", "v"),
        ("up_gate_proj", "gate_proj", "gate"),
        ("up_gate_proj", "up_proj", "up"),
        ("qk_norm.q_norm", "q_norm", None),
        ("qk_norm.k_norm", "k_norm", None),
    )

    def __init__(self, fd_config):
        super().__init__()
        self.fd_config = fd_config

    @paddle.no_grad()
    def load_weights(self, weights_iterator):
        """By attribute path, through each parameter's `weight_loader`."""
        params = dict(self.named_parameters())
        for name, weight in weights_iterator:
            if ".experts." in name:
                head, expert, part, _ = name.rsplit(".", 3)
                which = "down_proj_weight" if part == "down_proj" else "up_gate_proj_weight"
                param = params[f"{head}.{which}"]
                param.weight_loader(param, weight, int(expert), part.split("_")[0])
                continue
            for target, source, shard in self.stacked:
                if f".{source}." in name and name.replace(source, target) in params:
                    param = params[name.replace(source, target)]
                    param.weight_loader(param, weight, shard) if shard else _copy(param, weight)
                    break
            else:
                param = params[name]
                getattr(param, "weight_loader", _copy)(param, weight)

    def compute_logits(self, hidden_states, forward_meta=None):
        return hidden_states.astype("float32") @ self.model.embed_tokens.weight.astype("float32").T

    def forward(self, inputs, forward_meta):
        return self.model(ids_remove_padding=inputs["ids_remove_padding"], forward_meta=forward_meta)


def _copy(param, weight):
    param.copy_(weight.astype(param.dtype), False)
