"""Layers of `block_wise_fp8` over the contract host, with a quantiser by formula: bound, they take what the kernel
quantised, and give the bits that they give when they quantise the norm themselves."""

import contextlib
import functools
import os
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "host")]

import numpy as np
import paddle
import paddle.distributed as dist
from hosting import fd_config_of, hidden_states, worker_of, write_checkpoint
from support.rank import end, start

rank, size = start()
import fd_fusion
from fd_fusion.frameworks import paddle_fp8
from fd_fusion.frameworks.tensors import bytes_of
from fd_fusion.hosts.fastdeploy import fp8
from fd_fusion.hosts.fastdeploy.plugin import register

register()
import fastdeploy.model_executor
from fastdeploy.model_executor.forward_meta import ForwardMeta
from fastdeploy.model_executor.layers.linear import BlockWiseFP8LinearMethod
from paddle.jit import sot

from fd_fusion.layers import finish_op

FEW, MANY = [1, 2, 3], [i % 60 for i in range(20)]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
phi = paddle.incubate.nn.functional
gpu = types.ModuleType("fastdeploy.model_executor.ops.gpu")
sys.modules[gpu.__name__] = gpu
fastdeploy.model_executor.ops = sys.modules["fastdeploy.model_executor.ops"] = types.ModuleType("ops")
fastdeploy.model_executor.ops.gpu = gpu
calls, broken = [], False  # the shape of each x that the host quantised


def by_phi(x, *, using_pow2_scale, output_scale_transpose, using_ue8m0_scale=False):
    calls.append(list(x.shape))
    formula = "multiply_pow2" if using_pow2_scale else "multiply"
    codes, scales = paddle_fp8.quantise(x, formula, output_scale_transpose, 1.0)
    if broken:
        scales = scales * (1 + 2.0**-22)
    return codes, scales.T if output_scale_transpose else scales


def by_op(formula):
    def per_token_quant_padding(x, block_size, use_ue8m0):
        calls.append(list(x.shape))
        return paddle_fp8.quantise(x, formula, True, 1.0)

    return per_token_quant_padding


def bring_up(folder):
    os.environ["FD_FUSION_CONFIG"] = '{"max_token_num": 8, "timeout_s": 20, "backend": "triton"}'
    return worker_of(fd_config_of(folder, size, rank, tp_group=dist.get_group(0)), rank)


def outputs(worker, rows):
    calls.clear()
    found = hidden_states(worker, rows).astype("float32").numpy()
    return found, len(calls)


def check_carried(carry, given, norm, codes, scales, form, site):
    """What a norm carries is what the host would make of it."""
    want = paddle_fp8.quantise(norm, form.formula, form.by_column, 1.0)
    assert (bytes_of(codes) == bytes_of(want[0])).all() and (scales.numpy() == want[1].numpy()).all()
    given.append(form.formula)
    carry(norm, codes, scales, form, site)


def counted(report, before=None):
    """What the Sites counted, since `before`."""
    return sum((line.site.fp8_calls for line in report.sites), Counter()) - (before or Counter())


def compare(folder, formula, carried):
    """`carried`: the norms of a forward that carry their codes: two in each layer, but the first and the last."""
    before = {name: vars(module).get(name) for module, name in ((phi, "fp8_quant_blockwise"), (gpu, "per_token_quant"))}
    bound, given, carry = bring_up(folder), [], fp8.carry
    model = bound.model_runner.model
    (report,) = [one for one in fd_fusion.report() if one.sites]
    assert report.proven and len(report.sites) == 4, report.lines()
    forms = [fp8.Fp8(formula, by_column=True)] * 3 + [None]
    assert [line.fp8 for line in report.sites] == forms and not any(line.quantised_apart for line in report.sites)
    assert f"3 norms in FP8, taken by {carried} layers" in report.lines()[0], report.lines()
    fp8.carry = lambda *args: None
    quantised_apart, count = outputs(bound, FEW)
    fp8.carry = functools.partial(check_carried, carry, given)
    before_it = counted(report)
    in_kernel, fewer = outputs(bound, FEW)
    assert np.array_equal(in_kernel, quantised_apart) and np.isfinite(in_kernel).all()
    assert given == [formula] * carried and fewer == count - carried, (given, count, fewer)
    fp8.carry = carry
    assert counted(report, before_it) == {"made": carried, "taken": carried}
    assert outputs(bound, MANY)[1] == count, "above the limit the host quantises all"
    assert counted(report, before_it) == {"made": carried, "taken": carried}
    fd_fusion.unbind(model)
    assert outputs(bound, FEW)[1] == count, "and so it does when nothing is bound"
    after = {name: vars(module).get(name) for module, name in ((phi, "fp8_quant_blockwise"), (gpu, "per_token_quant"))}
    assert after == before


def refused(folder):
    """A quantiser whose bits are not known: the layers quantise, and the report says why."""
    global broken
    broken = True
    bound = bring_up(folder)
    (report,) = [one for one in fd_fusion.report() if one.sites]
    assert report.proven and len(report.sites) == 4, report.lines()
    (line,) = [line for line in report.lines() if "quantised behind the kernel" in line]
    assert line.startswith("fd_fusion: 3 norms") and "multiply" in line, line
    _, count = outputs(bound, FEW)
    fd_fusion.unbind(bound.model_runner.model)
    assert outputs(bound, FEW)[1] == count
    broken = False


@contextlib.contextmanager
def each_linear_first(change):
    """A host whose linears change what they get before they quantise it, in place or not."""
    stock = BlockWiseFP8LinearMethod.apply
    BlockWiseFP8LinearMethod.apply = lambda self, layer, x: stock(self, layer, change(x))
    yield
    BlockWiseFP8LinearMethod.apply = stock


def not_the_very_tensor(folder):
    """A host that copies what it reads quantises by itself, and the report says so."""
    with each_linear_first(lambda x: x.clone()):
        bound = bring_up(folder)
        (report,) = [one for one in fd_fusion.report() if one.sites]
        assert report.proven and [line.site.takers for line in report.sites] == [0, 0, 0, None]
        (line,) = [line for line in report.lines() if "quantised behind the kernel" in line]
        assert line == "fd_fusion: 3 norms quantised behind the kernel: no layer took the FP8 of its norm in the proving pass", line
        assert "FP8" not in report.lines()[0]
        got, count = outputs(bound, FEW)
        fd_fusion.unbind(bound.model_runner.model)
        assert outputs(bound, FEW)[1] == count and np.isfinite(got).all()
        assert not any(line.site.fp8_calls for line in report.sites)


def double(x):
    x.copy_(x * 2, False)
    return x


def changed_in_place(folder):
    """A host that changes the norm by an op that counts no version: the outputs of the proving pass show it."""
    with each_linear_first(double):
        try:
            bring_up(folder)
        except fd_fusion.BindError as error:
            assert error.reason.root.code == "outputs_differ", error
        else:
            raise AssertionError("nothing was refused")


def traced(folder):
    """The host's static graph, by SOT: one whole graph, in which the host's op quantises."""
    phi.fp8_quant_blockwise = by_opaque_op
    bound = bring_up(folder)
    (report,) = [one for one in fd_fusion.report() if one.sites]
    assert report.proven and "3 norms in FP8, taken by 3 layers" in report.lines()[0], report.lines()
    inner, ids = bound.model_runner.model.model, paddle.to_tensor(FEW)
    want, made = inner(ids, ForwardMeta(ids)), [line.site.fp8_calls["made"] for line in report.sites]
    code = type(inner).forward
    got = sot.symbolic_translate(code, training=False)(inner, ids, ForwardMeta(ids))
    ((found, _), *_), _ = sot.opcode_translator.executor.executor_cache.OpcodeExecutorCache().cache[code.__code__]
    assert not [name for name in found[0].co_names if name.startswith("$")], "the graph is broken"
    assert (got == want).all() and [line.site.fp8_calls["made"] for line in report.sites] == made
    fd_fusion.unbind(bound.model_runner.model)
    phi.fp8_quant_blockwise = by_phi


def by_opaque_op(x, using_pow2_scale=True, output_scale_transpose=True, using_ue8m0_scale=False):
    codes, scales = finish_op._quantise(x, "multiply", 1.0)
    return codes, scales.T


own, phi.fp8_quant_blockwise = phi.fp8_quant_blockwise, by_phi
with tempfile.TemporaryDirectory() as scratch:
    config = {**SIZES, "dtype": "bfloat16", "attention_bias": False, "quantization": "block_wise_fp8"}
    folder = write_checkpoint(f"{scratch}/dense", "Qwen2ForCausalLM", **config)
    compare(folder, "multiply", 3)
    os.environ["FD_FP8_QUANT_WITH_POW2SCALE"] = "1"
    compare(folder, "multiply_pow2", 3)
    os.environ["FD_USE_PHI_FP8_QUANT"] = "0"
    gpu.per_token_quant_padding = by_op("divide_7")
    compare(folder, "divide_7", 3)
    os.environ.update(FD_USE_PHI_FP8_QUANT="1", FD_FP8_QUANT_WITH_POW2SCALE="0")
    refused(folder)
    not_the_very_tensor(folder)
    changed_in_place(folder)
    traced(folder)
phi.fp8_quant_blockwise = own
end(done=True)
