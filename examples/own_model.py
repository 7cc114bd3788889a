"""A model of one's own on two ranks: any class, any names, a block that reduces once for two linears.

python -m paddle.distributed.launch --nproc_per_node 2 examples/own_model.py
"""

import os

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

import fd_fusion
from fd_fusion import RMSNorm, RowParallelLinear
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
        self.mixer, self.out = Mixer(), RowParallelLinear(H * RANKS, H)
        self.before_mixer, self.before_out = RMSNorm(H), RMSNorm(H)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.before_out(x, residual)
        x, residual = self.before_mixer(self.out(x), residual)
        return self.mixer(x), residual


class Ladder(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.rungs = RMSNorm(H), nn.LayerList([Rung() for _ in range(3)])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        for rung in self.rungs:
            x, residual = rung(x, residual)
        return self.last(x, residual)[0]


PAIRS = [  # a layer that ends in an all-reduce, and the norm that reads it
    ("rungs.{i}.out", "rungs.{i}.before_mixer"),  # {i}: every number
    ("rungs.{i}.mixer", "rungs.{i+1}.before_out"),  # {i+1}: the next one
    ("rungs.-1.mixer", "last"),  # -1: the last one
]
if not paddle.is_compiled_with_cuda():
    os.environ.setdefault("PADDLE_DISTRI_BACKEND", "gloo")
dist.init_parallel_env()
paddle.set_grad_enabled(False)
x = paddle.linspace(-1, 1, 3 * H).reshape([3, H])  # the same on every rank
paddle.seed(dist.get_rank())
model = Ladder()
stock = model(x)
report = fd_fusion.bind(model, {"backend": "triton"}, pairs=PAIRS, example=lambda: model(x[:2]))
print("\n".join(report.lines()))
assert len(report.sites) == 6 and paddle.allclose(model(x), stock, atol=1e-5)
