"""FastDeploy's plugin: entry point `fastdeploy.model_register_plugins: fd_fusion`.

`register` runs in every process that builds a model config, and patches the model loaders alone. When a loader has
returned a model and fusion was asked for, the model's first forward is made the proving pass: it binds, in the
profile run of the host, so that the workspace is in the profile and the weights are loaded. No layer class, no
constructor and no weight name is changed; what is patched keeps `__wrapped__` and is undone by `unregister`.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable
from typing import Any

from fd_fusion.binding.attributes import set_attribute, undo_in_turn
from fd_fusion.config import ENV_CONFIG, ENV_DISABLE, Resolved, resolve
from fd_fusion.hosts.fastdeploy import worker
from fd_fusion.hosts.fastdeploy.log import log_to_host, logger, say_off, unreadable
from fd_fusion.reasons import BindError, Reason, because

ENV_SOURCE = "FD_FUSION_CONFIG_SOURCE"  # set by `fd_fusion serve`: who wrote FD_FUSION_CONFIG
_LOADERS = "fastdeploy.model_executor.model_loader.base_loader"
_undo: list[Callable[[], None]] = []
_loading = threading.local()


def register() -> None:
    """Patch the host's model loaders, once. Uses no device and never raises: a failure is one warning."""
    if _undo or resolve(environ={ENV_DISABLE: os.environ.get(ENV_DISABLE, "")}).source == ENV_DISABLE:
        return
    try:
        _patch_loaders()
    except Exception as error:  # the host must come up; what is missing is named
        unregister()
        path = f"{_LOADERS}.BaseModelLoader ({type(error).__name__}: {error})"
        logger.warning("fd_fusion: off: %s", because("symbol_moved", path=path))


def is_registered() -> bool:
    """Return whether the host's model loaders are patched in this process."""
    return bool(_undo)


def unregister() -> None:
    """Undo `register` and the patches of the worker. Models that are bound stay bound: `unbind` them first."""
    undo_in_turn(_undo)
    worker.unpatch()


def _patch_loaders() -> None:
    """Patch `load_model` of each concrete loader in place, whether its class is there already or still to come."""
    base = importlib.import_module(_LOADERS).BaseModelLoader

    own = base.__dict__.get("__init_subclass__")

    def patch_new_class(cls, **kwargs):
        (own.__get__(None, cls) if own else super(base, cls).__init_subclass__)(**kwargs)
        _patch_loader(cls)

    _undo.append(set_attribute(base, "__init_subclass__", classmethod(patch_new_class)))
    classes = [base]
    for cls in classes:
        classes += cls.__subclasses__()
        if cls is not base:
            _patch_loader(cls)


def _patch_loader(cls: type) -> None:
    stock = cls.__dict__.get("load_model")
    if stock is None or getattr(stock, "__isabstractmethod__", False):
        return

    @functools.wraps(stock)
    def load_model(self, fd_config, *args, **kwargs):
        outermost, _loading.inside = not getattr(_loading, "inside", False), True
        try:
            model = stock(self, fd_config, *args, **kwargs)
        finally:
            _loading.inside = not outermost
        if outermost:
            _after_load(model, fd_config)
        return model

    _undo.append(set_attribute(cls, "load_model", load_model))


def _after_load(model: Any, fd_config: Any) -> None:
    """Decide whether this model is to be bound, and if so arm its first forward.

    Raises: ValueError: the config that won is malformed. BindError: strict, and the model is off, but not by a rule.
    Anything else unexpected is one warning, and stock.
    """
    resolved = _resolve(fd_config)
    if resolved.reason is not None and resolved.reason.code == "not_asked":
        return
    log_to_host()
    if resolved.config is None:
        return _off(model, resolved, resolved.reason)
    try:
        from fd_fusion.hosts.fastdeploy import pairs

        reason = pairs.whole_model_reason(model, fd_config) or worker.patch()
        if reason and reason.code == "draft_model":
            pairs.drafts.add(model)
        if not reason:
            return _bind_in_first_forward(model, fd_config, resolved)
    except Exception as error:
        reason = unreadable(model, error)
    _off(model, resolved, reason)


def _off(model: Any, resolved: Resolved, reason: Reason) -> None:
    """Leave the model stock, with no vote: all ranks share the reason. Raises: BindError: under `strict`."""
    from fd_fusion.binding.bind import note_off

    say_off(model, reason)
    note_off(model, resolved, reason)


def _resolve(fd_config: Any) -> Resolved:
    """Choose among this host's sources: its patched argument, the variable (perhaps of `serve`), upstream's flag."""
    parallel = getattr(fd_config, "parallel_config", None)
    explicit, source = getattr(parallel, "fusion_config", None), "--fusion-config"
    if explicit is None and os.environ.get(ENV_SOURCE) and os.environ.get(ENV_CONFIG):
        explicit, source = os.environ[ENV_CONFIG], os.environ[ENV_SOURCE]
    flag = getattr(parallel, "enable_flashinfer_allreduce_fusion", None)
    return resolve(explicit, explicit_source=source, upstream_flag=flag)


def _bind_in_first_forward(model: Any, fd_config: Any, resolved: Resolved) -> None:
    """Bind in the first eager forward: the profile run, or the one that `worker` runs before graph capture.

    It runs three or four times: stock, proving, where a residual may stay with its owners once more, and for the
    caller. The host repeats a forward in the same way when it warms up a graph, so its inputs allow it and are not
    copied. A model with a recurrent state is not compared by its outputs.
    """
    from fd_fusion.binding.outputs import NOT_COMPARED
    from fd_fusion.frameworks.paddle_ops import is_eager
    from fd_fusion.hosts.fastdeploy.adapters import without_upstream_fusion
    from fd_fusion.hosts.fastdeploy.pairs import has_state

    stateful = has_state(model)

    def example_of(forward, args, kwargs):
        def example():
            with without_upstream_fusion(model):
                outputs = forward(*args, **kwargs)
            return NOT_COMPARED if stateful else _two_rows(outputs)

        return example

    def forward(*args, **kwargs):
        if not is_eager():
            return stock(*args, **kwargs)
        undo()
        for reason in _bind(model, fd_config, resolved, example_of):
            worker.end_our_forward(reason)
        return model.forward(*args, **kwargs)

    stock = model.forward
    forward.__wrapped__ = stock
    forward.binds_at_first_call = True  # `worker` reads it before graph capture
    undo = set_attribute(model, "forward", forward)


def _bind(model: Any, fd_config: Any, resolved: Resolved, example_of: Callable) -> list[Reason]:
    """Collective: bind. Returns the reasons why a rank was not there.

    Raises: BindError: strict, or a named backend, and something failed; on all ranks.
    """
    from fd_fusion.binding.bind import bind
    from fd_fusion.binding.pairs import Pair
    from fd_fusion.frameworks.paddle_ops import group_of
    from fd_fusion.hosts.fastdeploy import adapters
    from fd_fusion.hosts.fastdeploy.pairs import find_pairs

    pairs, qk_norms, refusal = [], [], None
    try:
        apart = getattr(fd_config.parallel_config, "expert_parallel_size", 1) > 1
        found, rejected = find_pairs(model, adapters.activation_dtype(fd_config), apart)
        pairs = [*(adapters.pair_of(pair, fd_config) for pair in found), *rejected]
        qk_norms = adapters.qk_norms_of(model, fd_config)
    except Exception as error:  # perhaps on this rank alone: the others read it in the vote
        say_off(model, refusal := unreadable(model, error))
        pairs, qk_norms = [], []
    try:
        report = bind(
            model,
            pairs,
            qk_norms,
            resolved,
            example_of=example_of,
            deterministic=_is_deterministic(),
            group=group_of(fd_config.parallel_config.tp_group),
            refusal=refusal,
        )
    except BindError as error:  # it ends the worker, whose own log is not that of this package
        logger.error("%s", error)
        raise
    if getattr(getattr(fd_config, "graph_opt_config", None), "graph_opt_level", 0):
        for line in report.sites:
            line.site.checked = False  # proven; from now on SOT may trace one end of it and run the other
    fused = {line.ranks for line in report.sites}
    groups = (pair.group for pair in pairs if isinstance(pair, Pair) and pair.group.ranks in fused)
    worker.meet(groups, resolved.config.timeout_s)
    return [pair.reason for pair in report.rejected if pair.reason.code == "never_voted"]


def _is_deterministic() -> bool:
    """Return whether the host is deterministic, by its variable, or batch invariant, which can be on without it."""
    if os.environ.get("FD_DETERMINISTIC_MODE", "0").strip() not in ("", "0"):
        return True
    try:
        from fastdeploy.model_executor.layers.batch_invariant_ops import is_batch_invariant_mode_enabled
    except ImportError:
        return False  # a version without that mode
    return bool(is_batch_invariant_mode_enabled())


def _two_rows(outputs: Any) -> list[Any]:
    """Return the first and the last row of each output of a model: a profile run is no place to keep them all."""
    import paddle

    if isinstance(outputs, (list, tuple)):
        return [tensor for part in outputs for tensor in _two_rows(part)]
    if not hasattr(outputs, "dtype"):
        return []
    return [paddle.concat([outputs[:1], outputs[-1:]]) if outputs.ndim else outputs]
