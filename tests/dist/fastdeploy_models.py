"""Every decoder of the contract host, stock and bound, from one checkpoint.

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
from hosting import ARCHITECTURES, fd_config_of, hidden_states, worker_of, write_checkpoint
from support.rank import end, start

rank, size = start()
import fd_fusion
from fd_fusion.hosts.fastdeploy.plugin import register, unregister
from fd_fusion.kernels.all_reduce import plan as plans

if "TEST_TWO_SHOT" in os.environ:  # the T from which two-shot runs
    plans._two_shot_rows = lambda *_: int(os.environ["TEST_TWO_SHOT"])
FEW, MANY = [1, 2, 3], [i % 60 for i in range(40)]
ROUNDINGS = 2e-5  # float32, over the few sites of these models
BACKEND = os.environ.get("TEST_BACKEND", "auto")
CONFIG = f'{{"max_token_num": 8, "timeout_s": 20, "backend": "{BACKEND}"}}'


def config_of(folder, asked, **arguments):
    os.environ.pop("FD_FUSION_CONFIG", None)
    if asked:
        os.environ["FD_FUSION_CONFIG"] = CONFIG
    return fd_config_of(folder, size, rank, tp_group=dist.get_group(0), **arguments)


def traces_of(model):
    """What binding may change in a model: names of attributes, and the values of plain ones."""
    return {
        (path, key): value if isinstance(value, (bool, int, float, str)) else key
        for path, layer in model.named_sublayers(include_self=True)
        for key, value in layer.__dict__.items()
        if key not in ("_full_name", "_built")  # Paddle's own books: of all layers, and of those called with a hook
    }


def compare(folder, architecture):
    stock = worker_of(config_of(folder, asked=False), rank)
    before = traces_of(stock.model_runner.model)
    wanted = {len(rows): hidden_states(stock, rows).numpy() for rows in (FEW, MANY)}
    bound = worker_of(config_of(folder, asked=True), rank)
    model = bound.model_runner.model
    loaded = dict(stock.model_runner.model.named_parameters())
    assert all(np.array_equal(param.numpy(), loaded.pop(name).numpy()) for name, param in model.named_parameters())
    assert not loaded
    (report,) = [r for r in fd_fusion.report() if r.sites]
    assert report.proven and not report.rejected, report.lines()
    assert hidden_states(bound, []).shape[0] == 0, "no rows, and nothing left pending"
    calls = {line.name: line.calls["fused"] for line in report.sites}
    got = hidden_states(bound, FEW).numpy()
    for line in report.sites:
        assert line.calls["fused"] == calls[line.name] + 1, f"{line.name} was not fused"
    stateful = architecture.startswith("Qwen3_5")
    exact = not stateful and not architecture.startswith("Ernie")  # reduced once instead of twice
    error = np.linalg.norm(got - wanted[len(FEW)]) / np.linalg.norm(wanted[len(FEW)])
    assert stateful or error < ROUNDINGS, f"{architecture}: fused differs by {error:.1e}"
    many = hidden_states(bound, MANY).numpy()
    stock_path = np.array_equal(many, wanted[len(MANY)])
    # With the triton backend q and k are normalised by its kernel, whatever the number of rows.
    assert stock_path or not exact or BACKEND != "auto", f"{architecture}: the stock path differs"
    fd_fusion.unbind(model)
    after = traces_of(model)
    after.update({key: value for key, value in before.items() if key[1] == "steps"})
    assert after == before, f"unbind left {sorted(set(after.items()) ^ set(before.items()), key=str)}"
    assert not exact or np.array_equal(hidden_states(bound, FEW).numpy(), wanted[len(FEW)])
    staying = [report.staying, report.residual and str(report.residual)]
    return {"error": float(error), "sites": [line.name for line in report.sites], "staying": staying}


register()
register()  # the second one is nothing
results = {}
with tempfile.TemporaryDirectory() as scratch:
    for architecture in sys.argv[1:] or ARCHITECTURES:
        folder = write_checkpoint(f"{scratch}/{architecture}", architecture)
        results[architecture] = compare(folder, architecture)
unregister()
from fastdeploy.model_executor.model_loader.default_loader_v1 import DefaultModelLoaderV1

assert not hasattr(DefaultModelLoaderV1.load_model, "__wrapped__")
end(**results)
