"""The sizes of the demo's decoder, in the words of GLM-4.5's config.json, and the weights that follow from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fd_fusion.kernels.all_reduce.plan import plan_for

MAX_RANKS = 16
# What the decoder does in one way only. A checkpoint that asks for another is refused.
FIXED = {"hidden_act": "silu", "n_group": 1, "tie_word_embeddings": False, "rope_scaling": None}


@dataclass(frozen=True)
class DecoderConfig:
    """The keys of config.json that the decoder reads.

    Raises: ValueError: sizes that do not fit together; the message names the key.
    """

    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    first_k_dense_replace: int = 1
    vocab_size: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    partial_rotary_factor: float = 0.5
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    attention_bias: bool = True
    use_qk_norm: bool = True
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in _MAY_BE_ZERO else 1
            if field.type == "int" and (type(value) is not int or value < least):
                raise ValueError(f"{field.name} is {value!r}; give an integer from {least}")
            if field.type == "bool" and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}; give true or false")
            if field.type == "float" and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise ValueError(f"{field.name} is {value!r}; give a number above 0")
        if self.partial_rotary_factor > 1:
            raise ValueError(f"partial_rotary_factor is {self.partial_rotary_factor}; give a number up to 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}; choose another number of either"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is above n_routed_experts = "
                f"{self.n_routed_experts}; choose fewer experts a token"
            )
        if self.rotary_dim % 2:
            raise ValueError(
                f"head_dim = {self.head_dim}: its rotary part, {self.rotary_dim}, is odd; use another size"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def is_dense(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """Read the content of config.json; pass over keys that the decoder does not read."""
        for key, allowed in FIXED.items():
            if data.get(key, allowed) != allowed:
                raise ValueError(f"config.json: {key} is {data[key]!r}; the demo's decoder has {allowed!r} only")
        known = {field.name for field in dataclasses.fields(cls)}
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size"):
            if key not in data:
                raise ValueError(f"config.json: {key} is missing; give the config.json of a GLM-4.5 checkpoint")
        return cls(**{key: value for key, value in data.items() if key in known})

    def to_json(self) -> dict[str, Any]:
        about = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "dtype": "float32"}
        return {**about, **FIXED, **dataclasses.asdict(self)}

    def check_ranks(self, ranks: int, backend: str) -> None:
        """Raise ValueError when so many ranks cannot split the decoder, or the backend takes no such rows."""
        if not 1 <= ranks <= MAX_RANKS:
            raise ValueError(f"--nproc {ranks}: give a number from 1 to {MAX_RANKS}")
        keys = ["num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"]
        for key in [*keys, "moe_intermediate_size"]:
            if getattr(self, key) % ranks:
                raise ValueError(
                    f"{key} = {getattr(self, key)} is not a multiple of --nproc {ranks}; choose another of the two"
                )
        if backend == "triton" and ranks > 1:
            plan_for(ranks, self.hidden_size, "float32")


_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")


class Weight(NamedTuple):
    """A weight of the checkpoint: its whole shape, [out, in] for a linear, and the axis split over the ranks."""

    shape: tuple[int, ...]
    split: int | None = None


def expected_weights(config: DecoderConfig) -> dict[str, Weight]:
    """Return every weight of a checkpoint of this config. Embedding, router, norms and lm_head are on every rank."""
    hidden = config.hidden_size
    weights = {
        "model.embed_tokens.weight": Weight((config.vocab_size, hidden)),
        "model.norm.weight": Weight((hidden,)),
        "lm_head.weight": Weight((config.vocab_size, hidden)),
    }
    for layer in range(config.num_hidden_layers):
        block = {
            "input_layernorm.weight": Weight((hidden,)),
            "post_attention_layernorm.weight": Weight((hidden,)),
            **{f"self_attn.{name}": weight for name, weight in _attention(config).items()},
            **{f"mlp.{name}": weight for name, weight in _mlp_or_moe(config, layer).items()},
        }
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in block.items()}
    return weights


def _attention(config: DecoderConfig) -> dict[str, Weight]:
    hidden, q_size = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    weights = {"o_proj.weight": Weight((hidden, q_size), 1)}
    for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
        weights[f"{name}.weight"] = Weight((size, hidden), 0)
        if config.attention_bias:
            weights[f"{name}.bias"] = Weight((size,), 0)
    if config.use_qk_norm:
        weights["q_norm.weight"] = weights["k_norm.weight"] = Weight((config.head_dim,))
    return weights


def _mlp_or_moe(config: DecoderConfig, layer: int) -> dict[str, Weight]:
    hidden = config.hidden_size
    if config.is_dense(layer):
        return _mlp("", hidden, config.intermediate_size)
    weights = {
        "gate.weight": Weight((config.n_routed_experts, hidden)),
        "gate.e_score_correction_bias": Weight((config.n_routed_experts,)),
        **_mlp("shared_experts.", hidden, config.moe_intermediate_size * config.n_shared_experts),
    }
    for expert in range(config.n_routed_experts):
        weights |= _mlp(f"experts.{expert}.", hidden, config.moe_intermediate_size)
    return weights


def _mlp(prefix: str, hidden: int, size: int) -> dict[str, Weight]:
    return {
        f"{prefix}gate_proj.weight": Weight((size, hidden), 0),
        f"{prefix}up_proj.weight": Weight((size, hidden), 0),
        f"{prefix}down_proj.weight": Weight((hidden, size), 1),
    }
