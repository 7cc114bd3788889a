"""Bugs seeded into the host: each is caught before anything is fused, on all ranks, and the model runs as stock."""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "host")]

import os

import numpy as np
import paddle.distributed as dist
from hosting import fd_config_of, hidden_states, worker_of, write_checkpoint
from support.rank import record, start

rank, size = start()
import fd_fusion
from fd_fusion.hosts.fastdeploy.plugin import register

register()
from fastdeploy.distributed.communication import tensor_model_parallel_all_reduce
from fastdeploy.model_executor.layers.linear import RowParallelLinear
from fastdeploy.model_executor.models import decoder, qwen3

TOKENS = [1, 2, 3]


def reduction_removed():
    """A block that never reduces: its pair is left alone, and the ranks' residuals part ways behind it."""

    class Silent(decoder.MLP):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, reduce_results=False, **kwargs)

    return (qwen3.Qwen3DecoderLayer, "mlp_class", _named("Qwen3MLP", Silent))


def reduction_doubled():
    """A linear that reduces whatever it is told."""

    def forward_cuda(self, x):
        return tensor_model_parallel_all_reduce(self.quant_method.apply(self, x), self.tp_group)

    return (RowParallelLinear, "forward_cuda", forward_cuda)


def output_scaled():
    """Between the linear and the norm something is done to the sum."""
    stock = decoder.Attention.forward

    def forward(self, forward_meta, hidden_states):
        return stock(self, forward_meta, hidden_states) * 0.5

    return (decoder.Attention, "forward", forward)


def auxiliary_read():
    """What passes between the layers is an output too, in a way that the source of the model does not show."""

    class Listening(qwen3.Qwen3DecoderLayer):
        def forward(self, *args):
            out = super().forward(*args)
            self.__dict__["heard"] = out[0]
            return out

    class Model(decoder.DecoderModel):
        layer_class = _named("Qwen3DecoderLayer", Listening)

        def forward(self, ids_remove_padding, forward_meta):
            out = super().forward(ids_remove_padding, forward_meta)
            return out, self.layers[0].heard

    return (qwen3, "Qwen3Model", Model)


def auxiliary_read_in_sight():
    class Model(decoder.DecoderModel):
        layer_class = qwen3.Qwen3DecoderLayer

        def forward(self, ids_remove_padding, forward_meta):
            hidden_states = self.embed_tokens(ids_remove_padding)
            residual, extra = None, []
            for i in range(self.num_layers):
                hidden_states, residual = self.layers[i](forward_meta, hidden_states, residual)
                extra.append(hidden_states + residual)
            return self.norm(hidden_states, residual, forward_meta=forward_meta)[0], extra[0]

    return (qwen3, "Qwen3Model", Model)


def _named(name, cls):
    cls.__name__ = name
    return cls


def outputs(folder, asked):
    os.environ.pop("FD_FUSION_CONFIG", None)
    if asked:
        os.environ["FD_FUSION_CONFIG"] = '{"timeout_s": 20}'
    worker = worker_of(fd_config_of(folder, size, rank, tp_group=dist.get_group(0)), rank)
    out = hidden_states(worker, TOKENS)
    return worker, [tensor.numpy().copy() for tensor in (out if isinstance(out, tuple) else (out,))]


CASES = {
    reduction_removed: "residual_differs",
    reduction_doubled: "already_reduced",
    output_scaled: "another tensor than the one handed over",
    auxiliary_read: "outputs_differ",
    auxiliary_read_in_sight: "read_between_layers",
}
found = {}
with tempfile.TemporaryDirectory() as scratch:
    folder = write_checkpoint(scratch, "Qwen3ForCausalLM")
    for seed, expected in CASES.items():
        owner, name, replacement = seed()
        stock = getattr(owner, name)
        setattr(owner, name, replacement)
        try:
            _, wanted = outputs(folder, asked=False)
            worker, got = outputs(folder, asked=True)
        finally:
            setattr(owner, name, stock)
        (report,) = [r for r in fd_fusion.report() if r.rejected]
        codes = {line.reason.root.code: str(line.reason) for line in report.rejected}
        assert not report.sites, f"{seed.__name__}: {report.lines()}"
        assert expected in codes or expected in str(codes), f"{seed.__name__}: {codes}"
        assert len(got) == len(wanted) and all(map(np.array_equal, got, wanted)), f"{seed.__name__}: not stock"
        fd_fusion.unbind(worker.model_runner.model)
        found[seed.__name__] = codes
record(**found)
