"""DP=2 x TP=2: each replica binds over its own two ranks, runs other rows and other steps, and stops alone."""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "host")]

import os

import numpy as np
import paddle.distributed as dist
from hosting import fd_config_of, hidden_states, worker_of, write_checkpoint
from support.rank import record, start

rank, size = start()
assert size == 4
import fd_fusion
from fd_fusion.hosts.fastdeploy.plugin import register

register()
TP = 2
replica = rank // TP


def config_of(folder, asked, tp_group=None):
    os.environ.pop("FD_FUSION_CONFIG", None)
    if asked:
        os.environ["FD_FUSION_CONFIG"] = '{"max_token_num": 16, "timeout_s": 20}'
    return fd_config_of(folder, TP, rank, tp_group=tp_group, data_parallel_size=2)


with tempfile.TemporaryDirectory() as scratch:
    folder = write_checkpoint(scratch, "Qwen3MoeForCausalLM")
    stock_config = config_of(folder, asked=False)
    group = stock_config.parallel_config.tp_group
    assert group.nranks == TP and list(group.ranks) == [2 * replica, 2 * replica + 1]
    stock = worker_of(stock_config, rank)
    bound = worker_of(config_of(folder, asked=True, tp_group=group), rank)
    (report,) = fd_fusion.report()
    assert report.proven and {line.ranks for line in report.sites} == {(2 * replica, 2 * replica + 1)}
    # The replicas do not keep step: another number of rows, another number of forwards.
    for step in range(2 + 3 * replica):
        rows = [step + 1 + replica] * (3 + 5 * replica)
        got, wanted = hidden_states(bound, rows).numpy(), hidden_states(stock, rows).numpy()
        assert np.allclose(got, wanted, atol=1e-5), f"replica {replica}, step {step}"
        assert np.isfinite(got).all()
    # One replica goes away while the other one goes on.
    if replica:
        fd_fusion.unbind(bound.model_runner.model)
    got, wanted = hidden_states(bound, [1, 2]).numpy(), hidden_states(stock, [1, 2]).numpy()
    assert np.allclose(got, wanted, atol=1e-5)
    bits = [line.calls["fused"] for line in report.sites]
    dist.barrier()
record(replica=replica, sites=len(report.sites), fused=bits)
