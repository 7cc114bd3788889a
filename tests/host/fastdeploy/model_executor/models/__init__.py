"""Imports every model and then loads the plugins; or, in another version, loads the plugins alone."""

import importlib

from fastdeploy import envs
from fastdeploy.model_executor.models.model_base import ModelRegistry
from fastdeploy.plugins.model_register import load_model_register_plugins

if not envs.HOST_LAZY_MODELS:
    for _module in sorted(set(ModelRegistry.modules.values())):
        importlib.import_module(f"fastdeploy.model_executor.models.{_module}")

load_model_register_plugins()
