"""The plugin in one process: orders of import, twice, killed, half importable, who wins, what is checked when."""

import contextlib
import copy
import logging
import os
import pydoc
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "host"))

from fd_fusion.config import ENV_CONFIG, ENV_DISABLE
from fd_fusion.hosts.fastdeploy import plugin as plugin
from fd_fusion.hosts.fastdeploy import worker as worker
from fd_fusion.reasons import BindError, FusionError, FusionTimeout, because

HOST = Path(__file__).parents[2] / "host"
LOADERS = """
from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader
from fastdeploy.model_executor.model_loader.default_loader import DefaultModelLoader
from fastdeploy.model_executor.model_loader.default_loader_v1 import DefaultModelLoaderV1
class Later(BaseModelLoader):
    def download_model(self, load_config): pass
    def load_model(self, fd_config): return None
class Heir(DefaultModelLoader): pass
def depth(cls):
    f, n = cls.load_model, 0
    while hasattr(f, "__wrapped__"): f, n = f.__wrapped__, n + 1
    return n
depths = [depth(c) for c in (DefaultModelLoader, DefaultModelLoaderV1, Later, Heir)]
"""
WATCH = (
    "import sys, logging; said = []; logging.getLogger('fd_fusion').warning = lambda *a: said.append(a[0] % a[1:]);"
)


def run(code, folder, **variables):
    """What a fresh process prints last."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, HOST.parents[1], HOST))),
        "FD_LOG_DIR": str(folder),
        **variables,
    }
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().splitlines()[-1]


@pytest.fixture
def installed(tmp_path):
    """A folder in which the entry point is found."""
    info = tmp_path / "fd_fusion-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fd_fusion\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[fastdeploy.model_register_plugins]\nfd_fusion = fd_fusion.hosts.fastdeploy.plugin:register\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "first, variables",
    [
        ("import fastdeploy.model_executor.models", {}),
        ("import fastdeploy.model_executor.model_loader", {}),
        ("import fastdeploy.model_executor.models", {"HOST_LAZY_MODELS": "1"}),
    ],
    ids=["models first", "loaders first", "models when asked for"],
)
def test_every_loader_is_patched_once_whatever_comes_first(installed, first, variables):
    code = f"""
{first}
{LOADERS}
import sys
from fd_fusion.hosts.fastdeploy.plugin import register, unregister
register(); register()
class Last(BaseModelLoader):
    def download_model(self, load_config): pass
    def load_model(self, fd_config): return None
before = depths + [depth(Last)]
foreign = [m for m in ("triton", "flashinfer", "torch") if m in sys.modules]
unregister()
class After(BaseModelLoader):
    def download_model(self, load_config): pass
    def load_model(self, fd_config): return None
print(before, [depth(c) for c in (DefaultModelLoader, DefaultModelLoaderV1, Later, Heir, Last, After)], foreign)
"""
    assert run(code, installed, **variables) == "[1, 1, 1, 1, 1] [0, 0, 0, 0, 0, 0] []"


def test_the_kill_switch_and_the_plugin_filter_leave_the_host_untouched(installed):
    code = f"import fastdeploy.model_executor.models\n{LOADERS}\nprint(depths)"
    assert run(code, installed, **{ENV_DISABLE: "1"}) == "[0, 0, 0, 0]"
    assert run(code, installed, HOST_UNSET_PLUGINS="none") == "[0, 0, 0, 0]"


@pytest.mark.parametrize("broken", ["raise ImportError('no such op')", "class SomethingElse: pass"])
def test_half_importable(tmp_path, broken):
    """The loaders cannot be imported, or are not what they were: one warning with the dotted path, and no error."""
    code = f"""
    {WATCH}
    import types
    name = "fastdeploy.model_executor.model_loader.base_loader"
    for part in ("fastdeploy", "fastdeploy.model_executor", "fastdeploy.model_executor.model_loader"):
        sys.modules[part] = types.ModuleType(part); sys.modules[part].__path__ = [{str(tmp_path)!r}]
    open({str(tmp_path / "base_loader.py")!r}, "w").write({broken!r})
    from fd_fusion.hosts.fastdeploy.plugin import register
    register()
    print(len(said), name in said[0], "is not where" in said[0])
    """
    assert run(code, tmp_path) == "1 True True"


# Below in this process: no model is run, and what is patched is put back.


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path))
    yield
    plugin.unregister()
    plugin.logger.handlers.clear()


def fd_config_of(flag=None, explicit=None, size=2):
    parallel = SimpleNamespace(tensor_parallel_size=size, tp_group=None)
    if flag is not None:
        parallel.enable_flashinfer_allreduce_fusion = flag
    if explicit is not None:
        parallel.fusion_config = explicit
    return SimpleNamespace(parallel_config=parallel)


@pytest.mark.parametrize(
    "flag, explicit, environ, source, backend",
    [
        (None, None, {}, "no source", None),
        (False, None, {}, "no source", None),
        (True, None, {}, "--enable-flashinfer-allreduce-fusion", "auto"),
        (False, None, {ENV_CONFIG: '{"backend": "triton"}'}, ENV_CONFIG, "triton"),
        (True, None, {ENV_CONFIG: '{"backend": "triton"}'}, ENV_CONFIG, "triton"),
        (True, '{"backend": "paddle"}', {ENV_CONFIG: '{"backend": "triton"}'}, "--fusion-config", "paddle"),
        (False, {"backend": "paddle"}, {}, "--fusion-config", "paddle"),
        (
            None,
            None,
            {ENV_CONFIG: '{"backend": "triton"}', plugin.ENV_SOURCE: "--fusion-config"},
            "--fusion-config",
            "triton",
        ),
        (True, "{}", {ENV_DISABLE: "1", ENV_CONFIG: "{}"}, ENV_DISABLE, None),
        (True, "{}", {ENV_DISABLE: "0"}, "--fusion-config", "auto"),
    ],
)
def test_who_wins(flag, explicit, environ, source, backend, monkeypatch):
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    resolved = plugin._resolve(fd_config_of(flag, explicit))
    assert resolved.source == source
    assert (resolved.config and resolved.config.backend) == backend


def test_not_asked_for_says_nothing_and_malformed_is_an_error(monkeypatch, tmp_path):
    plugin._after_load(object(), fd_config_of())
    assert not (tmp_path / "fd_fusion.log").exists()
    monkeypatch.setenv(ENV_CONFIG, '{"no_such_key": 1}')
    with pytest.raises(ValueError, match="no_such_key"):
        plugin._after_load(object(), fd_config_of())


@pytest.fixture
def host_worker():
    """The host's worker modules, imported as a rank has them."""
    import fastdeploy.worker.gpu_model_runner as runner
    import fastdeploy.worker.gpu_worker as gpu_worker

    return SimpleNamespace(runner=runner, worker=gpu_worker)


def said(folder):
    for handler in logging.getLogger("fastdeploy.fd_fusion").handlers:
        handler.flush()
    return "".join(path.read_text() for path in folder.glob("fd_fusion.log"))


def test_a_named_backend_that_fails_says_so_in_our_log_too(monkeypatch, caplog):
    from fd_fusion.binding import bind as binding
    from fd_fusion.hosts.fastdeploy import adapters as fastdeploy_adapters
    from fd_fusion.hosts.fastdeploy import pairs as fastdeploy_pairs

    def refuse(*args, **kwargs):
        raise BindError(because("no_triton", detail="it is not installed"))

    monkeypatch.setattr(binding, "bind", refuse)
    monkeypatch.setattr(fastdeploy_pairs, "find_pairs", lambda model, dtype: ([], []))
    monkeypatch.setattr(fastdeploy_adapters, "qk_norms_of", lambda model, config: [])
    resolved = SimpleNamespace(config=SimpleNamespace(timeout_s=1))
    config = {"model_config": SimpleNamespace(dtype="float32"), "parallel_config": SimpleNamespace(tp_group=None)}
    with pytest.raises(BindError):
        plugin._bind(object(), SimpleNamespace(**config), resolved, list)
    assert "Triton cannot be imported: it is not installed" in caplog.text


def test_a_symbol_that_moved_is_named_and_the_host_runs_stock(monkeypatch, host_worker, caplog):
    monkeypatch.setenv(ENV_CONFIG, "{}")
    monkeypatch.delattr(host_worker.runner.GPUModelRunner, "_save_model_output")
    monkeypatch.delattr(host_worker.runner, "post_process")
    model = SimpleNamespace()
    with caplog.at_level(logging.WARNING, "fd_fusion"):
        plugin._after_load(model, fd_config_of())
    path = "fastdeploy.worker.gpu_model_runner.GPUModelRunner._save_model_output"
    assert path in caplog.text and len(caplog.records) == 1 and not vars(model)


def test_an_unforeseen_shape_of_the_host_is_one_warning_and_stock(monkeypatch, host_worker, caplog):
    monkeypatch.setenv(ENV_CONFIG, "{}")
    plugin._after_load(SimpleNamespace(), fd_config_of())  # a model with no named_sublayers
    assert "off" in caplog.text


def test_strict_ends_the_load_of_a_model_that_cannot_fuse_but_for_a_rule(monkeypatch, host_worker):
    """Sequence-parallel experts and FD_USE_PHI_RMSNORM raised nothing, and no report held such a model."""
    from fd_fusion.binding import bind as binding

    class Model:
        pass

    monkeypatch.setenv(ENV_CONFIG, '{"strict": true}')
    experts = fd_config_of()
    experts.parallel_config.use_sequence_parallel_moe = True
    models = [Model(), Model(), Model()]
    with pytest.raises(BindError, match="disable-sequence-parallel-moe"):
        plugin._after_load(models[0], experts)
    plugin._after_load(models[1], fd_config_of(size=1))
    monkeypatch.setenv("FD_USE_PHI_RMSNORM", "1")
    with pytest.raises(BindError, match="FD_USE_PHI_RMSNORM"):
        plugin._after_load(models[2], fd_config_of())
    monkeypatch.setenv(ENV_CONFIG, "{}")
    plugin._after_load(models[2], fd_config_of())
    codes = [binding._bound.get(model).report.off.code for model in models]
    assert codes == ["sequence_parallel", "one_rank", "proxy_rmsnorm"]


@pytest.mark.parametrize("newer", [True, False])
def test_no_token_leaves_after_a_timeout(newer, monkeypatch, host_worker):
    """Both places where a version publishes: the check runs first, and raises."""
    from fd_fusion.binding import bind as binding

    published, sick = [], []

    def check():
        if sick:
            raise FusionTimeout(because("dead_group", op=1, row=2, launch=3, missing=1))

    monkeypatch.setattr(binding, "check", check)
    monkeypatch.setattr(host_worker.runner, "_publish", lambda rank, tokens: published.append(tokens))
    if not newer:
        monkeypatch.delattr(host_worker.runner.GPUModelRunner, "_save_model_output")
    assert worker.patch() is None and worker.patch() is None
    runner = host_worker.runner.GPUModelRunner.__new__(host_worker.runner.GPUModelRunner)

    def publish(tokens):
        if newer:
            runner._save_model_output({"rank": 0}, tokens)
        else:
            host_worker.runner.post_process(tokens, {"rank": 0})

    publish([1])
    sick.append(True)
    with pytest.raises(FusionTimeout):
        publish([2])
    assert published == [[1]]
    worker.unpatch()
    publish([3])
    assert published == [[1], [3]] and not hasattr(host_worker.runner.post_process, "__wrapped__")


def test_what_a_pooling_model_gives_waits_for_the_device(monkeypatch, host_worker):
    """It leaves in post_process in newer versions too, where nothing has waited for the step yet."""
    from fd_fusion.binding import bind as binding
    from fd_fusion.binding import lifecycle

    order = []
    monkeypatch.setattr(lifecycle, "held", lambda: ("a workspace",))
    monkeypatch.setattr(binding, "check", lambda: order.append("check"))
    monkeypatch.setattr(worker, "synchronize", lambda framework: order.append("wait"))
    monkeypatch.setattr(host_worker.runner, "_publish", lambda rank, tokens: order.append("publish"))
    assert worker.patch() is None
    host_worker.runner.post_process([1], {"rank": 0}, skip_save_output=True)
    host_worker.runner.post_process(host_worker.runner.PoolerOutput(), {"rank": 0})
    host_worker.runner.post_process(
        sampler_or_pooler_output=host_worker.runner.PoolerOutput(), model_output={"rank": 0}
    )
    assert order == 2 * ["wait", "check", "publish"], "what leaves in _save_model_output is checked there, once"
    runner = host_worker.runner.GPUModelRunner.__new__(host_worker.runner.GPUModelRunner)
    runner._save_model_output({"rank": 0}, [1])
    assert order[6:] == ["check", "publish"]
    monkeypatch.setattr(lifecycle, "held", tuple)
    monkeypatch.setattr(binding, "report", lambda: [SimpleNamespace(sites=[], off="by a rule")])
    host_worker.runner.post_process(host_worker.runner.PoolerOutput(), {"rank": 0})
    assert order[8:] == ["check", "publish"], "nothing is open, so nothing can be wrong: the host need not wait"


def test_a_runner_that_a_plugin_brings(monkeypatch, host_worker, caplog):
    """One of its own is not known to publish where the host's does; one that inherits from the host's is patched."""

    class Foreign:
        pass

    class Heir(host_worker.runner.GPUModelRunner):
        pass

    monkeypatch.setattr(host_worker.worker, "ModelRunner", Foreign)
    monkeypatch.setenv(ENV_CONFIG, "{}")
    plugin._after_load(SimpleNamespace(), fd_config_of())
    assert "fastdeploy.worker.gpu_worker.ModelRunner" in caplog.text
    assert not hasattr(host_worker.runner.GPUModelRunner._save_model_output, "__wrapped__")
    monkeypatch.setattr(host_worker.worker, "ModelRunner", Heir)
    assert worker.patch() is None and hasattr(Heir._save_model_output, "__wrapped__")
    worker.unpatch()
    assert "_save_model_output" not in vars(Heir)


def test_a_waiting_model_is_proven_before_capture_and_frozen_after(monkeypatch, host_worker):
    from fd_fusion.binding import lifecycle

    order = []
    monkeypatch.setattr(lifecycle, "freeze", lambda: order.append("freeze"))
    assert worker.patch() is None
    gpu_worker = host_worker.worker.GpuWorker.__new__(host_worker.worker.GpuWorker)

    class Model:
        def forward(self):
            """Not noted."""

    model = Model()
    gpu_worker.model_runner = SimpleNamespace(
        model=model,
        _dummy_run=lambda num_tokens, batch_size: order.append(f"dummy {num_tokens}"),
        capture_model=lambda: order.append("capture as stock" if model.forward() else "capture"),
    )
    gpu_worker.graph_optimize_and_warm_up_model()
    waiting = lambda: 1 / 0  # noqa: E731  # voting while a graph is captured
    waiting.binds_at_first_call, waiting.__wrapped__ = True, lambda: "stock"
    model.__dict__["forward"] = waiting
    gpu_worker.graph_optimize_and_warm_up_model()
    assert order == ["capture", "freeze", "dummy 2", "capture as stock", "freeze"]
    assert model.__dict__["forward"] is waiting, "tried again afterwards"


@pytest.mark.parametrize("shown", [True, False])
def test_a_waiting_model_is_proven_before_graphs_are_captured_anew(monkeypatch, host_worker, shown):
    """With weights that came after the first capture: no forward votes or proves inside a capture."""
    from fd_fusion.binding import lifecycle

    order, runner_class = [], host_worker.runner.GPUModelRunner
    monkeypatch.setattr(lifecycle, "freeze", lambda: order.append("freeze"))
    monkeypatch.setattr(runner_class, "capture_model", lambda self: order.append(f"capture {self.model.forward()}"))
    monkeypatch.setattr(runner_class, "_dummy_run", lambda self, num_tokens, batch_size: self.model.forward())
    assert worker.patch() is None

    def waiting():
        order.append("prove")
        if shown:
            model.forward = lambda: "bound"

    waiting.binds_at_first_call, waiting.__wrapped__ = True, lambda: "stock"
    model, runner = SimpleNamespace(forward=waiting), runner_class.__new__(runner_class)
    runner.model = model
    runner.capture_model()
    assert order == ["prove", "capture bound" if shown else "capture stock"]
    assert shown or model.forward is waiting, "tried again afterwards"
    monkeypatch.setattr(worker, "_up", True)
    model.forward = lambda: "bound"
    runner.capture_model()
    assert order[2:] == ["capture bound", "freeze"]
    worker.unpatch()
    assert not hasattr(runner_class.capture_model, "__wrapped__")


@pytest.mark.parametrize("ours", [True, False])
def test_a_model_that_is_bound_once_the_host_is_up_is_frozen(monkeypatch, ours):
    """Without graphs nothing is captured after weights came, and nothing else would freeze it. Before a capture it is
    not: a rank may capture longer than another."""
    from fd_fusion.binding import lifecycle

    order = []
    monkeypatch.setattr(lifecycle, "freeze", lambda: order.append("freeze"))
    monkeypatch.setattr(worker, "_for_us", ours)
    worker.meet([], 6.0)
    assert not order, "the host freezes it when its graphs are captured"
    monkeypatch.setattr(worker, "_up", True)
    worker.meet([], 6.0)
    assert order == ([] if ours else ["freeze"])


@pytest.mark.parametrize("missing", [[], [because("never_voted", rank=1, seconds=3)]], ids=str)
def test_our_own_forward_ends_where_a_rank_was_given_no_config(missing, monkeypatch, host_worker, caplog):
    """It runs none, and would be waited for in the first collective."""
    from fd_fusion.binding import lifecycle

    ran = []
    monkeypatch.setattr(lifecycle, "freeze", lambda: None)
    monkeypatch.setattr(plugin, "_bind", lambda *args: missing)
    assert worker.patch() is None
    model = type("Model", (), {"forward": lambda self: ran.append(1), "named_sublayers": lambda *_, **__: []})()
    plugin._bind_in_first_forward(model, None, None)
    gpu_worker = host_worker.worker.GpuWorker.__new__(host_worker.worker.GpuWorker)
    gpu_worker.model_runner = SimpleNamespace(
        model=model, _dummy_run=lambda **_: model.forward(), capture_model=lambda: None
    )
    with pytest.raises(BindError, match="rank 1 never voted") if missing else contextlib.nullcontext():
        gpu_worker.graph_optimize_and_warm_up_model()
    assert ran == ([] if missing else [1]) and ("never voted" in caplog.text) == bool(missing)
    plugin._bind_in_first_forward(model, None, None)
    model.forward()
    assert ran, "a forward that the host has asked for goes on"


def test_ranks_are_watched_from_the_freeze_on_once_a_group(monkeypatch, caplog, tmp_path):
    """Behind bind the groups meet, in one order on all ranks; a meeting that fails costs a warning and no more."""
    from fd_fusion.binding import bind as binding
    from fd_fusion.comm import watcher
    from fd_fusion.comm.group import Group

    met, started, ends, beats = [], [], [], []

    def presence_memory(group, timeout_s):
        if group.ranks == (4, 5):
            raise FusionError(because("no_store", detail="none"))
        met.append((group.ranks, timeout_s))
        presence = SimpleNamespace(beat=lambda: beats.append(group.ranks), leave=lambda: met.append("left"))
        meeting = type("Meeting", (), {})()
        meeting.group, meeting.presence = group, presence
        return meeting

    class Sentinel:
        def __init__(self, meeting, limit_s, grace_s, log, pages, reader):
            started.append((meeting.group.ranks, limit_s, log))
            assert grace_s > worker.GRACE_S and pages == [7] and callable(pydoc.locate(reader.replace(":", ".")))

        def kill(self):
            started.append("killed")

        def wait(self):
            started.append("waited for")

    monkeypatch.setattr(worker, "PresenceMemory", presence_memory)
    monkeypatch.setattr(worker.sentinel, "start", Sentinel)
    monkeypatch.setattr(binding, "error_pages", lambda: [7])
    fused = []
    monkeypatch.setattr(binding, "report", lambda: [SimpleNamespace(sites=fused)])
    monkeypatch.setattr(watcher, "end_process_on_error", ends.append)
    plugin.log_to_host()
    worker.watch()
    assert not ends and not started, "nothing is fused: nothing ends this process"
    worker.unpatch()
    ends.clear()
    groups = [Group("x", 0, len(ranks), ranks, None) for ranks in ((2, 3), (0, 1), (4, 5), (7,), (0, 1))]
    worker.meet(groups, 6.0)
    worker.meet(groups[:2], 6.0)
    assert met == [((0, 1), 6.0), ((2, 3), 6.0)] and not started
    assert "no store to vote over" in caplog.text
    fused.append("a site")
    worker.watch()
    worker.watch()  # graphs captured anew
    log = str(tmp_path / "fd_fusion.log")
    assert started == [((0, 1), 6.0, log), ((2, 3), 6.0, log)]
    assert set(ends) == {worker.GRACE_S}
    assert any({(0, 1), (2, 3)} <= set(beats) or time.sleep(0.01) for _ in range(300)), "this process counts too"
    worker.meet([Group("x", 0, 2, (8, 9), None)], 6.0)
    assert started[2:] == [((8, 9), 6.0, log)], "bound late, watched at once"
    worker._leave(pid=0)
    assert not met[3:], "a forked child of a rank is not the rank"
    worker.unpatch()
    assert ends[-1] is None and met[3:] == 3 * ["left"] and started[3:] == 3 * ["killed", "waited for"]


def test_a_host_that_gives_out_our_own_logger(monkeypatch):
    """An older version returns the logger of that very name: then nothing is passed on in a circle."""
    import fastdeploy.utils

    monkeypatch.setattr(fastdeploy.utils, "get_logger", lambda name, file_name: logging.getLogger(name))
    monkeypatch.setenv(ENV_CONFIG, "{}")
    plugin._after_load("model", fd_config_of())
    assert not plugin.logger.handlers


def test_a_loader_given_something_unforeseen_still_returns_its_model(monkeypatch, caplog):
    """A config without parallel_config, and a host whose logger has gone."""
    import fastdeploy.utils

    plugin._after_load("model", object())
    assert not caplog.text
    monkeypatch.setenv(ENV_CONFIG, "{}")
    monkeypatch.delattr(fastdeploy.utils, "get_logger")
    plugin._after_load("model", object())
    assert "fastdeploy.utils.get_logger" in caplog.text and "off" in caplog.text


def test_a_loader_that_calls_another_binds_once(monkeypatch):
    from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader

    seen = []
    monkeypatch.setattr(plugin, "_after_load", lambda model, config: seen.append(model))
    plugin.register()

    class Inner(BaseModelLoader):
        def download_model(self, load_config):
            pass

        def load_model(self, fd_config):
            return "model"

    class Outer(Inner):
        def load_model(self, fd_config):
            return super().load_model(fd_config)

    assert Outer(None).load_model(fd_config="config") == "model" and seen == ["model"]
    assert Inner(None).load_model("config") == "model" and seen == ["model"] * 2


def test_the_eps_of_a_hosts_norm_is_read_at_each_call():
    import paddle
    from fastdeploy.config import FDConfig, ModelConfig, ParallelConfig
    from fastdeploy.model_executor.layers.normalization import QKRMSNorm, RMSNorm

    from fd_fusion.hosts.fastdeploy.adapters import pair_of, qk_norms_of
    from fd_fusion.hosts.fastdeploy.pairs import HostPair

    fd_config = FDConfig(ModelConfig({}), ParallelConfig({}), None, None, None)
    holder = paddle.nn.Layer()
    holder.norm = RMSNorm(fd_config, 8, 1e-5, "norm")
    holder.qk_norm = QKRMSNorm(fd_config, head_dim=8, q_size=16, kv_size=8, eps=1e-5, prefix="a")
    pair, (norm,) = pair_of(HostPair("a -> b", holder, holder.norm, ()), fd_config), qk_norms_of(holder, fd_config)
    for layer in (holder.norm, holder.qk_norm.q_norm):
        layer.eps = 0.5
    assert pair.stock.numbers() == norm.numbers() == (0.5, 0.0)


def test_the_q_and_k_norm_takes_a_kernel_in_every_call_form():
    """With and without forward_meta by the kernel; another norm by the host; and back."""
    import numpy as np
    import paddle
    from fastdeploy.config import FDConfig, ModelConfig, ParallelConfig
    from fastdeploy.model_executor.layers.normalization import QKRMSNorm

    from fd_fusion.frameworks import paddle_ops
    from fd_fusion.hosts.fastdeploy.adapters import qk_norms_of

    paddle.seed(0)
    fd_config = FDConfig(ModelConfig({}), ParallelConfig({}), None, None, None)
    holder = paddle.nn.Layer()
    holder.qk_norm = QKRMSNorm(fd_config, head_dim=8, q_size=16, kv_size=8, eps=1e-5, prefix="a")
    holder.qk_norm.q_norm.weight.set_value(paddle.rand([8]))
    (norm,) = qk_norms_of(holder, fd_config)
    detach = norm.attach(lambda qkv: qkv)
    with pytest.raises(TypeError, match="unbind"):  # the copy would normalise by the weights of this one
        copy.deepcopy(holder.qk_norm)
    detach()
    copy.deepcopy(holder.qk_norm)
    assert (norm.q_heads, norm.kv_heads, norm.head_dim, norm.width) == (2, 1, 8, 32)
    assert norm.dtype == "float32"
    assert norm.numbers() == (fd_config.model_config.rms_norm_eps, 0.0) != (holder.qk_norm.eps, 0.0)

    def kernel(qkv):
        q_weight, k_weight = norm.weights()
        for start, heads, weight in ((0, 2, q_weight), (16, 1, k_weight)):
            part = qkv[:, start : start + 8 * heads].reshape([-1, heads, 8])
            out, _ = paddle_ops.rms_norm(part, weight, eps=norm.numbers()[0])
            qkv[:, start : start + 8 * heads] = out.reshape([-1, 8 * heads])
        calls.append(len(qkv))
        return qkv

    calls = []
    rows = paddle.rand([5, 32])
    wanted = norm.stock(rows.clone()).numpy()
    undo = norm.attach(kernel)
    with paddle.no_grad():
        for arguments in ((), (object(),)):
            assert np.allclose(holder.qk_norm(rows.clone(), *arguments).numpy(), wanted, atol=1e-6)
        assert np.allclose(holder.qk_norm(rows.clone(), forward_meta=None).numpy(), wanted, atol=1e-6)
        assert calls == [5, 5, 5]
        doubled = holder.qk_norm(rows.clone(), None, proxy_rmsnorm=lambda x, weight, eps: x * 2).numpy()
    assert np.allclose(doubled[:, :24], 2 * rows.numpy()[:, :24]) and calls == [5, 5, 5]
    undo()
    assert "forward" not in holder.qk_norm.__dict__
