"""Loader v0: cuts the checkpoint for this rank, then hands a flat dictionary to the model."""

import os

import numpy as np

from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader
from fastdeploy.model_executor.models.model_base import ModelRegistry


def _cut(name, weight, parallel):
    """Column-parallel weights by columns, row-parallel ones by rows, everything else whole."""
    size, rank = parallel.tensor_parallel_size, parallel.tensor_parallel_rank
    parts = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    if any(f".{part}." in name for part in parts):
        return np.split(weight, size, axis=-1)[rank]
    if any(f".{part}.weight" in name for part in ("o_proj", "out_proj", "down_proj")):
        return np.split(weight, size, axis=0)[rank]
    return weight


class DefaultModelLoader(BaseModelLoader):
    def download_model(self, load_config):
        pass

    def load_model(self, fd_config):
        model = ModelRegistry.get_class(fd_config.model_config.architectures[0])(fd_config)
        model.eval()
        if fd_config.load_config.dynamic_load_weight:
            return model
        checkpoint = dict(np.load(os.path.join(fd_config.model_config.model, "model.npz")))
        model.set_state_dict({k: _cut(k, v, fd_config.parallel_config) for k, v in checkpoint.items()})
        return model
