from fastdeploy.plugins.utils import load_plugins_by_group


def load_model_runner_plugins():
    """The class of the runner, from the one plugin there is; an error where there is none."""
    (plugin,) = load_plugins_by_group("fastdeploy.model_runner_plugins").values()
    return plugin()
