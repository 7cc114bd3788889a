"""A rank: a strict parser, the group, the configs (and with them the plugins), the model, the steps."""

import argparse
import json
import os
import sys
import time

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "../..")))

import paddle
import paddle.distributed as dist

from fastdeploy.config import (
    FDConfig,
    GraphOptimizationConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
)


def parse_args(words=None):
    parser = argparse.ArgumentParser("worker")
    parser.add_argument("-m", "--model", type=str, default="")
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--data_parallel_size", type=int, default=1)
    parser.add_argument("--do_profile", action="store_true")
    parser.add_argument("--enable_flashinfer_allreduce_fusion", action="store_true")
    parser.add_argument("--graph_optimization_config", type=json.loads, default=None)
    return parser.parse_args(words)


def initialize_fd_config(args, ranks=1, local_rank=0):
    model_config = ModelConfig(vars(args))
    paddle.set_default_dtype(model_config.dtype)
    parallel_config = ParallelConfig(vars(args))
    parallel_config.tensor_parallel_rank = local_rank % parallel_config.tensor_parallel_size
    parallel_config.data_parallel_rank = local_rank // parallel_config.tensor_parallel_size
    parallel_config.set_communicate_group()
    speculative = getattr(args, "speculative_config", None)
    graph = GraphOptimizationConfig(args.graph_optimization_config)
    return FDConfig(model_config, parallel_config, LoadConfig(vars(args)), SpeculativeConfig(speculative), graph)


def bring_up(worker, do_profile):
    """The order of the host: device, model, profile (unless the blocks are given), cache, graphs."""
    worker.init_device()
    worker.load_model()
    if do_profile:
        worker.determine_available_memory()
    worker.initialize_cache(num_gpu_blocks=1)
    worker.graph_optimize_and_warm_up_model()


@paddle.no_grad()
def run_worker_proc():
    args = parse_args()
    dist.init_parallel_env()
    with open(os.path.join(os.environ.get("FD_LOG_DIR", "log"), f"pid.{dist.get_rank()}"), "w") as file:
        file.write(str(os.getpid()))
    fd_config = initialize_fd_config(args, dist.get_world_size(), dist.get_rank())
    from fastdeploy.worker.gpu_worker import GpuWorker

    worker = GpuWorker(fd_config, local_rank=dist.get_rank(), rank=dist.get_rank())
    bring_up(worker, args.do_profile)
    for step in range(3):
        worker.execute_model([step + 1, step + 2, step + 5])
    while os.environ.get("HOST_LINGER") == "1":
        time.sleep(0.05)


if __name__ == "__main__":
    run_worker_proc()
