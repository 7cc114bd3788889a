"""Checkpoints for the contract host, and a worker brought up the way its engine does it."""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

HOST = Path(__file__).parent
# Where FASTDEPLOY_SRC names a source tree, `fastdeploy` is that one.
sys.path.insert(0, os.environ.get("FASTDEPLOY_SRC") or str(HOST))

ARCHITECTURES = (
    "Glm4MoeForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
)


def write_checkpoint(folder, architecture, seed=7, **config):
    """config.json and model.npz of a small model: full weights by their names in a checkpoint."""
    from fastdeploy.config import (
        FDConfig,
        GraphOptimizationConfig,
        LoadConfig,
        ModelConfig,
        ParallelConfig,
        SpeculativeConfig,
    )
    from fastdeploy.model_executor.models.model_base import ModelRegistry

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [architecture], **config}
    (folder / "config.json").write_text(json.dumps(config))
    whole = FDConfig(
        ModelConfig({**config, "dtype": "float32"}),
        ParallelConfig({}),
        LoadConfig({}),
        SpeculativeConfig(None),
        GraphOptimizationConfig(None),
    )
    model = ModelRegistry.get_class(architecture)(whole)
    random = np.random.default_rng(seed)
    weights = {}
    for name, param in model.named_parameters():
        for part, shape in _parts(name, param.shape):
            value = random.standard_normal(shape) / np.sqrt(shape[0] if len(shape) > 1 else 1)
            weights[part] = (1 + 0.1 * value if "norm" in part else value).astype("float32")
    np.savez(folder / "model.npz", **weights)
    return folder


def _parts(name, shape):
    """The names in a checkpoint of what a parameter is merged from."""
    for merged, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("up_gate_proj", ("gate_proj", "up_proj"))):
        if f".{merged}." in name:
            return [(name.replace(merged, part), [*shape[:-1], shape[-1] // len(parts)]) for part in parts]
    if name.endswith("experts.up_gate_proj_weight"):
        head = name.rsplit(".", 1)[0]
        experts, rows, columns = shape
        return [
            (f"{head}.{i}.{p}.weight", [rows, columns // 2]) for i in range(experts) for p in ("gate_proj", "up_proj")
        ]
    if name.endswith("experts.down_proj_weight"):
        head = name.rsplit(".", 1)[0]
        return [(f"{head}.{i}.down_proj.weight", shape[1:]) for i in range(shape[0])]
    return [(name.replace("qk_norm.", ""), shape)]


def fd_config_of(folder, size, rank, tp_group=None, data_parallel_size=1, **arguments):
    """What a worker makes of its arguments. With `tp_group` no group is created."""
    from fastdeploy.config import ParallelConfig
    from fastdeploy.worker.worker_process import initialize_fd_config

    values = {
        "model": str(folder),
        "tensor_parallel_size": size,
        "data_parallel_size": data_parallel_size,
        "graph_optimization_config": None,
        **arguments,
    }
    create = ParallelConfig.set_communicate_group
    if tp_group is not None:
        ParallelConfig.set_communicate_group = lambda self: setattr(self, "tp_group", tp_group)
    try:
        return initialize_fd_config(argparse.Namespace(**values), size, rank)
    finally:
        ParallelConfig.set_communicate_group = create


def worker_of(fd_config, rank, do_profile=True):
    """A worker after the host's own start: device, model, profile, cache, graphs."""
    from fastdeploy.worker.gpu_worker import GpuWorker
    from fastdeploy.worker.worker_process import bring_up

    worker = GpuWorker(fd_config, local_rank=rank, rank=rank)
    bring_up(worker, do_profile)
    return worker


def hidden_states(worker, rows):
    """The model's output for `rows` token ids, before the logits."""
    import paddle
    from fastdeploy.model_executor.forward_meta import ForwardMeta

    ids = paddle.to_tensor(np.asarray(rows, dtype="int64"))
    return worker.model_runner.model({"ids_remove_padding": ids}, ForwardMeta(ids))
