from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader
from fastdeploy.model_executor.model_loader.default_loader_v1 import DefaultModelLoaderV1

__all__ = ["BaseModelLoader", "get_model_loader"]


def get_model_loader(load_config):
    return DefaultModelLoaderV1(load_config)
