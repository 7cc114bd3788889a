"""Changing modules as they are imported, and giving out modules that exist nowhere."""

import importlib.abc
import importlib.machinery
import importlib.util


class Finder(importlib.abc.MetaPathFinder):
    """Runs `hooks[name](module)` behind the import of a module; `made[name](module)` fills one that is not there."""

    def __init__(self, hooks, made):
        self._hooks, self._made, self._busy = hooks, made, set()

    def find_spec(self, name, path, target=None):
        hook = self._hooks.get(name)
        if name in self._made:
            return importlib.machinery.ModuleSpec(name, _Maker(self._made[name], hook))
        if hook is None or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is not None:
            _run_behind(spec.loader, hook)
        return spec


class _Maker(importlib.abc.Loader):
    def __init__(self, fill, hook):
        self._steps = [fill, hook]

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        for step in filter(None, self._steps):
            step(module)


def _run_behind(loader, hook):
    run = loader.exec_module

    def exec_module(module):
        run(module)
        hook(module)

    loader.exec_module = exec_module
