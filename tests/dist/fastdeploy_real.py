"""FastDeploy's real layers and models, from the source tree FASTDEPLOY_SRC: stock and bound, on the same weights."""

import inspect
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "host")]

import numpy as np
import paddle
import paddle.distributed as dist
import real
from paddle.distributed import fleet
from support.rank import record, start

rank, size = start()
strategy = fleet.DistributedStrategy()  # as a rank does it: a reduction without a group is over all ranks of this
strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": size, "pp_degree": 1, "sharding_degree": 1}
fleet.init(is_collective=True, strategy=strategy)
real.install()
MODELS = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
}
real.load(MODELS)
import fd_fusion
from fd_fusion.hosts.fastdeploy.plugin import register, unregister

register()
from fastdeploy.model_executor.graph_optimization.utils import profile_run_guard, sot_warmup_guard
from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader

FEW, MANY = 3, 40
ROUNDINGS = 2e-5


class Loader(BaseModelLoader):
    """One of the tests' own over the host's base: builds, and fills in the same numbers each time."""

    def __init__(self, module):
        super().__init__(load_config=None)
        self.module = sys.modules[f"fastdeploy.model_executor.models.{module}"]

    def download_model(self, model_config):
        pass

    def load_model(self, fd_config):
        model = getattr(self.module, MODELS[self.module.__name__.rpartition(".")[2]])(fd_config)
        model.eval()
        shared, own = np.random.default_rng(3), np.random.default_rng(10 + rank)
        for name, param in model.named_parameters():
            split = not any(part in name for part in ("norm", "gate.weight", "embed"))
            value = (own if split else shared).standard_normal(param.shape) / np.sqrt(param.shape[0])
            param.set_value((1 + 0.1 * value if "norm" in name else value).astype("float32"))
        return model


def outputs(model, rows):
    ids = paddle.to_tensor(np.arange(rows) % 60)
    inputs = {"ids_remove_padding": ids} if "inputs" in inspect.signature(type(model).forward).parameters else ids
    with paddle.no_grad():
        return model(inputs, real.Config(ids_remove_padding=ids, position_ids=ids)).numpy()


def load(module, asked, flag=False, level=0):
    os.environ.pop("FD_FUSION_CONFIG", None)
    if asked:
        os.environ["FD_FUSION_CONFIG"] = '{"max_token_num": 8, "timeout_s": 20}'
    fd_config = real.fd_config_of(rank, size, dist.get_group(0), flag, level)
    return Loader(module).load_model(fd_config)


def compare(module, flag):
    """`flag` is upstream's own: its fusion cannot run here, and must not where every pair has a site."""
    stock, model = load(module, asked=False), load(module, asked=True, flag=flag)
    names = [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert np.isfinite(outputs(model, FEW)).all()  # the first forward binds
    (report,) = fd_fusion.report()
    assert report.proven and len(report.sites) == 6 and not report.rejected, f"{module}: {report.lines()}"
    before = [line.calls["fused"] for line in report.sites]
    error = {}
    for rows in (FEW, MANY):
        want = outputs(stock, rows)
        error[rows] = float(np.linalg.norm(outputs(model, rows) - want) / np.linalg.norm(want))
        assert error[rows] < ROUNDINGS, f"{module}: {rows} rows differ by {error[rows]:.1e}"
    assert [line.calls["fused"] for line in report.sites] == [n + 1 for n in before], f"{module}: few fuse, many do not"
    fd_fusion.unbind(model)
    assert flag or np.array_equal(outputs(model, FEW), outputs(stock, FEW)), f"{module}: unbind left a trace"
    assert [name for name, _ in model.named_parameters()] == names
    return error


def trace(module):
    """A static graph by the host's own road, which refuses more than one graph, and a broken one."""
    stock, model = load(module, asked=False), load(module, asked=True, level=1)
    with profile_run_guard(True):
        outputs(model, FEW)
    (report,) = fd_fusion.report()
    with sot_warmup_guard(True):
        outputs(model, FEW + 2)
    before = [line.calls["fused"] for line in report.sites]
    for rows in (FEW, MANY):
        assert np.allclose(outputs(model, rows), outputs(stock, rows), atol=1e-5), f"{module}, traced: {rows} rows"
    assert [line.calls["fused"] for line in report.sites] == [n + 1 for n in before], f"{module}, traced"
    fd_fusion.unbind(model)


for module in ("qwen2", "glm4_moe"):
    trace(module)
results = {module: compare(module, flag=False) for module in MODELS}
results["glm4_moe, upstream's flag"] = compare("glm4_moe", flag=True)
unregister()
record(**results)
