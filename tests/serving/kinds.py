"""The models that are served here: small configs with the structure of the real ones, and what each kind needs.

The words are w0 ... w506 and a few special ones.
"""

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
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "topk_method": "noaux_tc",
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "rope_scaling": None,
    **EXPERT,
}
YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 128}
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
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "intermediate_size": EXPERT["moe_intermediate_size"],
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": EXPERT["num_experts_per_tok"],
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "yarn", **YARN},
    },
    "deepseek_v3": DEEPSEEK,
    "kimi_k2": {
        **DEEPSEEK,
        "model_type": "kimi_k2",
        "n_group": 1,
        "routed_scaling_factor": 2.827,
        "rope_scaling": {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **YARN},
    },
    "ernie4_5_moe": {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "moe_num_experts": EXPERTS,
        "moe_num_shared_experts": 1,
        "moe_k": EXPERT["num_experts_per_tok"],
        "moe_intermediate_size": EXPERT["moe_intermediate_size"],
        "moe_layer_start_index": 1,
        "moe_layer_end_index": LAYERS - 1,
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "use_bias": False,
    },
}
# As published: linears and experts in e4m3, with a scale for each block of 128 x 128, the rest in bfloat16.
IN_FP8 = {
    "torch_dtype": "bfloat16",
    "hidden_size": 256,
    "head_dim": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    },
}
KINDS |= {f"{kind}_fp8": {**KINDS[kind], **IN_FP8} for kind in ("glm4_moe", "qwen3_moe")}
# With these, the best word leads the second by more than 0.001 wherever the tests ask: float32 cannot turn it round.
SEEDS = {"qwen2": 4, "qwen3": 4, "qwen3_moe": 3, "glm4_moe": 10, "glm4_moe_qk_norm": 1}
SEEDS |= {"glm4_moe_fp8": 4, "qwen3_moe_fp8": 14}
SEEDS |= {"gpt_oss": 1, "deepseek_v3": 2, "kimi_k2": 2, "ernie4_5_moe": 2}
# What the host must be told to serve a kind here. Overlapped, it takes one step more when the last request has ended,
# in which DeepSeek's attention, if no graph pads it, has no output at all: the stock server dies.
MLA = {"FD_ATTENTION_BACKEND": "MLA_ATTN", "FD_MLA_USE_NAIVE": "1", "SERVING_CAPABILITY": "9"}
HOST_ENV = {"deepseek_v3": MLA, "kimi_k2": MLA}
HOST_ENV |= {kind: {"SERVING_DTYPE": "bfloat16"} for kind in ("glm4_moe_fp8", "qwen3_moe_fp8")}
HOST_ARGS = {kind: ["--no-enable-overlap-schedule"] for kind in ("deepseek_v3", "kimi_k2")}
