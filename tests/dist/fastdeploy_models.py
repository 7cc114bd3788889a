"""Every decoder of the contract host, stock and bound, from one checkpoint, with both loaders.

Bound equals stock: the parameters bit for bit, the outputs bit for bit where nothing is fused and within roundings
where it is; every site is proven; after `unbind` no trace is left.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "host")]

import numpy as np
import paddle.distributed as dist
from support.rank import record, start

from hosting import ARCHITECTURES, fd_config_of, hidden_states, worker_of, write_checkpoint

rank, size = start()
import fd_fusion
from fd_fusion.integration.fastdeploy import register, unregister

FEW, MANY = [1, 2, 3], [i % 60 for i in range(40)]
ROUNDINGS = 2e-5  # float32, over the few sites of these models
CONFIG = '{"max_token_num": 32, "timeout_s": 20}'


def bring_up(folder, loader, asked):
    os.environ.pop("FD_FUSION_CONFIG", None)
    if asked:
        os.environ["FD_FUSION_CONFIG"] = CONFIG
    fd_config = fd_config_of(folder, size, rank, tp_group=dist.get_group(0), load_choices=loader)
    return worker_of(fd_config, rank)


def state_of(model):
    return {name: param.numpy().copy() for name, param in model.named_parameters()}


def attributes_of(model):
    """What binding may change: every plain attribute of every layer, by identity."""
    plain = (bool, int, float, str, type(None))
    return {
        (path, key): value if isinstance(value, plain) else id(getattr(value, "__func__", value))
        for path, layer in model.named_sublayers(include_self=True)
        for key, value in layer.__dict__.items()
        if key in ("forward", "reduce_results", "enable_all_reduce_fusion", "tp_size", "merge_ffn_tp", "site")
    }


def compare(folder, architecture, loader):
    stock = bring_up(folder, loader, asked=False)
    before = attributes_of(stock.model_runner.model)
    wanted = {len(rows): hidden_states(stock, rows).numpy() for rows in (FEW, MANY)}
    bound = bring_up(folder, loader, asked=True)
    model = bound.model_runner.model
    (report,) = [r for r in fd_fusion.report() if r.sites]
    assert report.proven and not report.rejected, report.lines()
    params = state_of(model)
    for name, value in state_of(stock.model_runner.model).items():
        assert np.array_equal(params[name], value), f"{architecture} {loader}: {name} differs"
    calls = {line.name: line.calls["fused"] for line in report.sites}
    got = hidden_states(bound, FEW).numpy()
    for line in report.sites:
        assert line.calls["fused"] == calls[line.name] + 1, f"{line.name} was not fused"
    error = np.linalg.norm(got - wanted[len(FEW)]) / np.linalg.norm(wanted[len(FEW)])
    stateful = architecture.startswith("Qwen3_5")
    assert stateful or error < ROUNDINGS, f"{architecture} {loader}: fused differs by {error:.1e}"
    many = hidden_states(bound, MANY).numpy()
    exact = not stateful and not architecture.startswith("Ernie")  # reduced once instead of twice
    assert not exact or np.array_equal(many, wanted[len(MANY)]), f"{architecture} {loader}: stock path differs"
    fd_fusion.unbind(model)
    assert attributes_of(model).keys() == before.keys(), "unbind left something behind"
    if exact:
        assert np.array_equal(hidden_states(bound, FEW).numpy(), wanted[len(FEW)])
    return {"sites": len(report.sites), "error": float(error), "names": [line.name for line in report.sites]}


register()
register()  # the second one is nothing
results = {}
with tempfile.TemporaryDirectory() as scratch:
    for architecture in ARCHITECTURES:
        folder = write_checkpoint(f"{scratch}/{architecture}", architecture)
        for loader in ("default", "default_v1"):
            results[f"{architecture} {loader}"] = compare(folder, architecture, loader)
unregister()
from fastdeploy.model_executor.model_loader.default_loader import DefaultModelLoader

assert not hasattr(DefaultModelLoader.load_model, "__wrapped__")
record(**results)
