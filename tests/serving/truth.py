"""One process, NumPy, float64, no cache: the greedy answer to a prompt, written apart from FastDeploy and from us."""

import json

import numpy as np
from safetensors.numpy import load_file

from serving.checkpoint import WORDS

EOS = 1


class Truth:
    """The model of a folder made by `write_checkpoint`."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self._weights = {name: w.astype("float64") for name, w in load_file(folder / "model.safetensors").items()}

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
        rows, dim = len(x), self.config["head_dim"]
        q, k, v = (self._linear(f"{name}.{part}_proj", x).reshape(rows, -1, dim) for part in "qkv")
        if f"{name}.q_norm.weight" in self._weights:
            q, k = self._norm(f"{name}.q_norm", q), self._norm(f"{name}.k_norm", k)
        q, k = self._rope(q), self._rope(k)
        groups = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, groups, 1), np.repeat(v, groups, 1)
        q, k, v = (part.transpose(1, 0, 2) for part in (q, k, v))  # [heads, rows, D]
        score = q @ k.transpose(0, 2, 1) / np.sqrt(dim)
        score = np.where(np.tri(rows, dtype=bool), score, -np.inf)
        score = np.exp(score - score.max(-1, keepdims=True))
        out = score / score.sum(-1, keepdims=True) @ v
        return self._linear(f"{name}.o_proj", out.transpose(1, 0, 2).reshape(rows, -1))

    def _rope(self, x):
        """The first part of each head turned: (a, b) -> (a cos - b sin, b cos + a sin), a and b its two halves."""
        size = int(x.shape[-1] * self.config.get("partial_rotary_factor", 1))
        half = size // 2
        angle = np.arange(len(x))[:, None] * self.config["rope_theta"] ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:size]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., size:]], -1)

    def _block(self, name, x):
        if f"{name}.gate_proj.weight" in self._weights:
            return self._mlp(name, x)
        ids, weights = self._route(self._linear(f"{name}.gate", x), f"{name}.gate.e_score_correction_bias")
        out = np.zeros_like(x)
        if f"{name}.shared_experts.gate_proj.weight" in self._weights:
            out = self._mlp(f"{name}.shared_experts", x)
        for row in range(len(x)):
            for expert, weight in zip(ids[row], weights[row]):
                out[row] += weight * self._mlp(f"{name}.experts.{expert}", x[row])
        return out

    def _mlp(self, name, x):
        """down(silu(gate(x)) * up(x))"""
        gate = self._linear(f"{name}.gate_proj", x)
        return self._linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * self._linear(f"{name}.up_proj", x))

    def _route(self, gate, bias):
        """GLM chooses by sigmoid(gate) + bias and weighs by sigmoid(gate); Qwen by softmax(gate) alone."""
        if bias in self._weights:
            score = 1 / (1 + np.exp(-gate))
            choose = score + self._weights[bias]
        else:
            score = choose = np.exp(gate) / np.exp(gate).sum(-1, keepdims=True)
        ids = np.argsort(-choose, -1)[:, : self.config["num_experts_per_tok"]]
        weights = np.take_along_axis(score, ids, 1)
        return ids, weights / weights.sum(-1, keepdims=True) * self.config.get("routed_scaling_factor", 1.0)
