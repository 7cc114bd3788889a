"""Two ranks: a small decoder of fd_fusion's layers runs stock, then with the fused Triton kernel.

python -m paddle.distributed.launch --nproc_per_node 2 examples/two_ranks.py
"""

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

import fd_fusion
from fd_fusion import RMSNorm, RowParallelLinear

H, RANKS = 64, dist.get_world_size()


class Layer(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = RMSNorm(H), RMSNorm(H)
        self.qkv, self.up = nn.Linear(H, H), nn.Linear(H, H)  # each rank holds its own columns
        self.o_proj, self.down = RowParallelLinear(H * RANKS, H), RowParallelLinear(H * RANKS, H)  # its own rows

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.norm_1(x, residual)
        x = self.o_proj(nn.functional.silu(self.qkv(x)))  # stock: the sum; bound: this rank's part
        x, residual = self.norm_2(x, residual)  # bound: all-reduce, add and norm in one kernel
        return self.down(nn.functional.silu(self.up(x))), residual


class Model(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.LayerList([Layer(), Layer()]), RMSNorm(H)

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(x, residual)[0]


dist.init_parallel_env()
paddle.set_grad_enabled(False)
x = paddle.linspace(-1, 1, 4 * H).reshape([4, H])  # the same on every rank
paddle.seed(dist.get_rank())  # the weights differ by rank, as shards do
model = Model()
stock = model(x)
report = fd_fusion.bind(model, {"backend": "triton"}, example=lambda: model(x[:2]))
bound = model(x)
print("\n".join(report.lines()))
fd_fusion.unbind(model)  # every layer as it was
assert len(report.sites) == 4 and paddle.allclose(bound, stock, atol=1e-5)
