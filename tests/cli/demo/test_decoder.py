"""The demo's checkpoint, and its two decoders: Paddle with a cache, NumPy without."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fd_fusion.cli.demo import command as demo
from fd_fusion.cli.demo.checkpoint import Checkpoint, wide_blocks, write_checkpoint
from fd_fusion.cli.demo.config import DecoderConfig, expected_shapes, split_axis
from fd_fusion.cli.demo.reference import ReferenceDecoder, make_truth
from fd_fusion.reference import budget, value_of_e4m3

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "vocab_size": 48,
}


def written(folder, **changes):
    write_checkpoint(folder, DecoderConfig(**{**TINY, **changes}), seed=3)
    return folder


def test_checkpoint_names_are_those_of_glm(tmp_path):
    names = load_file(written(tmp_path) / "model.safetensors").keys()
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= names
    assert not {"model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.gate.weight"} & names


def test_shards_put_together_are_the_weight(tmp_path):
    stored = load_file(written(tmp_path) / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name in expected_shapes(checkpoint.config):
        shards, axis = [checkpoint.read(name, rank, 2) for rank in range(2)], split_axis(name)
        whole = shards[0] if axis is None else np.concatenate(shards, axis=axis)
        assert np.array_equal(whole, stored[name]) and np.array_equal(checkpoint.read(name), stored[name])


def test_a_bfloat16_checkpoint_in_two_files_with_a_prediction_layer(tmp_path):
    stored = load_file(written(tmp_path) / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored["model.layers.2.eh_proj.weight"] = np.ones((4, 4), np.float32)
    names = sorted(stored)
    (tmp_path / "model.safetensors").unlink()
    for i, part in enumerate((names[:20], names[20:])):
        header, data = {}, b""
        for name in part:
            bits = stored[name].astype(ml_dtypes.bfloat16).tobytes()
            offsets = [len(data), len(data) + len(bits)]
            header[name] = {"dtype": "BF16", "shape": stored[name].shape, "data_offsets": offsets}
            data += bits
        text = json.dumps(header).encode()
        (tmp_path / f"model-{i}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    checkpoint = Checkpoint(tmp_path)
    for name in checkpoint.stored:
        rounded = stored[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(checkpoint.read(name), rounded) and not np.array_equal(rounded, np.zeros_like(rounded))
    assert "model.layers.2.eh_proj.weight" not in checkpoint.stored


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("lm_head.weight"), "lm_head.weight missing"),
        (lambda w: w.update({"model.extra": w["model.norm.weight"]}), "model.extra not expected"),
        (
            lambda w: w.update({"model.norm.weight": np.ones(8, np.float32)}),
            "model.norm.weight is [8] instead of [32]",
        ),
        (lambda w: [w.pop(name) for name in list(w) if "experts" in name], "and 12 more missing"),
    ],
)
def test_a_wrong_checkpoint_is_told_by_name(change, says, tmp_path, capsys):
    weights = load_file(written(tmp_path) / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    assert demo.main(["--checkpoint", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_broken_checkpoint_is_told(tmp_path):
    file = written(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-4], whole[:100], b"", b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            Checkpoint(tmp_path)
    save_file({"model.norm.weight": np.ones(32, np.int64)}, file)
    with pytest.raises(ValueError, match=r"of F32, F16, F64, BF16, .*model\.norm\.weight is of I64"):
        Checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_group": 2}))
    with pytest.raises(ValueError, match="n_group is 2; the demo's decoder has 1 only"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_qk_norm": False, "attention_bias": False},
        {"norm_topk_prob": False, "num_experts_per_tok": 4, "routed_scaling_factor": 1.0},
        {"partial_rotary_factor": 1.0, "num_key_value_heads": 4, "n_shared_experts": 2},
        {"first_k_dense_replace": 2, "num_key_value_heads": 1},
    ],
)
def test_the_two_decoders_agree(changes, tmp_path):
    """Paddle with its cache, prefill and steps, against NumPy on the whole sequence."""
    import paddle

    from fd_fusion.cli.demo.model import load_model

    checkpoint = Checkpoint(written(tmp_path, **changes))
    truth = make_truth(checkpoint, list(range(9)), 3)
    model, cache = load_model(checkpoint), {}
    with paddle.no_grad():
        parts = [truth.tokens[:9], *([token] for token in truth.tokens[9:])]
        got = np.stack([model(paddle.to_tensor(part), cache)[-1].numpy() for part in parts])
    allowed = budget(truth.plain_error, "float32", float(np.abs(truth.logits).max()))
    # Ten numbers of a tiny model are few to take a largest error from, hence twice the budget here.
    assert np.abs(got - truth.logits).max() <= 2 * allowed < 1e-4


def test_blocks_of_a_rank_are_those_of_the_whole_weight(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}
    checkpoint = Checkpoint(written(tmp_path, **sizes), quantised=True)
    for name, size in (
        ("model.layers.0.mlp.up_proj.weight", 2),
        ("model.layers.1.mlp.experts.0.gate_proj.weight", 4),
    ):
        codes, scales = checkpoint.read_blocks(name)
        value = value_of_e4m3(codes) * wide_blocks(scales)
        weight = checkpoint.read(name)
        assert np.abs(value - weight).max() <= np.abs(weight).max() / 16, "half a step of e4m3"
        assert (np.abs(value).reshape(-1, 128, 2, 128).max((1, 3)) > 0.999 * scales * 448).all(), (
            "each block is filled"
        )
        shards = [checkpoint.read_blocks(name, rank, size) for rank in range(size)]
        assert np.array_equal(np.concatenate([one[0] for one in shards]), codes)
        wide = [wide_blocks(one[1])[: len(one[0])] for one in shards]
        assert np.array_equal(np.concatenate(wide), wide_blocks(scales)[: len(codes)])


def test_the_reference_is_causal_and_sees_ties(tmp_path):
    checkpoint = Checkpoint(written(tmp_path))
    decoder = ReferenceDecoder(checkpoint)
    tokens = list(range(6))
    assert np.allclose(decoder.logits(tokens)[:4], decoder.logits(tokens[:4]), rtol=0, atol=1e-12)
    assert 0 < decoder.margin < 1
    assert dataclasses.replace(decoder, parts=3).logits(tokens) == pytest.approx(decoder.logits(tokens), abs=1e-12)
