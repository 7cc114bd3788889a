"""Loader v1: hands (name, full weight) pairs to the model, whose parameters cut what they need."""

import os

import numpy as np
import paddle

from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader
from fastdeploy.model_executor.models.model_base import ModelRegistry


class DefaultModelLoaderV1(BaseModelLoader):
    def download_model(self, load_config):
        pass

    def load_weights(self, model, fd_config):
        checkpoint = np.load(os.path.join(fd_config.model_config.model, "model.npz"))
        model.load_weights((name, paddle.to_tensor(checkpoint[name])) for name in checkpoint.files)

    def load_model(self, fd_config):
        model = ModelRegistry.get_class(fd_config.model_config.architectures[0])(fd_config)
        model.eval()
        self.load_weights(model, fd_config)
        return model
