"""Two ranks on a CPU: a small decoder of fd_fusion's layers runs stock, then with the fused Triton kernel.

    python -m paddle.distributed.launch --nproc_per_node 2 examples/two_ranks.py

On a CPU Triton's interpreter runs the kernel: the numbers are real, the times are not.
"""

import os

import paddle
import paddle.distributed as dist
from paddle import nn

import fd_fusion
from fd_fusion import RMSNorm, RowParallelLinear

H = 64


class Layer(nn.Layer):
    def __init__(self, ranks):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(H), RMSNorm(H)
        self.qkv, self.up = nn.Linear(H, H), nn.Linear(H, H)  # each rank holds its own columns
        self.self_attn, self.mlp = nn.Layer(), nn.Layer()
        self.self_attn.o_proj = RowParallelLinear(H * ranks, H)  # each rank holds its own rows
        self.mlp.down_proj = RowParallelLinear(H * ranks, H)

    def forward(self, x, residual):
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn.o_proj(nn.functional.silu(self.qkv(x)))  # stock: the sum; bound: this rank's part
        x, residual = self.post_attention_layernorm(x, residual)  # bound: all-reduce, add and norm in one kernel
        return self.mlp.down_proj(nn.functional.silu(self.up(x))), residual


class DemoDecoder(nn.Layer):  # bind finds the pairs of this class by these attribute names
    def __init__(self, ranks):
        super().__init__()
        self.layers, self.norm = nn.LayerList([Layer(ranks), Layer(ranks)]), RMSNorm(H)

    def forward(self, x, residual=None):
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(x, residual)[0]


if not paddle.is_compiled_with_cuda():
    os.environ.setdefault("PADDLE_DISTRI_BACKEND", "gloo")
dist.init_parallel_env()
paddle.set_grad_enabled(False)
x = paddle.linspace(-1, 1, 4 * H).reshape([4, H])  # the same on every rank
paddle.seed(dist.get_rank())  # the weights differ by rank, as shards do
model = DemoDecoder(dist.get_world_size())
model.eval()
stock = model(x)
report = fd_fusion.bind(model, {"backend": "triton"}, example=lambda: (model(x[:2]),))
bound = model(x)
print("\n".join(report.lines()))
print("largest difference from stock:", float((bound - stock).abs().max()))
fd_fusion.unbind(model)  # every layer as it was
assert len(report.sites) == 4 and float((bound - stock).abs().max()) < 1e-5
