from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader
from fastdeploy.model_executor.model_loader.default_loader import DefaultModelLoader
from fastdeploy.model_executor.model_loader.default_loader_v1 import DefaultModelLoaderV1

__all__ = ["BaseModelLoader", "get_model_loader"]


def get_model_loader(load_config):
    if load_config.load_choices == "default_v1":
        return DefaultModelLoaderV1(load_config)
    return DefaultModelLoader(load_config)
