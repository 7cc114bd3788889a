"""Paddle's torch proxy for the modules of FlashInfer alone.

FlashInfer is written for torch; Paddle's torch proxy (`paddle.compat`) can take torch's place. Paddle's own switch
puts the proxy into `sys.modules["torch"]`, where every thread of the process finds it. The scope of this module is
narrower: the code of FlashInfer's own modules gets an `__import__` of its own, which answers `torch` with the proxy.
Nothing named torch ever enters `sys.modules`, so a host with real torch, in any thread, keeps it; and a function that
imports torch when it is called, long after the load, still gets the proxy.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from fd_fusion.reasons import FusionError, because

PACKAGE = "flashinfer"
_ADDED = {"torch.distributed": ("ProcessGroup", "paddle.base.core")}  # what the proxy lacks and FlashInfer names
_proxies: Proxies | None = None


@contextlib.contextmanager
def scoped_torch() -> Iterator[None]:
    """Give modules of FlashInfer that are imported inside Paddle's proxy as `torch`, and no other module.

    Raises: FusionError: this Paddle has no torch proxy.
    """
    global _proxies
    if _proxies is None:
        _proxies = Proxies()
    finder = _Finder(_proxies)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class Proxies:
    """Paddle's stand-ins for torch's modules, made by Paddle's own finder and kept out of `sys.modules`."""

    def __init__(self) -> None:
        try:
            proxy = importlib.import_module("paddle.compat.proxy")
            proxy._register_compat_override()
            self._finder = proxy.TorchProxyMetaFinder()
        except (ImportError, AttributeError) as error:
            raise FusionError(because("no_torch_proxy", error=str(error))) from error
        self._modules: dict[str, ModuleType] = {}

    def load(self, name: str) -> ModuleType:
        """Return the stand-in of one module. Raises ImportError where Paddle has no counterpart."""
        if name in self._modules:
            return self._modules[name]
        parent, _, child = name.rpartition(".")
        above = self.load(parent) if parent else None
        spec = self._finder.find_spec(name, None)
        if spec is None:
            raise ModuleNotFoundError(f"Paddle's torch proxy has no {name}", name=name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if name in _ADDED:
            attribute, module_of = _ADDED[name]
            if not hasattr(module, attribute):
                setattr(module, attribute, getattr(importlib.import_module(module_of), attribute))
        self._modules[name] = module
        if above is not None:
            setattr(above, child, module)
        return module

    def import_(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """Import for FlashInfer's modules: torch is the proxy, all else is as ever."""
        if level == 0 and name.partition(".")[0] == "torch":
            module = self.load(name)
            for attribute in fromlist or ():
                if attribute != "*" and not hasattr(module, attribute):
                    self.load(f"{name}.{attribute}")  # a submodule, or an ImportError that names it
            return module if fromlist else self.load("torch")
        if level or name.partition(".")[0] == PACKAGE:
            with scoped_torch():  # a module of its own, which may be imported when a function is called
                return builtins.__import__(name, globals, locals, fromlist, level)
        return builtins.__import__(name, globals, locals, fromlist, level)


class _Finder(importlib.abc.MetaPathFinder):
    """Find FlashInfer's modules as Python's own finders do, and execute them with `Proxies.import_`."""

    def __init__(self, proxies: Proxies):
        self._proxies = proxies

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, _Finder) or type(finder).__name__ == "TorchProxyMetaFinder":
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._proxies)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, proxies: Proxies):
        self._inner, self._proxies = inner, proxies

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # A module's code, and every function defined in it, takes its builtins from this.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._proxies.import_}
        module.__spec__.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
