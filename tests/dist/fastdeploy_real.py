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
    "gpt_oss": "GptOssForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "kimi_k25": "KimiK25ForConditionalGeneration",
    "ernie4_5_mtp": "Ernie4_5_MTPForCausalLM",
    "ernie4_5_vl.ernie4_5_vl_moe": "Ernie4_5_VLModel",
    "paddleocr_vl.paddleocr_vl": "PaddleOCRVLModel",
    "qwen2_5_vl.qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl.qwen3_vl": "Qwen3_VLModel",
    "qwen3_vl.qwen3_vl_moe": "Qwen3VLMoeModel",
}
CHANGES = {
    "glm_moe_dsa": {"model_type": "glm_moe_dsa"},
    "kimi_k25": {"model_type": "kimi_k25", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1},
    "ernie4_5_vl.ernie4_5_vl_moe": {"moe_num_experts": [4, 4], "moe_intermediate_size": [24, 24]},
}
REFUSED = ("qwen3_vl.qwen3_vl", "qwen3_vl.qwen3_vl_moe")  # they add image features between their layers
real.load(MODELS)
import fd_fusion
from fd_fusion.hosts.fastdeploy.plugin import register, unregister

register()
from fastdeploy.model_executor.graph_optimization.utils import profile_run_guard, sot_warmup_guard
from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader

FEW, MANY = 3, 40
ROUNDINGS = 2e-5


class Stack(paddle.nn.Layer):
    """The language half of a model that sees: from embeddings, with the arguments that its forward names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, meta):
        given = {"input_embeddings": self.model.embed_tokens(ids), "ids_remove_padding": ids, "forward_meta": meta}
        given["vl_moe_meta"] = real.Config(token_type_ids=(ids >= 2).cast("int32"))
        names = inspect.signature(type(self.model).forward).parameters
        return self.model(**{name: given.get(name) for name in names if name != "self"})


class Loader(BaseModelLoader):
    """One of the tests' own over the host's base: builds, and fills in the same numbers each time."""

    def __init__(self, module):
        super().__init__(load_config=None)
        self.kind = getattr(sys.modules[f"fastdeploy.model_executor.models.{module}"], MODELS[module])

    def download_model(self, model_config):
        pass

    def load_model(self, fd_config):
        model = self.kind(fd_config=fd_config)
        model = Stack(model) if self.kind.__name__.endswith("Model") else model
        model.eval()
        shared, own = np.random.default_rng(3), np.random.default_rng(10 + rank)
        for name, param in model.named_parameters():
            if name.startswith("ernie.norm") and "MTP" in self.kind.__name__:
                continue  # of the model that it drafts for
            split = not any(part in name for part in ("norm", "gate.weight", "router", "embed", "eh_proj"))
            value = (own if split else shared).standard_normal(param.shape) / np.sqrt(param.shape[0])
            param.set_value((1 + 0.1 * value if "norm" in name else value).astype("float32"))
        return model


def outputs(model, rows):
    ids = paddle.to_tensor(np.arange(rows) % 60)
    inputs = {"ids_remove_padding": ids} if "inputs" in inspect.signature(type(model).forward).parameters else ids
    with paddle.no_grad():
        return model(inputs, real.Config(ids_remove_padding=ids, position_ids=ids)).numpy()


def load(module, asked, flag=False, level=0, **more):
    os.environ.pop("FD_FUSION_CONFIG", None)
    if asked:
        os.environ["FD_FUSION_CONFIG"] = '{"max_token_num": 8, "timeout_s": 20}'
    more = {**CHANGES.get(module, {}), **more}
    return Loader(module).load_model(real.fd_config_of(rank, size, dist.get_group(0), flag, level, **more))


def compare(module, flag=False, off=(), **more):
    """`flag` is upstream's own: its fusion cannot run here, and must not where every pair has a site. `off`: reasons."""
    stock, model = load(module, asked=False, **more), load(module, asked=True, flag=flag, **more)
    names = [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert np.isfinite(outputs(model, FEW)).all()  # the first forward binds
    (report,) = fd_fusion.report()
    assert report.proven and len(report.sites) == 6 - len(off), f"{module}: {report.lines()}"
    assert [one.reason.code for one in report.rejected] == list(off), f"{module}: {report.lines()}"
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


def refused(module):
    model = load(module, asked=True)
    outputs(model, FEW)
    (report,) = fd_fusion.report()
    assert not report.sites and [one.reason.code for one in report.rejected] == ["read_between_layers"], report.lines()
    fd_fusion.unbind(model)


def draft():
    """A draft model that runs the last norm of the model that it drafts for: stock and beside a bound one."""
    said = []
    for asked in (False, True):
        target = load("ernie4_5_moe", asked)
        speculative = real.Config(model_type="mtp", sharing_model=target)
        model = load("ernie4_5_mtp", asked, speculative=speculative)
        hidden, ids = outputs(target, FEW), paddle.to_tensor(np.arange(FEW))
        with paddle.no_grad():
            said.append(model(ids, paddle.to_tensor(hidden), real.Config(ids_remove_padding=ids)).numpy())
    off, report = sorted(fd_fusion.report(), key=lambda one: len(one.sites))
    assert off.off.code == "draft_model" and report.proven and len(report.sites) == 5
    assert [one.reason.code for one in report.rejected] == ["shared_with_draft"]
    assert np.allclose(*said, atol=1e-5)
    fd_fusion.unbind(target)


for module in ("qwen2", "glm4_moe"):
    trace(module)
draft()
for module in REFUSED:
    refused(module)
results = {module: compare(module) for module in MODELS if module not in REFUSED and module != "ernie4_5_mtp"}
for module in ("qwen3moe", "glm4_moe", "deepseek_v3"):
    results[f"{module}, expert parallel"] = compare(module, off=["expert_parallel"] * 2, expert_parallel=True)
results["glm4_moe, upstream's flag"] = compare("glm4_moe", flag=True)
unregister()
record(**results)
