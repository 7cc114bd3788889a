"""A model of one's own on two ranks: any class, any names, a block that reduces once for two linears.

python -m paddle.distributed.launch --nproc_per_node 2 examples/own_model.py
"""

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from fd_fusion import RMSNorm, RowParallelLinear, bind
from fd_fusion.layers import reduce_or_hand_over

H, RANKS = 32, dist.get_world_size()


class Mixer(nn.Layer):
    site, group, reduce_results = None, None, True  # what bind looks for in a block that reduces

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (RowParallelLinear(H * RANKS, H, reduce_results=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return reduce_or_hand_over(self, self.left(x) + self.right(nn.functional.silu(x)))


class Rung(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.mixer = RowParallelLinear(H * RANKS, H), Mixer()
        self.before_out, self.before_mixer = RMSNorm(H), RMSNorm(H)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.before_out(x, residual)
        x, residual = self.before_mixer(self.out(x), residual)
        return self.mixer(x), residual


class Ladder(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.rungs, self.last = nn.LayerList([Rung(), Rung(), Rung()]), RMSNorm(H)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        for rung in self.rungs:
            x, residual = rung(x, residual)
        return self.last(x, residual)[0]


PAIRS = [  # a layer that ends in an all-reduce, and the norm that reads its sum
    ("rungs.{i}.out", "rungs.{i}.before_mixer"),  # {i}: every number
    ("rungs.{i}.mixer", "rungs.{i+1}.before_out"),  # {i+1}: the next number
    ("rungs.-1.mixer", "last"),  # -1: the last number
]
dist.init_parallel_env()
paddle.set_grad_enabled(False)
x = paddle.linspace(-1, 1, 3 * H).reshape([3, H])  # the same on every rank
paddle.seed(dist.get_rank())  # the weights differ by rank, as shards do
model = Ladder()
stock = model(x)
report = bind(model, {"backend": "triton"}, pairs=PAIRS, example=lambda: model(x[:2]))
print("\n".join(report.lines()))
assert len(report.sites) == 6 and paddle.allclose(model(x), stock, atol=1e-5)
