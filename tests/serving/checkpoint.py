"""Small random checkpoints in Hugging Face's layout, for FastDeploy's own loaders: float32, three layers, 512 words.

The words are w0 ... w506 and a few special ones; a chat template puts <user> and <assistant> around them.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(507))]
LAYERS, EXPERTS = 3, 8
COMMON = {
    "vocab_size": len(WORDS),
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "rope_theta": 10000.0,
    "attention_bias": False,
}
EXPERT = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True}
GLM = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": False,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    **EXPERT,
}
KINDS = {
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "attention_bias": True,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        **EXPERT,
    },
    "glm4_moe": GLM,
    "glm4_moe_qk_norm": {**GLM, "use_qk_norm": True},
}
# With these, the best word leads the second by more than 0.01 wherever the tests ask: float32 cannot turn it round.
SEEDS = {"qwen2": 4, "qwen3": 4, "qwen3_moe": 3, "glm4_moe": 10, "glm4_moe_qk_norm": 3}


def write_checkpoint(folder, kind, seed=None):
    """A model of one of KINDS. Returns its folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = {**COMMON, **KINDS[kind]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0}))
    _write_words(folder)
    save_file(
        _weights(config, np.random.default_rng(seed or SEEDS[kind])),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def _write_words(folder):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=SPECIAL[3:], **tokens)
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}<assistant>"  # no line breaks
    )
    fast.save_pretrained(folder)


def _weights(config, random):
    """Full weights by their names in a checkpoint."""
    weights = {}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, dim = config["num_key_value_heads"], config["head_dim"]

    def linear(name, out, inner):
        weights[f"{name}.weight"] = (random.standard_normal((out, inner)) / np.sqrt(inner)).astype("float32")

    def norm(name, size):
        weights[f"{name}.weight"] = (1 + 0.1 * random.standard_normal(size)).astype("float32")

    def mlp(name, inner):
        linear(f"{name}.gate_proj", inner, hidden)
        linear(f"{name}.up_proj", inner, hidden)
        linear(f"{name}.down_proj", hidden, inner)

    def small(name, *shape):
        weights[name] = (0.1 * random.standard_normal(shape)).astype("float32")

    weights["model.embed_tokens.weight"] = random.standard_normal((len(WORDS), hidden)).astype("float32")
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            linear(f"{layer}.self_attn.{name}_proj", count * dim, hidden)
            if config["model_type"] == "qwen2":
                small(f"{layer}.self_attn.{name}_proj.bias", count * dim)
        linear(f"{layer}.self_attn.o_proj", hidden, heads * dim)
        if config["model_type"] in ("qwen3", "qwen3_moe") or config.get("use_qk_norm"):
            norm(f"{layer}.self_attn.q_norm", dim)
            norm(f"{layer}.self_attn.k_norm", dim)
        norm(f"{layer}.input_layernorm", hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        if "moe_intermediate_size" not in config or layer.endswith(".0"):
            mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        for expert in range(EXPERTS):
            mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
        linear(f"{layer}.mlp.gate", EXPERTS, hidden)
        if config["model_type"] == "glm4_moe":
            mlp(f"{layer}.mlp.shared_experts", config["moe_intermediate_size"])
            small(f"{layer}.mlp.gate.e_score_correction_bias", EXPERTS)
    norm("model.norm", hidden)
    linear("lm_head", len(WORDS), hidden)
    weights["lm_head.weight"] *= 4  # so that the best word is far from the second
    return weights
