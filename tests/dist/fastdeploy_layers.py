"""Biases, dtypes, call forms, cleared and reloaded parameters, a traced model: bound as stock."""

import copy
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "host")]

import os

import numpy as np
import paddle
import paddle.distributed as dist
from hosting import fd_config_of, hidden_states, worker_of, write_checkpoint
from support.rank import record, start

rank, size = start()
import fd_fusion
from fd_fusion.hosts.fastdeploy.plugin import register

register()
from fastdeploy.distributed import communication
from fastdeploy.model_executor.forward_meta import ForwardMeta
from fastdeploy.model_executor.layers import normalization
from fastdeploy.model_executor.model_loader.base_loader import BaseModelLoader
from fastdeploy.model_executor.models import decoder
from fastdeploy.model_executor.models.model_base import ModelRegistry
from fastdeploy.worker.gpu_model_runner import GPUModelRunner
from paddle.jit import sot

UPSTREAM = "enable_all_reduce_fusion"
FEW, MANY = [1, 2, 3], [i % 60 for i in range(40)]


def bring_up(folder, asked, do_profile=True, strict="false", **arguments):
    os.environ.pop("FD_FUSION_CONFIG", None)
    if asked:
        os.environ["FD_FUSION_CONFIG"] = f'{{"max_token_num": 32, "timeout_s": 20, "strict": {strict}}}'
    fd_config = fd_config_of(folder, size, rank, tp_group=dist.get_group(0), **arguments)
    return worker_of(fd_config, rank, do_profile)


def numbers(worker, rows):
    return hidden_states(worker, rows).astype("float32").numpy()


def pair(folder, roundings, do_profile=True, **arguments):
    """(bound worker, its report), once its outputs are those of the stock model."""
    stock = bring_up(folder, asked=False, **arguments)
    bound = bring_up(folder, asked=True, do_profile=do_profile, **arguments)
    (report,) = [r for r in fd_fusion.report() if r.model == type(bound.model_runner.model).__name__]
    error = np.linalg.norm(numbers(bound, FEW) - numbers(stock, FEW)) / np.linalg.norm(numbers(stock, FEW))
    assert error <= roundings, f"{folder}: {error:.1e}"
    assert np.array_equal(numbers(bound, MANY), numbers(stock, MANY)), folder
    return bound, report


def biases(scratch):
    """Divided by the number of ranks when loaded, so that the partial sums hold them once. Reduced out of place."""
    communication.out_of_place = True
    folder = write_checkpoint(f"{scratch}/bias", "Qwen2ForCausalLM", o_proj_bias=True, mlp_bias=True)
    bound, report = pair(folder, 2e-5)
    assert report.proven and len(report.sites) == 6
    fd_fusion.unbind(bound.model_runner.model)
    communication.out_of_place = False


def half_precision(scratch):
    """A float32 norm weight beside bfloat16: fused where the residual stays bfloat16, stock where it does not."""
    config = {"dtype": "bfloat16", "attention_bias": False}
    folder = write_checkpoint(f"{scratch}/post", "Qwen2ForCausalLM", post_norm_dtype="float32", **config)
    bound, report = pair(folder, 4 * 2.0**-8)
    assert report.proven and len(report.sites) == 6, report.lines()
    norm = bound.model_runner.model.model.layers[0].post_attention_layernorm
    assert norm.weight.dtype == paddle.float32
    fd_fusion.unbind(bound.model_runner.model)
    folder = write_checkpoint(f"{scratch}/all", "Qwen2ForCausalLM", norm_dtype="float32", **config)
    bound, report = pair(folder, 0.0)
    assert not report.sites and {r.reason.code for r in report.rejected} == {"wide_residual"}
    fd_fusion.unbind(bound.model_runner.model)


def call_forms(scratch):
    """Positional and keyword residual, with and without forward_meta, and another norm for one call."""
    folder = write_checkpoint(f"{scratch}/forms", "Qwen2ForCausalLM")
    bound, report = pair(folder, 2e-5, do_profile=False)  # the host skipped its profile run
    assert report.proven
    layer = bound.model_runner.model.model.layers[0]
    linear, norm = layer.self_attn.o_proj, layer.post_attention_layernorm
    paddle.seed(3 + rank)
    x = paddle.randn([3, linear.weight.shape[0]])
    paddle.seed(9)
    residual = paddle.randn([3, linear.weight.shape[1]])
    meta = ForwardMeta(paddle.to_tensor([1]))
    results = [norm(linear(x), residual), norm(linear(x), residual, forward_meta=meta)]
    results.append(norm(linear(x), residual_input=residual, forward_meta=meta))
    assert all(len(r) == 2 for r in results)
    for out, total in results[1:]:
        assert np.array_equal(out.numpy(), results[0][0].numpy())
        assert np.array_equal(total.numpy(), results[0][1].numpy())
    seen = []

    def proxy(value, weight, eps):
        seen.append(value.numpy())
        return value * 2

    out, total = norm(linear(x), residual, proxy_rmsnorm=proxy)
    assert len(seen) == 1, "the host's proxy runs, on the reduced sum"
    assert np.allclose(total.numpy(), results[0][1].numpy(), atol=1e-5)
    assert np.allclose(out.numpy(), 2 * total.numpy())
    assert numbers(bound, []).shape[0] == 0, "no rows"
    fd_fusion.unbind(bound.model_runner.model)


def experts_apart(scratch):
    """Expert parallel: what is still split over the group is fused; the experts are left out by a rule."""
    folder = write_checkpoint(f"{scratch}/experts", "Qwen3MoeForCausalLM")
    bound, report = pair(folder, 2e-5, expert_parallel_size=size, strict="true")
    assert report.proven and len(report.sites) == 4, report.lines()
    assert [one.reason.code for one in report.rejected] == ["expert_parallel"] * 2
    fd_fusion.unbind(bound.model_runner.model)


def draft(scratch):
    """A draft model runs the last norm of the bound model on sums of its own: that norm stays stock."""

    class DraftLoader(BaseModelLoader):
        def download_model(self, model_config):
            pass

        def load_model(self, fd_config):
            model = ModelRegistry.get_class("Ernie4_5_MTPForCausalLM")(fd_config)
            random = np.random.default_rng(10 + rank)
            for param in model.model.mtp_block.parameters():
                param.set_value(random.standard_normal(param.shape).astype("float32"))
            return model

    def load_both(runner):
        stock(runner)
        fd_config = copy.copy(runner.fd_config)
        fd_config.speculative_config = copy.copy(fd_config.speculative_config)
        vars(fd_config.speculative_config).update(model_type="mtp", sharing_model=runner.model)
        runner.draft = DraftLoader(None).load_model(fd_config)

    def drafted(worker):
        hidden = hidden_states(worker, FEW)
        return worker.model_runner.draft(hidden, ForwardMeta(paddle.to_tensor(FEW))).numpy()

    stock, GPUModelRunner.load_model = GPUModelRunner.load_model, load_both
    folder = write_checkpoint(f"{scratch}/draft", "Ernie4_5_MoeForCausalLM", num_hidden_layers=2)
    for do_profile in (True, False):
        wanted = drafted(bring_up(folder, asked=False))
        bound = bring_up(folder, asked=True, do_profile=do_profile, strict="true")
        off, report = sorted(fd_fusion.report(), key=lambda one: len(one.sites))
        assert off.off.code == "draft_model" and report.proven and len(report.sites) == 3, report.lines()
        assert [one.reason.code for one in report.rejected] == ["shared_with_draft"]
        assert np.allclose(drafted(bound), wanted, atol=1e-4)
        fd_fusion.unbind(bound.model_runner.model)
        del bound, off, report
    GPUModelRunner.load_model = stock


def cleared_and_reloaded(scratch):
    """No weight is kept: after the parameters were cleared and loaded anew the numbers are those of the new ones."""
    folder = write_checkpoint(f"{scratch}/a", "Glm4MoeForCausalLM")
    other = write_checkpoint(f"{scratch}/b", "Glm4MoeForCausalLM", seed=8)
    bound, _ = pair(folder, 2e-5)
    stock = bring_up(other, asked=False)
    checkpoint = {name: param.numpy() for name, param in stock.model_runner.model.named_parameters()}
    bound.model_runner.clear_parameters()
    bound.model_runner.update_parameters(checkpoint)
    assert np.allclose(numbers(bound, FEW), numbers(stock, FEW), atol=1e-5)
    assert np.array_equal(numbers(bound, MANY), numbers(stock, MANY))
    (report,) = fd_fusion.report()
    assert all(line.calls["fused"] for line in report.sites)
    fd_fusion.unbind(bound.model_runner.model)


def traced(scratch):
    """The inner model as a static graph, by AST and by SOT: `finish` is one op in it, and decides when it runs."""
    folder = write_checkpoint(f"{scratch}/traced", "Glm4MoeForCausalLM", num_hidden_layers=1, first_k_dense_replace=0)
    bound, report = pair(folder, 2e-5, graph_optimization_config={"graph_opt_level": 1})
    inner = bound.model_runner.model.model
    ids, many = paddle.to_tensor(FEW), paddle.to_tensor(MANY)
    wanted = [inner(ids, ForwardMeta(ids)).numpy(), inner(many, ForwardMeta(many)).numpy()]

    def forward(rows):
        return inner(rows, None)

    # As the host does it: one graph, and a broken one is an error there.
    code = type(inner).forward
    sot.symbolic_translate(code, training=False)(inner, ids, ForwardMeta(ids))
    ((found, _), *_), _ = sot.opcode_translator.executor.executor_cache.OpcodeExecutorCache().cache[code.__code__]
    assert not [name for name in found[0].co_names if name.startswith("$")], "the graph is broken"
    for full_graph in (True, False):
        run = paddle.jit.to_static(forward, full_graph=full_graph)
        calls = [line.calls["fused"] for line in report.sites]
        got = [run(ids).numpy(), run(many).numpy()]
        assert all(np.allclose(g, w, atol=1e-5) for g, w in zip(got, wanted)), f"{full_graph=}"
        assert all(line.calls["fused"] > before for line, before in zip(report.sites, calls)), f"{full_graph=}"
    # A host that breaks the graph between a linear and its norm: one end is traced, the other runs in Python.
    stock = decoder.Attention.forward

    def breaking(self, forward_meta, hidden_states):
        out = stock(self, forward_meta, hidden_states)
        paddle.jit.sot.psdb.breakgraph()
        return out

    decoder.Attention.forward = breaking
    got = paddle.jit.to_static(forward, full_graph=False)(ids).numpy()
    decoder.Attention.forward = stock
    assert np.allclose(got, wanted[0], atol=1e-5)
    fd_fusion.unbind(bound.model_runner.model)


def upstream_flag(scratch):
    """Upstream's own fusion is off on both ends of every site while it is bound, and back afterwards."""
    folder = write_checkpoint(f"{scratch}/upstream", "Glm4MoeForCausalLM")
    flag = {"enable_flashinfer_allreduce_fusion": True}
    stock = bring_up(folder, asked=False)
    os.environ["FD_FUSION_DISABLE"] = "1"
    upstream = bring_up(folder, asked=False, **flag)
    before = len(normalization.upstream_fused)
    wanted = numbers(upstream, FEW)
    assert len(normalization.upstream_fused) == before + 5, "three attentions, a dense layer, a block of experts"
    assert np.allclose(wanted, numbers(stock, FEW), atol=1e-5)
    del os.environ["FD_FUSION_DISABLE"]
    bound = bring_up(folder, asked=False, **flag)  # the flag alone asks for the defaults
    off, report = fd_fusion.report()
    assert off.off.code == "kill_switch" and off.source == "FD_FUSION_DISABLE", "what is off is in the report too"
    assert report.proven and len(report.sites) == 6 and report.source == "--enable-flashinfer-allreduce-fusion"
    before = len(normalization.upstream_fused)
    assert np.allclose(numbers(bound, FEW), wanted, atol=1e-5)
    assert len(normalization.upstream_fused) == before
    fd_fusion.unbind(bound.model_runner.model)
    assert np.array_equal(numbers(bound, FEW), wanted) and len(normalization.upstream_fused) == before + 5


def upstream_flag_without_upstream(scratch):
    """The flag where upstream's fusion cannot run, FlashInfer missing, or reduces twice, in a decoder without it."""
    normalization.flashinfer_is_there = False
    for architecture in ("Glm4MoeForCausalLM", "Qwen2ForCausalLM"):
        folder = write_checkpoint(f"{scratch}/without_{architecture}", architecture)
        stock = bring_up(folder, asked=False)
        bound = bring_up(folder, False, do_profile=False, enable_flashinfer_allreduce_fusion=True)
        (report,) = fd_fusion.report()
        assert report.proven and len(report.sites) == 6, report.lines()
        assert np.allclose(numbers(bound, FEW), numbers(stock, FEW), atol=1e-5), architecture
        fd_fusion.unbind(bound.model_runner.model)
        layers = bound.model_runner.model.sublayers()
        assert any(vars(part).get(UPSTREAM) for part in layers), "unbind gives upstream's fusion back"
    normalization.flashinfer_is_there = True


def deterministic(scratch):
    """In the host's batch-invariant mode a backend that is not leaves every pair stock, for any number of rows."""
    folder = write_checkpoint(f"{scratch}/deterministic", "Qwen2ForCausalLM", num_hidden_layers=1)
    os.environ["FD_DETERMINISTIC_MODE"] = "1"
    bound, report = pair(folder, 0.0)
    del os.environ["FD_DETERMINISTIC_MODE"]
    assert not report.sites and "not batch invariant" in str(report.rejected[0].reason)
    fd_fusion.unbind(bound.model_runner.model)


def named_backend(scratch):
    """What cannot be had is an error for a named backend, on all ranks, and nothing is bound."""
    folder = write_checkpoint(f"{scratch}/named", "Qwen2ForCausalLM", num_hidden_layers=1)
    os.environ["FD_FUSION_CONFIG"] = '{"backend": "flashinfer", "timeout_s": 20}'
    fd_config = fd_config_of(folder, size, rank, tp_group=dist.get_group(0))
    try:
        worker_of(fd_config, rank)
        raise AssertionError("flashinfer ran on a CPU")
    except fd_fusion.BindError as error:
        said = str(error)
    assert said and not any(report.sites for report in fd_fusion.report()), said


def order(scratch):
    """Proven before the cache blocks are counted; where the host does not profile, before graphs are captured."""
    folder = write_checkpoint(f"{scratch}/order", "Qwen2ForCausalLM", num_hidden_layers=1)
    seen = []

    def watched(owner, name):
        stock = getattr(owner, name)

        def call(*args, **kwargs):
            seen.append((name, any(report.proven for report in fd_fusion.report())))
            return stock(*args, **kwargs)

        setattr(owner, name, call)
        return lambda: setattr(owner, name, stock)

    undo = [watched(GPUModelRunner, "initialize_kv_cache"), watched(GPUModelRunner, "capture_model")]
    for do_profile in (True, False):
        bound = bring_up(folder, asked=True, do_profile=do_profile)
        fd_fusion.unbind(bound.model_runner.model)
    for one in undo:
        one()
    cache, capture = "initialize_kv_cache", "capture_model"
    assert seen == [(cache, True), (capture, True), (cache, False), (capture, True)], seen


def untouched(scratch):
    """Bound with no profile run: the host's inputs and random numbers are those of stock, seeds of the sampler too."""
    folder = write_checkpoint(f"{scratch}/untouched", "Qwen2ForCausalLM", num_hidden_layers=1)
    state = {}
    for asked in (False, True):
        for graphs in (False, True):
            paddle.seed(5)
            arguments = {"graph_optimization_config": {"use_cudagraph": graphs}}
            worker = bring_up(folder, asked, do_profile=False, **arguments)
            fields = vars(worker.model_runner.share_inputs)
            state[asked, graphs] = {
                **{name: held.numpy().tolist() if hasattr(held, "numpy") else str(held) for name, held in fields.items()},
                "same object": fields["seq_lens_this_time"] is fields["seq_lens_this_time_buffer"],
                "random": paddle.rand([1], dtype="float32").item(),
            }
            assert not asked or any(report.proven for report in fd_fusion.report())
            fd_fusion.unbind(worker.model_runner.model)
    for graphs in (False, True):
        stock, bound = state[False, graphs], state[True, graphs]
        assert stock.keys() == bound.keys(), stock.keys() ^ bound.keys()
        moved = [name for name in stock if stock[name] != bound[name]]
        assert not moved, moved


CASES = (
    order,
    untouched,
    biases,
    half_precision,
    call_forms,
    experts_apart,
    draft,
    upstream_flag,
    upstream_flag_without_upstream,
    deterministic,
    named_backend,
    cleared_and_reloaded,
    traced,
)
with tempfile.TemporaryDirectory() as scratch:
    for case in CASES:
        if not sys.argv[1:] or case.__name__ in sys.argv[1:]:
            case(scratch)
record(done=True)
