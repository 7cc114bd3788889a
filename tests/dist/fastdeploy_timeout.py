"""A rank that stops answering: the other one raises FusionTimeout before a token of that step leaves it, in time."""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "host")]

import os
import time

import paddle.distributed as dist
from hosting import fd_config_of, worker_of, write_checkpoint
from support.rank import record, start

rank, size = start()
from fd_fusion import FusionTimeout
from fd_fusion.hosts.fastdeploy.plugin import register

register()
os.environ["FD_FUSION_CONFIG"] = '{"backend": "triton", "timeout_s": 5, "max_token_num": 8}'
tokens, noticed = (Path(os.environ["FD_LOG_DIR"]) / name for name in ("tokens.jsonl", "noticed"))
with tempfile.TemporaryDirectory() as scratch:
    folder = write_checkpoint(scratch, "Qwen2ForCausalLM", num_hidden_layers=1)
    worker = worker_of(fd_config_of(folder, size, rank, tp_group=dist.get_group(0)), rank)
worker.execute_model([1, 2])
dist.barrier()
waited = None
if rank == 0:
    begin = time.monotonic()
    try:
        for _ in range(3):  # the abort is seen at the latest when the next step is about to be published
            worker.execute_model([3, 4])
        raise AssertionError("the missing rank was not noticed")
    except FusionTimeout as error:
        waited = time.monotonic() - begin
        said = str(error)
    assert "1" in said and len(tokens.read_text().splitlines()) == 1, "only the first step was published"
    noticed.touch()
else:
    for _ in range(1200):  # silent, but alive, until the other one has noticed
        if noticed.exists():
            break
        time.sleep(0.1)
record(waited=waited)
os._exit(0)  # nothing collective is left to do with a dead workspace
