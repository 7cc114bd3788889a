"""One process, NumPy, float64, no cache: the greedy answer to a prompt, written apart from FastDeploy and from us."""

import json

import numpy as np
from safetensors.paddle import load_file

from serving.kinds import WORDS

EOS = 1


def _magnitude(factor, part):
    """YaRN's, for a context that is `factor` times as long as the one that was trained."""
    return 0.1 * part * np.log(factor) + 1


class Truth:
    """The model of a folder made by `write_checkpoint`."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors").items()
        self._weights = {name: weight.astype("float64").numpy() for name, weight in stored}
        for name in [name for name in self._weights if name.endswith("_scale_inv")]:
            scale = self._weights.pop(name).repeat(128, 0).repeat(128, 1)
            self._weights[name.removesuffix("_scale_inv")] *= scale

    def answer(self, prompt, tokens):
        """(its first `tokens` words, the smallest lead of a best word over the second). The first is never eos."""
        ids = [WORDS.index(word) for word in f"<user> {prompt} <assistant>".split()]
        made, leads = [], []
        for _ in range(tokens):
            logits = self.logits(np.array(ids))
            if not made:
                logits[EOS] = -np.inf
            second, first = np.sort(logits)[-2:]
            leads.append(first - second)
            ids.append(int(np.argmax(logits)))
            made.append(WORDS[ids[-1]])
        return made, min(leads)

    def logits(self, ids):
        """Of the word behind `ids`, [V]."""
        x = self._weights["model.embed_tokens.weight"][ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = x + self._attention(f"{layer}.self_attn", self._norm(f"{layer}.input_layernorm", x))
            x = x + self._block(f"{layer}.mlp", self._norm(f"{layer}.post_attention_layernorm", x))
        return self._linear("lm_head", self._norm("model.norm", x[-1:]))[0]

    def _linear(self, name, x):
        out = x @ self._weights[f"{name}.weight"].T
        return out + self._weights[f"{name}.bias"] if f"{name}.bias" in self._weights else out

    def _norm(self, name, x):
        """x / sqrt(mean(x^2) + eps) * weight"""
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config["rms_norm_eps"]) * self._weights[f"{name}.weight"]

    def _attention(self, name, x):
        if "kv_lora_rank" in self.config:
            return self._latent_attention(name, x)
        rows, dim = len(x), self.config["head_dim"]
        q, k, v = (self._linear(f"{name}.{part}_proj", x).reshape(rows, -1, dim) for part in "qkv")
        if f"{name}.q_norm.weight" in self._weights:
            q, k = self._norm(f"{name}.q_norm", q), self._norm(f"{name}.k_norm", k)
        layer = int(name.split(".")[2])
        slides = self.config.get("layer_types", [""] * (layer + 1))[layer] == "sliding_attention"
        window = self.config["sliding_window"] if slides else rows
        q, k = self._rope(q), self._rope(k)
        groups = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
        out = self._softmax_of(q, k, v, window, self._weights.get(f"{name}.sinks"))
        return self._linear(f"{name}.o_proj", out)

    def _latent_attention(self, name, x):
        """q and k are a part without rope and a part with; k's part with rope is one for all heads."""
        rows, nope, rope = len(x), self.config["qk_nope_head_dim"], self.config["qk_rope_head_dim"]
        q = self._linear(f"{name}.q_b_proj", self._norm(f"{name}.q_a_layernorm", self._linear(f"{name}.q_a_proj", x)))
        q = q.reshape(rows, -1, nope + rope)
        both = self._linear(f"{name}.kv_a_proj_with_mqa", x)
        latent = self._norm(f"{name}.kv_a_layernorm", both[:, :-rope])
        k, v = np.split(self._linear(f"{name}.kv_b_proj", latent).reshape(rows, q.shape[1], -1), [nope], -1)
        turned = np.repeat(self._rope(both[:, None, -rope:]), q.shape[1], 1)
        q = np.concatenate([q[..., :nope], self._rope(q[..., nope:])], -1)
        yarn = self.config["rope_scaling"]
        sharp = _magnitude(yarn["factor"], yarn["mscale_all_dim"]) ** 2 if yarn else 1
        out = self._softmax_of(q * sharp, np.concatenate([k, turned], -1), v, rows)
        return self._linear(f"{name}.o_proj", out)

    def _softmax_of(self, q, k, v, window, sinks=None):
        """Row i sees the rows from i - window + 1 on to itself. A head's sink takes its part of the softmax away."""
        rows = len(q)
        q, k, v = (part.transpose(1, 0, 2) for part in (q, k, v))  # [heads, rows, D]
        score = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
        score = score * (np.tri(rows) - np.tri(rows, k=-window))
        total = score.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks)[:, None, None]
        return (score / total @ v).transpose(1, 0, 2).reshape(rows, -1)

    def _rope(self, x):
        """The first part of each head turned: (a, b) -> (a cos - b sin, b cos + a sin). a and b are the two halves of
        that part, or, in ERNIE and DeepSeek, neighbours.
        """
        size = int(x.shape[-1] * self.config.get("partial_rotary_factor", 1))
        speed, scale = self._speeds(size)
        angle = np.arange(len(x))[:, None] * speed
        cos, sin = scale * np.cos(angle)[:, None], scale * np.sin(angle)[:, None]
        neighbours = self.config["model_type"] in ("ernie4_5_moe", "deepseek_v3", "kimi_k2")
        one, two = np.arange(size).reshape(-1, 2).T if neighbours else np.arange(size).reshape(2, -1)
        out = x.copy()
        out[..., one], out[..., two] = x[..., one] * cos - x[..., two] * sin, x[..., two] * cos + x[..., one] * sin
        return out

    def _speeds(self, size):
        """(the angle of each pair a row, what cos and sin are multiplied by): plain, or YaRN's."""
        base, half = self.config["rope_theta"], size // 2
        plain = base ** (-np.arange(half) / half)
        yarn = self.config.get("rope_scaling")
        if not yarn:
            return plain, 1.0
        long = yarn["original_max_position_embeddings"]
        low, high = (
            half * np.log(long / (turns * 2 * np.pi)) / np.log(base)
            for turns in (yarn["beta_fast"], yarn["beta_slow"])
        )
        low, high = max(np.floor(low), 0), min(np.ceil(high), size - 1)
        slowed = np.clip((np.arange(half) - low) / (high - low), 0, 1)
        scale = _magnitude(yarn["factor"], yarn.get("mscale", 1))
        scale /= _magnitude(yarn["factor"], yarn.get("mscale_all_dim", 0))
        return plain * (1 - slowed + slowed / yarn["factor"]), scale

    def _block(self, name, x):
        if f"{name}.gate_proj.weight" in self._weights:
            return self._mlp(name, x)
        in_one = f"{name}.experts.gate_up_proj" in self._weights
        ids, weights = self._route(name, self._linear(f"{name}.{'router' if in_one else 'gate'}", x))
        out = np.zeros_like(x)
        if f"{name}.shared_experts.gate_proj.weight" in self._weights:
            out = self._mlp(f"{name}.shared_experts", x)
        for row in range(len(x)):
            for expert, weight in zip(ids[row], weights[row]):
                one = self._clamped(name, expert, x[row]) if in_one else self._mlp(f"{name}.experts.{expert}", x[row])
                out[row] += weight * one
        return out

    def _clamped(self, name, expert, x):
        """down(min(a, 7) sigmoid(1.702 min(a, 7)) (clamp(b, -7, 7) + 1)), a and b in turn."""
        both, both_bias, down, bias = (
            self._weights[f"{name}.experts.{part}"][expert]
            for part in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        )
        hidden = x @ both + both_bias
        a, b = np.minimum(hidden[0::2], 7), np.clip(hidden[1::2], -7, 7)
        return a / (1 + np.exp(-1.702 * a)) * (b + 1) @ down + bias

    def _mlp(self, name, x):
        """down(silu(gate(x)) * up(x))"""
        gate = self._linear(f"{name}.gate_proj", x)
        return self._linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * self._linear(f"{name}.up_proj", x))

    def _route(self, name, gate):
        """GLM and DeepSeek choose by sigmoid(gate) + bias and weigh by sigmoid(gate); the others by softmax(gate),
        ERNIE with a bias for the choice. DeepSeek chooses from the best groups, by their two best experts, alone.
        """
        if f"{name}.gate.e_score_correction_bias" in self._weights:
            score = 1 / (1 + np.exp(-gate))
            choose = score + self._weights[f"{name}.gate.e_score_correction_bias"]
        else:
            score = np.exp(gate) / np.exp(gate).sum(-1, keepdims=True)
            choose = score + self._weights.get(f"{name}.moe_statics.e_score_correction_bias", 0)
        groups = self.config.get("n_group", 1)
        by_group = choose.reshape(len(gate), groups, -1)
        best = np.sort(by_group, -1)[..., -2:].sum(-1)
        left_out = np.argsort(-best, -1)[:, self.config.get("topk_group", 1) :]
        np.put_along_axis(by_group, left_out[..., None], -np.inf, 1)
        top_k = self.config.get("num_experts_per_tok") or self.config["moe_k"]
        ids = np.argsort(-by_group.reshape(choose.shape), -1)[:, :top_k]
        weights = np.take_along_axis(score, ids, 1)
        return ids, weights / weights.sum(-1, keepdims=True) * self.config.get("routed_scaling_factor", 1.0)
