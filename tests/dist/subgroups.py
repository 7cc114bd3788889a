"""Two groups of two ranks in a job of four (DP=2 x TP=2): their own ranks, their own votes, their own sums."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import paddle.distributed as dist
from support import rank as this
from support.tiny import DemoDecoder, hidden

import fd_fusion
from fd_fusion.frameworks.paddle_ops import group_of
from fd_fusion.comm.vote import Vote, agree
from fd_fusion.reasons import because

rank, size = this.start()
groups = []
for ranks in ([0, 1], [2, 3]):
    groups.append(dist.new_group(ranks))
    dist.barrier()  # gloo's rendezvous needs it: without, creating a second group fails now and then
mine = groups[rank // 2]
group = group_of(mine)
assert (group.rank, group.size, group.ranks) == (rank % 2, 2, tuple(mine.ranks))

# A refusal in one group is none of the other's business.
verdict = agree(group, "t", Vote(because("no_rows") if rank == 3 else None, rank), timeout_s=5)
assert verdict.ok == (rank < 2) and list(verdict.data) == list(mine.ranks)

model = DemoDecoder(rank, 2, group=mine)
x = hidden(3, seed=rank // 2)  # each replica serves its own tokens
stock = model(x)
report = fd_fusion.bind(model, fd_fusion.FusionConfig(timeout_s=10), example=lambda: (model(x[:2]),))
assert len(report.sites) == 6 and report.sites[0].ranks == tuple(mine.ranks), report.lines()
fused = model(x)
assert float((fused - stock).abs().max()) <= 2e-5 * float(stock.abs().max())
assert report.sites[0].calls["fused"] == 1
this.record(ok=True, bits=fused.numpy().tobytes().hex())
