"""Entry points of a group, filtered by FD_PLUGINS, which names entry points and not distributions."""

from importlib.metadata import entry_points

from fastdeploy import envs
from fastdeploy.utils import llm_logger


def load_plugins_by_group(group):
    allowed = envs.FD_PLUGINS
    if allowed is None and envs.HOST_UNSET_PLUGINS == "none":
        return {}
    found = {}
    for plugin in entry_points(group=group):
        if allowed is not None and plugin.name not in allowed:
            continue
        try:
            found[plugin.name] = plugin.load()
        except Exception:
            llm_logger.exception("Failed to load plugin %s", plugin.name)
    return found
