"""What a norm carries to FastDeploy's quantisers, and the layers that call these, read from their source.

FASTDEPLOY_SRC=/path/to/FastDeploy python -m pytest tests/hosts/fastdeploy/test_fp8.py -rA
"""

import ast
import copy
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.jit import sot

from fd_fusion.frameworks import paddle_fp8
from fd_fusion.frameworks.tensors import bytes_of
from fd_fusion.hosts.fastdeploy import fp8
from fd_fusion.layers import finish_op
from fd_fusion.reasons import Reason
from fd_fusion.spec import Fp8

phi = paddle.incubate.nn.functional
needs_source = pytest.mark.skipif("FASTDEPLOY_SRC" not in os.environ, reason="FASTDEPLOY_SRC names no source tree")


class Host:
    """The host's quantisers by formula, which count their calls, and its environment."""

    def __init__(self):
        self.calls, self.divisor = [], "divide"
        self.envs = SimpleNamespace(FD_USE_PHI_FP8_QUANT=True, FD_FP8_QUANT_WITH_POW2SCALE=False)

    def fp8_quant_blockwise(self, x, using_pow2_scale=True, output_scale_transpose=True, **others):
        self.calls.append("fp8_quant_blockwise")
        formula = "multiply_pow2" if using_pow2_scale else "multiply"
        codes, scales = paddle_fp8.quantise(x, formula, output_scale_transpose, 1.0)
        return codes, scales.T if output_scale_transpose else scales

    def per_token_quant(self, x, *args):
        self.calls.append("per_token_quant")
        return paddle_fp8.quantise(x, self.divisor, False, 1.0)

    def per_token_quant_padding(self, x, block_size, use_ue8m0):
        self.calls.append("per_token_quant_padding")
        return paddle_fp8.quantise(x, self.divisor, True, 1.0)


@pytest.fixture
def host(monkeypatch):
    found, gpu = Host(), types.ModuleType("gpu")
    gpu.per_token_quant, gpu.per_token_quant_padding = found.per_token_quant, found.per_token_quant_padding
    package = types.ModuleType("fastdeploy")
    package.envs = found.envs
    package.model_executor = SimpleNamespace(ops=SimpleNamespace(gpu=gpu))
    monkeypatch.setitem(sys.modules, "fastdeploy", package)
    for name in ("model_executor", "model_executor.ops"):
        monkeypatch.setitem(sys.modules, f"fastdeploy.{name}", types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fastdeploy.model_executor.ops.gpu", gpu)
    monkeypatch.setattr(phi, "fp8_quant_blockwise", found.fp8_quant_blockwise)
    found.gpu, found.package = gpu, package
    yield found
    while fp8._users:  # of a test that failed
        fp8._leave()


def reader(*kinds, config=None):
    """A layer of the host with layers in it that have these quant methods."""
    config = config or SimpleNamespace(weight_block_size=[128, 128], deepgemm_scale_ue8m0=False)
    parts = []
    for kind in kinds:
        part = paddle.nn.Layer()
        part.quant_method = type(kind, (), {"quant_config": config})()
        parts.append(part)
    return paddle.nn.LayerList(parts)


ASKED = {"using_pow2_scale": False, "output_scale_transpose": True}
LINEAR, TRITON, DEEP_GEMM = "BlockWiseFP8LinearMethod", "BlockWiseFP8MoEMethod", "DeepGemmFusedMoeMethod"


@pytest.mark.parametrize(
    "kinds, want",
    [
        ((LINEAR,), Fp8("multiply", by_column=True)),
        ((TRITON, "UnquantizedLinearMethod"), Fp8("multiply")),
        ((LINEAR, TRITON), Fp8("multiply", by_column=True)),
        ((DEEP_GEMM, LINEAR), Fp8("multiply", by_column=True)),
        ((DEEP_GEMM,), Fp8("multiply")),
        (("UnquantizedLinearMethod", "WINT8LinearMethod"), None),
    ],
)
def test_what_the_layers_behind_a_norm_ask_for(host, kinds, want):
    assert fp8.form_for(reader(*kinds), 256, "bfloat16") == want
    assert fp8.form_for(None, 256, "bfloat16") is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_formula_is_the_one_of_the_host_s_quantiser(host, dtype):
    assert fp8.formula_of(True, dtype) == "multiply" and set(host.calls) == {"fp8_quant_blockwise"}
    host.envs.FD_FP8_QUANT_WITH_POW2SCALE = True
    assert fp8.formula_of(False, dtype) == "multiply_pow2"
    host.envs.FD_USE_PHI_FP8_QUANT = False
    assert fp8.formula_of(True, dtype) == "divide" and host.calls[-1] == "per_token_quant_padding"
    host.divisor = "divide_7"
    assert fp8.formula_of(False, dtype) == "divide_7" and host.calls[-1] == "per_token_quant"


@pytest.mark.parametrize("bug", ["a scale", "a code", "raises", "is gone"])
def test_a_quantiser_of_other_bits_is_named(host, bug, monkeypatch):
    def wrong(x, **others):
        codes, scales = host.fp8_quant_blockwise(x, **others)
        if bug == "raises":
            raise RuntimeError("no such kernel")
        if bug == "a scale":
            scales[0, 0] = scales[0, 0] * (1 + 2.0**-23)
        bits = bytes_of(codes).copy()
        bits[5, 7] ^= bug == "a code"
        return paddle.to_tensor(bits).view("float8_e4m3fn"), scales

    monkeypatch.setattr(phi, "fp8_quant_blockwise", wrong)
    if bug == "is gone":
        monkeypatch.delattr(phi, "fp8_quant_blockwise")
    found = fp8.form_for(reader(LINEAR), 256, "bfloat16")
    assert isinstance(found, Reason) and found.code == "fp8_differs", found


@pytest.mark.parametrize("whole_blocks", [True, False])
def test_each_of_the_host_s_two_kernels_is_compared(host, whole_blocks, monkeypatch):
    """Paddle's op runs another kernel where T is a multiple of 128, as in a prefill or a captured batch."""

    def wrong(x, **others):
        codes, scales = host.fp8_quant_blockwise(x, **others)
        return codes, scales * (1 + 2.0**-22) if (x.shape[0] % 128 == 0) is whole_blocks else scales

    monkeypatch.setattr(phi, "fp8_quant_blockwise", wrong)
    found = fp8.formula_of(True, "bfloat16")
    assert isinstance(found, Reason) and found.code == "fp8_differs", found


@pytest.mark.parametrize("changes", [{"deepgemm_scale_ue8m0": True}, {"weight_block_size": [-1, -1]}])
def test_what_the_kernel_does_not_give_is_said(host, changes):
    config = SimpleNamespace(**{"weight_block_size": [128, 128], "deepgemm_scale_ue8m0": False, **changes})
    assert fp8.form_for(reader(LINEAR, config=config), 256, "bfloat16").code == "no_fp8"
    assert fp8.form_for(reader(LINEAR), 320, "bfloat16").code == "no_fp8"
    assert fp8.form_for(reader(LINEAR), 256, "float32").code == "no_fp8" and not host.calls


def test_a_layer_with_a_graph_of_its_own_quantises(host):
    """Its replay would read the codes of the forward in which it was captured."""
    host.envs.FD_USE_BLOCK_WISE_CUDA_GRAPH = True
    found = fp8.form_for(reader(LINEAR), 256, "bfloat16")
    assert found.code == "no_fp8" and "FD_USE_BLOCK_WISE_CUDA_GRAPH" in str(found) and not host.calls


class Taken:
    """The Site of a norm, which counts who takes its FP8."""

    def __init__(self):
        self.count = 0

    def count_taken(self):
        self.count += 1


def carrying(by_column=True, formula="multiply", rows=3, site=None):
    """A norm that carries codes and scales, of which no quantiser would make the same."""
    norm = paddle.to_tensor(np.linspace(-3, 3, rows * 256, dtype="float32").reshape(rows, 256)).astype("bfloat16")
    codes, scales = paddle_fp8.quantise(norm * 2, formula, by_column, 1.0)
    fp8.carry(norm, codes, scales, Fp8(formula, by_column=by_column), site or Taken())
    return norm, codes, scales


def test_the_very_tensor_is_not_quantised_again(host):
    stock, site = (phi.fp8_quant_blockwise, host.gpu.per_token_quant_padding), Taken()
    norm, codes, scales = carrying(site=site)
    undo, second = fp8.install(), fp8.install()
    got = phi.fp8_quant_blockwise(norm, using_pow2_scale=False, output_scale_transpose=True, using_ue8m0_scale=False)
    assert got[0] is codes and (got[1] == scales.T).all() and got[1].shape == [2, 3]
    rows = phi.fp8_quant_blockwise(norm, using_pow2_scale=False, output_scale_transpose=False)
    assert rows[0] is codes and (rows[1] == scales).all()
    for same in (norm.astype("bfloat16"), norm.contiguous(), norm.reshape([3, 256]), paddle.nn.Identity()(norm)):
        assert phi.fp8_quant_blockwise(same, **ASKED)[0] is codes, "Paddle gives the very tensor back"
    assert not host.calls and site.count == 6
    undo()
    undo()  # once is enough
    assert phi.fp8_quant_blockwise(norm, **ASKED)[0] is codes
    second()
    assert (phi.fp8_quant_blockwise, host.gpu.per_token_quant_padding) == stock
    assert phi.fp8_quant_blockwise(norm, **ASKED)[0] is not codes


@pytest.mark.parametrize("is_phi", [True, False])
def test_scales_by_rows_have_the_strides_of_the_stock_ones(host, is_phi):
    """The experts' kernel takes these as constants: each other stride, one for every 4 rows, compiled it anew."""

    def by_rows(x):
        how = {"using_pow2_scale": False, "output_scale_transpose": False}
        return (phi.fp8_quant_blockwise(x, **how) if is_phi else host.gpu.per_token_quant(x, 128, False))[1]

    for rows in (1, 2, 4, 5, 9):
        norm, _, scales = carrying(formula="multiply" if is_phi else "divide", rows=rows)
        stock, undo = by_rows(norm), fp8.install()
        got = by_rows(norm)
        undo()
        assert (got == scales).all() and (got.shape, got.strides) == (stock.shape, stock.strides), rows


def changed(how):
    """A norm that was changed in place behind the kernel: `how` gets it."""
    norm = carrying()[0]
    how(norm)
    return norm


def set_memory(norm):
    norm.data = norm * 2


@pytest.mark.parametrize(
    "x",
    [
        lambda: carrying()[0].clone(),
        lambda: carrying()[0][:2],
        lambda: carrying()[0][:],
        lambda: carrying()[0].detach(),
        lambda: copy.deepcopy(carrying()[0]),
        lambda: carrying()[0].cast("bfloat16"),
        lambda: changed(lambda norm: norm.scale_(2.0)),
        lambda: changed(lambda norm: norm[:2].scale_(2.0)),
        lambda: changed(lambda norm: norm.reshape([-1]).scale_(2.0)),
        lambda: changed(lambda norm: norm.__setitem__(0, 1.0)),
        lambda: changed(lambda norm: paddle.assign(norm * 2, output=norm)),
        lambda: changed(lambda norm: norm.reshape_([6, 128])),
        lambda: changed(set_memory),
    ],
)
def test_another_tensor_or_a_changed_one_is_quantised_as_ever(host, x):
    undo, x = fp8.install(), x()
    got = phi.fp8_quant_blockwise(x, **ASKED)
    want = paddle_fp8.quantise(x, "multiply", True, 1.0)
    undo()
    assert host.calls == ["fp8_quant_blockwise"]
    assert (bytes_of(got[0]) == bytes_of(want[0])).all() and (want[1] == got[1].T).all()


@pytest.mark.parametrize(
    "asked",
    [
        {"using_pow2_scale": True},
        {"using_ue8m0_scale": True},
        {"output_type": "e5m2"},
        {"quant_method": "128x128"},
        {"input_transpose": True},
        {"epsilon": 1e-3},
        {"an_argument_of_a_newer_paddle": 1},
    ],
)
def test_another_form_is_quantised_as_ever(host, asked):
    undo, (norm, codes, _) = fp8.install(), carrying()
    assert phi.fp8_quant_blockwise(norm, **{**ASKED, **asked})[0] is not codes and len(host.calls) == 1
    undo()


def test_what_a_norm_does_not_carry_is_quantised_as_ever(host):
    undo = fp8.install()
    norm, codes, _ = carrying()
    others = [
        (norm, {"using_pow2_scale": False}),  # the rest is left to Paddle's defaults
        (norm, {"output_scale_transpose": True}),
        (carrying(by_column=False)[0], ASKED),
        (carrying(formula="divide")[0], ASKED),
    ]
    for number, (x, how) in enumerate(others):
        assert phi.fp8_quant_blockwise(x, **how)[0] is not codes
        assert len(host.calls) == number + 1, how
    host.gpu.per_token_quant_padding(norm, 128, False)
    assert host.calls[-1] == "per_token_quant_padding", "another formula, as when the environment was changed"
    undo()


def test_a_norm_that_was_freed_leaves_nothing_behind(host):
    """Nothing goes by an address or an id, which the next tensor may have."""
    undo = fp8.install()
    for _ in range(50):
        carrying()
        fresh = paddle.to_tensor(np.ones((3, 256), "float32")).astype("bfloat16")
        codes, _ = phi.fp8_quant_blockwise(fresh, **ASKED)
        assert (codes.astype("float32") == 448).all()
    undo()
    assert len(host.calls) == 50


def test_each_thread_gets_what_its_own_norm_carries(host):
    undo = fp8.install()

    def run(_):
        norm, codes, _ = carrying()
        return all(phi.fp8_quant_blockwise(norm, **ASKED)[0] is codes for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(8))) and not host.calls
    undo()


@pytest.mark.parametrize("full_graph", [True, False], ids=["ast", "sot"])
def test_a_traced_graph_quantises(host, monkeypatch, full_graph):
    """By the host's op, in one whole graph: what a tensor carries is not looked for."""

    def stock(x, using_pow2_scale=True, output_scale_transpose=True, using_ue8m0_scale=False):
        return finish_op._quantise(x, "multiply", 1.0)

    monkeypatch.setattr(phi, "fp8_quant_blockwise", stock)
    undo, (norm, *_) = fp8.install(), carrying()

    def forward(x):
        codes, scales = paddle.incubate.nn.functional.fp8_quant_blockwise(
            x, using_pow2_scale=False, output_scale_transpose=True
        )
        for _ in range(10):  # SOT leaves smaller graphs alone
            scales = scales * 1.0
        return codes.astype("float32"), scales

    if full_graph:
        got = paddle.jit.to_static(forward, full_graph=True)(norm)
    else:
        got = sot.symbolic_translate(forward, training=False)(norm)
        made = sot.opcode_translator.executor.executor_cache.OpcodeExecutorCache().cache[forward.__code__]
        ((code, _), *_), _ = made
        assert not [name for name in code[0].co_names if name.startswith("$")], "the graph is broken"
    want = paddle_fp8.quantise(norm, "multiply", True, 1.0)
    undo()
    assert (got[0] == want[0].astype("float32")).all() and (got[1] == want[1]).all()


def test_the_ops_of_the_host(host):
    undo = fp8.install()
    norm, codes, scales = carrying(formula="divide_7")
    assert host.gpu.per_token_quant_padding(norm, 128, False) == (codes, scales)
    rows = host.gpu.per_token_quant(norm, 128, False)
    assert rows[0] is codes and (rows[1] == scales).all() and not host.calls
    for how in ((64, False), (128, True), (128,), (128, False, 1)):
        assert host.gpu.per_token_quant(norm, *how)[0] is not codes
    undo()


def class_of(name, *folders):
    """(the file, the class) of that name in the source tree."""
    source = Path(os.environ["FASTDEPLOY_SRC"]) / "fastdeploy/model_executor/layers"
    for file in (file for folder in folders for file in sorted((source / folder).rglob("*.py"))):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == name and "backends" not in file.parts:
                return file, node
    raise AssertionError(f"{name} is not in the source tree")


@needs_source
@pytest.mark.parametrize("is_phi", [True, False])
def test_the_linear_of_the_source_takes_what_the_norm_carries(host, is_phi):
    """Its own `apply`: the product gets codes and scales of the shapes and strides that it gets of the quantiser."""
    file, node = class_of(LINEAR, "quantization")
    (apply,) = [part for part in node.body if getattr(part, "name", None) == "apply"]
    given = []
    names = {
        "paddle": paddle,
        "fastdeploy": host.package,
        "get_sm_version": lambda: 90,
        "deep_gemm_fp8_gemm_nt": lambda x, scales, *rest, **more: given.append((x, scales)),
        "current_platform": SimpleNamespace(is_cuda=lambda: True),
    }
    exec(compile(ast.Module([apply], []), file, "exec"), names)
    host.envs.FD_USE_PHI_FP8_QUANT = is_phi
    config = SimpleNamespace(weight_block_size=[128, 128], deepgemm_scale_ue8m0=False)
    layer = SimpleNamespace(output_size=8, weight=None, weight_scale_inv=None, with_bias=False)
    norm, codes, scales = carrying(formula="multiply" if is_phi else "divide", rows=5)
    names["apply"](SimpleNamespace(quant_config=config), layer, norm)
    undo = fp8.install()
    names["apply"](SimpleNamespace(quant_config=config), layer, norm)
    undo()
    assert len(host.calls) == 1, "before, and not again"
    (stock_codes, stock_scales), (got_codes, got_scales) = given
    assert got_codes is codes and (got_scales == scales).all()
    assert bytes_of(stock_codes).shape == bytes_of(got_codes).shape
    assert (stock_scales.shape, stock_scales.strides) == (got_scales.shape, got_scales.strides)


@needs_source
def test_the_experts_of_the_source(host):
    """Their classes; each quantiser is called by its whole name."""
    for name in (TRITON, DEEP_GEMM):
        file, _ = class_of(name, "moe")
        text = file.read_text()
        assert "paddle.incubate.nn.functional.fp8_quant_blockwise(" in text
        assert "fastdeploy.model_executor.ops.gpu.per_token_quant(" in text
    text = class_of(TRITON, "moe")[0].read_text()
    assert "import fp8_quant_blockwise" not in text and "import per_token_quant" not in text
