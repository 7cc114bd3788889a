"""Model plugins: any number, called once a process; what one of them raises breaks the import of the models."""

from fastdeploy.plugins.utils import load_plugins_by_group

plugins_loaded = False
PLUGINS_GROUP = "fastdeploy.model_register_plugins"


def load_model_register_plugins():
    global plugins_loaded
    if plugins_loaded:
        return
    plugins_loaded = True
    for function in load_plugins_by_group(PLUGINS_GROUP).values():
        function()
