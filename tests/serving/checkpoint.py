"""Small random checkpoints in Hugging Face's layout, for FastDeploy's own loaders: float32, three layers, 512 words.

A chat template puts <user> and <assistant> around the words.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serving.kinds import COMMON, EXPERTS, KINDS, LAYERS, SEEDS, SPECIAL, WORDS

LEAD = 40.0
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}<assistant>"  # no line breaks


def write_checkpoint(folder, kind, seed=None, **changes):
    """A model of one of KINDS. Returns its folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = {**COMMON, **KINDS[kind], **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0}))
    _write_words(folder, kind)
    weights = _weights(config, np.random.default_rng(seed or SEEDS[kind]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_words(folder, kind):
    tokens = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL))
    if kind.startswith("ernie"):
        return _write_pieces(folder, tokens)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=SPECIAL[3:], **tokens)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def _write_pieces(folder, tokens):
    """ERNIE's tokenizer reads a vocabulary of SentencePiece: each word is one piece."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.trainer_spec.model_type = proto.TrainerSpec.WORD
    for i, word in enumerate(WORDS):
        kind = "UNKNOWN" if word == "<unk>" else "CONTROL" if word in SPECIAL else "NORMAL"
        piece = word if word in SPECIAL else f"\u2581{word}"
        model.pieces.add(piece=piece, score=-float(i), type=getattr(proto.ModelProto.SentencePiece, kind))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    tokens |= dict.fromkeys(("bos_token", "cls_token", "sep_token", "mask_token"), "<pad>")
    tokens |= {"additional_special_tokens": SPECIAL[3:], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Ernie4_5Tokenizer", **tokens}))


def _weights(config, random):
    """Full weights by their names in a checkpoint."""
    made = _Random(config, random)
    made.normal("model.embed_tokens.weight", len(WORDS), config["hidden_size"])
    for i in range(LAYERS):
        made.attention(f"model.layers.{i}.self_attn")
        made.norm(f"model.layers.{i}.input_layernorm")
        made.norm(f"model.layers.{i}.post_attention_layernorm")
        if config["model_type"] == "gpt_oss":
            made.experts_in_one(f"model.layers.{i}.mlp")
        elif "moe_intermediate_size" not in config or i == 0:
            made.mlp(f"model.layers.{i}.mlp", config["intermediate_size"])
        else:
            made.experts(f"model.layers.{i}.mlp")
    made.norm("model.norm")
    made.linear("lm_head", len(WORDS))
    made.weights["lm_head.weight"] *= 4  # so that the best word is far from the second
    if "quantization_config" in config:
        made.lead()
        made.quantise()
    return made.weights


class _Random:
    def __init__(self, config, random):
        self.config, self._random, self.weights = config, random, {}

    def normal(self, name, *shape, scale=1.0):
        self.weights[name] = (scale * self._random.standard_normal(shape)).astype("float32")

    def linear(self, name, out, inner=None, bias=False):
        inner = inner or self.config["hidden_size"]
        self.normal(f"{name}.weight", out, inner, scale=inner**-0.5)
        if bias:
            self.normal(f"{name}.bias", out, scale=0.1)

    def lead(self):
        """Let each word have one that likes to follow it, so that rounding to FP8 seldom turns the order round."""
        words, follow = self.weights["model.embed_tokens.weight"], self._random.permutation(len(WORDS))
        self.weights["lm_head.weight"][follow] += LEAD * words / words.shape[1]

    def quantise(self):
        """Linears, of sizes that 128 divides, as e4m3 codes with a scale for each block; the rest as halves."""
        for name, weight in list(self.weights.items()):
            if not name.endswith("_proj.weight"):
                self.weights[name] = weight if name.endswith("_bias") else weight.astype(ml_dtypes.bfloat16)
                continue
            blocks = weight.reshape(len(weight) // 128, 128, -1, 128)
            scale = np.abs(blocks).max((1, 3), keepdims=True) / 448
            self.weights[name] = (blocks / scale).astype(ml_dtypes.float8_e4m3fn).reshape(weight.shape)
            self.weights[f"{name}_scale_inv"] = scale[:, 0, :, 0]

    def norm(self, name, size=None):
        self.normal(f"{name}.weight", size or self.config["hidden_size"], scale=0.1)
        self.weights[f"{name}.weight"] += 1

    def mlp(self, name, inner):
        self.linear(f"{name}.gate_proj", inner)
        self.linear(f"{name}.up_proj", inner)
        self.linear(f"{name}.down_proj", self.config["hidden_size"], inner)

    def attention(self, name):
        config = self.config
        if "kv_lora_rank" in config:
            return self.latent_attention(name)
        heads, dim, bias = config["num_attention_heads"], config["head_dim"], config["attention_bias"]
        for part, count in (("q", heads), ("k", config["num_key_value_heads"]), ("v", config["num_key_value_heads"])):
            self.linear(f"{name}.{part}_proj", count * dim, bias=bias)
        all_biased = config["model_type"] == "gpt_oss"
        self.linear(f"{name}.o_proj", config["hidden_size"], heads * dim, bias=all_biased)
        if all_biased:
            self.normal(f"{name}.sinks", heads)
        if config["model_type"] in ("qwen3", "qwen3_moe") or config.get("use_qk_norm"):
            self.norm(f"{name}.q_norm", dim)
            self.norm(f"{name}.k_norm", dim)

    def latent_attention(self, name):
        config = self.config
        heads, latent, rope = config["num_attention_heads"], config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        self.linear(f"{name}.q_a_proj", config["q_lora_rank"])
        self.norm(f"{name}.q_a_layernorm", config["q_lora_rank"])
        self.linear(f"{name}.q_b_proj", heads * (nope + rope), config["q_lora_rank"])
        self.linear(f"{name}.kv_a_proj_with_mqa", latent + rope)
        self.norm(f"{name}.kv_a_layernorm", latent)
        self.linear(f"{name}.kv_b_proj", heads * (nope + value), latent)
        self.linear(f"{name}.o_proj", config["hidden_size"], heads * value)

    def experts(self, name):
        inner, kind = self.config["moe_intermediate_size"], self.config["model_type"]
        for expert in range(EXPERTS):
            self.mlp(f"{name}.experts.{expert}", inner)
        self.linear(f"{name}.gate", EXPERTS)
        if kind != "qwen3_moe":
            self.mlp(f"{name}.shared_experts", inner)
            place = "moe_statics" if kind == "ernie4_5_moe" else "gate"
            shape = (1, EXPERTS) if kind == "ernie4_5_moe" else (EXPERTS,)
            self.normal(f"{name}.{place}.e_score_correction_bias", *shape, scale=0.1)

    def experts_in_one(self, name):
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        self.linear(f"{name}.router", EXPERTS, bias=True)
        self.normal(f"{name}.experts.gate_up_proj", EXPERTS, hidden, 2 * inner, scale=hidden**-0.5)
        self.normal(f"{name}.experts.gate_up_proj_bias", EXPERTS, 2 * inner, scale=0.1)
        self.normal(f"{name}.experts.down_proj", EXPERTS, inner, hidden, scale=inner**-0.5)
        self.normal(f"{name}.experts.down_proj_bias", EXPERTS, hidden, scale=0.1)
