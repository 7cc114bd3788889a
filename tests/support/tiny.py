"""A decoder of a few lines with the structure that the pair table knows, and random weights that differ by rank."""

import paddle
from paddle import nn

from fd_fusion import RMSNorm, RowParallelLinear

H = 32


class Attention(nn.Layer):
    def __init__(self, size, group, config):
        super().__init__()
        self.o_proj = RowParallelLinear(H * size, H, has_bias=True, group=group, fusion_config=config)

    def forward(self, x):
        return self.o_proj(x)


class Mlp(nn.Layer):
    def __init__(self, size, group, config):
        super().__init__()
        self.down_proj = RowParallelLinear(H * size, H, group=group, fusion_config=config)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(x))


class Layer(nn.Layer):
    def __init__(self, size, group, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(size, group, config), Mlp(size, group, config)
        self.input_layernorm = RMSNorm(H, fusion_config=config)
        self.post_attention_layernorm = RMSNorm(H, fusion_config=config)

    def forward(self, hidden, residual):
        if residual is None:
            hidden, residual = self.input_layernorm(hidden)[0], hidden
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden), residual)
        return self.mlp(hidden), residual


class DemoDecoder(nn.Layer):
    """Three layers, six pairs. `group` None is the default group."""

    def __init__(self, rank, size, *, layers=3, group=None, config=None):
        super().__init__()
        paddle.seed(100 + rank)  # each rank holds other weights, as its share of a sharded layer would be
        self.layers = nn.LayerList([Layer(size, group, config) for _ in range(layers)])
        self.norm = RMSNorm(H, fusion_config=config)
        self.eval()

    def forward(self, hidden):
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.norm(hidden, residual)[0]


def hidden(rows, seed=5):
    """The same input on every rank."""
    paddle.seed(seed)
    return paddle.randn([rows, H])
