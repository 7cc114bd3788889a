"""bind in processes of paddle.distributed.spawn, which announces the store in another way than the launcher. 2 ranks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import paddle.distributed as dist
from support import rank as this
from support.tiny import DemoDecoder, hidden

import fd_fusion


def work():
    rank, size = this.start()
    model, x = DemoDecoder(rank, size, layers=1), hidden(3)
    stock = model(x)
    report = fd_fusion.bind(model, fd_fusion.FusionConfig(timeout_s=10), example=lambda: (model(x),))
    worst = float((model(x) - stock).abs().max() / stock.abs().max())
    this.record(sites=len(report.sites), off=report.off and report.off.code, worst=worst)
    dist.barrier()  # the store lives on rank 0


if __name__ == "__main__":
    dist.spawn(work, nprocs=2, backend="gloo")
