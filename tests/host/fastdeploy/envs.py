"""Environment variables, read when asked for, as the host does; HOST_* are of this test host alone."""

import os

_VARIABLES = {
    "FD_PLUGINS": lambda: os.environ["FD_PLUGINS"].split(",") if "FD_PLUGINS" in os.environ else None,
    "FD_ENABLE_PDL": lambda: int(os.environ.get("FD_ENABLE_PDL", "1")),
    "FD_USE_PHI_RMSNORM": lambda: os.environ.get("FD_USE_PHI_RMSNORM", "0") == "1",
    "FD_DETERMINISTIC_MODE": lambda: os.environ.get("FD_DETERMINISTIC_MODE", "0") == "1",
    "FD_USE_PHI_FP8_QUANT": lambda: os.environ.get("FD_USE_PHI_FP8_QUANT", "1") == "1",
    "FD_FP8_QUANT_WITH_POW2SCALE": lambda: os.environ.get("FD_FP8_QUANT_WITH_POW2SCALE", "0") == "1",
    "FD_CUSTOM_AR_MAX_SIZE_MB": lambda: int(os.environ.get("FD_CUSTOM_AR_MAX_SIZE_MB", "8")),
    "FD_LOG_DIR": lambda: os.environ.get("FD_LOG_DIR", "log"),
    # One version loads every plugin when FD_PLUGINS is unset, another loads none.
    "HOST_UNSET_PLUGINS": lambda: os.environ.get("HOST_UNSET_PLUGINS", "all"),
    # One version imports every model before it loads plugins, another imports models when they are asked for.
    "HOST_LAZY_MODELS": lambda: os.environ.get("HOST_LAZY_MODELS", "0") == "1",
    # One version publishes tokens in post_process, a newer one in GPUModelRunner._save_model_output.
    "HOST_PUBLISHES_IN_POST_PROCESS": lambda: os.environ.get("HOST_PUBLISHES_IN_POST_PROCESS", "0") == "1",
}


def __getattr__(name):
    if name in _VARIABLES:
        return _VARIABLES[name]()
    raise AttributeError(name)
