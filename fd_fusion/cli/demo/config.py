"""The sizes of the demo's decoder, in the words of GLM-4.5's config.json, and the weights that follow from them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fd_fusion.kernels.all_reduce.plan import plan_for
from fd_fusion.reference import FP8_GROUP

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
    quantised: bool = False  # to FP8: what reads a norm; norms, residual and the other linears are bfloat16 then

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in _MAY_BE_ZERO else 1
            right, wanted = {
                "int": (type(value) is int and value >= least, f"an integer from {least}"),
                "bool": (type(value) is bool, "true or false"),
                "float": (type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
            }[field.type]
            if not right:
                raise ValueError(f"{field.name} is {value!r}; give {wanted}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        chosen, experts = self.num_experts_per_tok, self.n_routed_experts
        if self.partial_rotary_factor > 1:
            raise ValueError(f"partial_rotary_factor is {self.partial_rotary_factor}; give a number up to 1")
        if heads % kv_heads:
            what = f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
            raise ValueError(f"{what}; choose another number of either")
        if chosen > experts:
            what = f"num_experts_per_tok = {chosen} is above n_routed_experts = {experts}"
            raise ValueError(f"{what}; choose fewer experts a token")
        if self.rotary_dim % 2:
            what = f"head_dim = {self.head_dim}: its rotary part, {self.rotary_dim}, is odd"
            raise ValueError(f"{what}; use another size")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def dtype(self) -> str:
        """Of the residual, the norms and the partial sums."""
        return "bfloat16" if self.quantised else "float32"

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
            plan_for(ranks, self.hidden_size, self.dtype)
        if self.quantised:
            self._check_blocks(ranks)

    def _check_blocks(self, ranks: int) -> None:
        """Raise ValueError where a rank would have a block of weights in part, and more than that."""
        heads, kv_heads, size = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        mlp = self.intermediate_size, self.moe_intermediate_size, self.moe_intermediate_size * self.n_shared_experts
        for rows in (width // ranks for width in (heads * size, kv_heads * size, *mlp)):
            if self.hidden_size % FP8_GROUP or (rows % FP8_GROUP and FP8_GROUP % rows):
                what = f"--quantised: hidden_size = {self.hidden_size} and {rows} rows of weights on a rank"
                raise ValueError(f"{what} are not whole blocks of {FP8_GROUP}; choose other sizes")


_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every weight of a checkpoint of this config, [out, in] for a linear."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.input_layernorm": (hidden,), f"{name}.post_attention_layernorm": (hidden,)}
        shapes |= _attention(config, f"{name}.self_attn")
        if config.is_dense(layer):
            shapes |= _mlp(f"{name}.mlp", hidden, config.intermediate_size)
            continue
        size = config.moe_intermediate_size
        shapes |= {f"{name}.mlp.gate": (config.n_routed_experts, hidden)}
        shapes |= {f"{name}.mlp.gate.e_score_correction_bias": (config.n_routed_experts,)}
        shapes |= _mlp(f"{name}.mlp.shared_experts", hidden, size * config.n_shared_experts)
        for expert in range(config.n_routed_experts):
            shapes |= _mlp(f"{name}.mlp.experts.{expert}", hidden, size)
    return {name if name.endswith("bias") else f"{name}.weight": shape for name, shape in shapes.items()}


def _attention(config: DecoderConfig, name: str) -> dict[str, tuple[int, ...]]:
    size, hidden = config.head_dim, config.hidden_size
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    shapes = {f"{name}.o_proj": (hidden, config.num_attention_heads * size)}
    for one, count in heads.items():
        shapes[f"{name}.{one}_proj"] = (count * size, hidden)
        if config.attention_bias:
            shapes[f"{name}.{one}_proj.bias"] = (count * size,)
    if config.use_qk_norm:
        shapes |= {f"{name}.q_norm": (size,), f"{name}.k_norm": (size,)}
    return shapes


def _mlp(name: str, hidden: int, size: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.{one}_proj": (size, hidden) for one in ("gate", "up")}
    return {**shapes, f"{name}.down_proj": (hidden, size)}


def split_axis(name: str) -> int | None:
    """Return the axis of a weight that is split over the ranks. None: embedding, router, norms, lm_head are whole."""
    linear = re.search(r"\.(\w+)_proj\.", name)
    return None if linear is None else 1 if linear[1] in ("o", "down") else 0
