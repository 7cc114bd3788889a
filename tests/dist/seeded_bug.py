"""A reduction too few, or one too many, in the demo's decoder: bind must refuse it, and the truth must show it."""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import paddle
from support import rank as this

from fd_fusion import FusionConfig, bind, unbind
from fd_fusion.frameworks.paddle_ops import all_reduce, linear
from fd_fusion.cli.demo.checkpoint import Checkpoint, write_checkpoint
from fd_fusion.cli.demo.config import DecoderConfig
from fd_fusion.cli.demo.model import load_model
from fd_fusion.cli.demo.reference import make_truth
from fd_fusion.layers.row_parallel_linear import reduce_or_hand_over
from fd_fusion.reference import budget

SMALL = DecoderConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    intermediate_size=64,
    moe_intermediate_size=32,
    vocab_size=64,
)


def healthy(model):
    """Nothing is wrong."""


def forgets_to_reduce(model):
    """The output projection returns its product as it is."""
    layer = model.model.layers[1].self_attn.o_proj
    layer.forward = lambda x: linear(x, layer.weight)


def flag_says_no(model):
    """The MLP leaves the reduction to somebody who does not exist."""
    model.model.layers[0].mlp.down_proj.reduce_results = False


def reduces_before(model):
    """A part of the MoE block is reduced, and then the whole of it."""
    experts = model.model.layers[1].mlp.shared_experts
    experts.down_proj.reduce_results = True


def reduces_after(model):
    """The product is reduced once more after it was reduced, or handed over."""
    layer = model.model.layers[0].mlp.down_proj
    stock = layer.forward
    layer.forward = lambda x: all_reduce(stock(x))


def reduces_twice(model):
    """The product is reduced before the layer's own end reduces it, or hands it over."""
    layer = model.model.layers[0].self_attn.o_proj
    layer.forward = lambda x: reduce_or_hand_over(layer, all_reduce(linear(x, layer.weight)))


def judge(checkpoint, truth, seed_bug):
    """What a model with this bug does: its error in budgets, stock and after bind, and what the report says."""
    model = load_model(checkpoint)
    seed_bug(model)
    tokens = paddle.to_tensor(truth.tokens)
    allowed = budget(truth.plain_error, "float32", float(np.abs(truth.logits).max()))

    def run():
        return model(tokens, {})[-1].numpy()

    stock = run()
    report = bind(model, FusionConfig(timeout_s=10), example=lambda: model(tokens[:2], {}))
    after = run()
    unbind(model)
    return {
        "sites": len(report.sites),
        "codes": sorted({one.reason.root.code for one in report.rejected}),
        "text": [str(one.reason) for one in report.rejected][:1],
        "stock": float(np.abs(stock - truth.logits[-1]).max() / allowed),
        "bound": float(np.abs(after - truth.logits[-1]).max() / allowed),
        "as_stock": bool((after == stock).all()),
    }


rank, size = this.start()
folder = Path(tempfile.mkdtemp())
try:
    write_checkpoint(folder, SMALL, seed=0)
    checkpoint = Checkpoint(folder)
    truth = make_truth(checkpoint, list(range(12)), 1)
    bugs = (healthy, forgets_to_reduce, flag_says_no, reduces_before, reduces_after, reduces_twice)
    results = {bug.__name__: judge(checkpoint, truth, bug) for bug in bugs}
finally:
    shutil.rmtree(folder)
this.record(**results)
