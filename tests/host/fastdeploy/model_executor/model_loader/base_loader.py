"""What a model loader has to have."""

from abc import ABC, abstractmethod


class BaseModelLoader(ABC):
    def __init__(self, load_config):
        self.load_config = load_config

    @abstractmethod
    def download_model(self, load_config):
        raise NotImplementedError

    @abstractmethod
    def load_model(self, fd_config):
        raise NotImplementedError
