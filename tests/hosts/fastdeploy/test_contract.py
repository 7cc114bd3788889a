"""What the plugin relies on in FastDeploy's source, read without importing it, so that no compiled op is needed.

It is read in the contract host, and with FASTDEPLOY_SRC=<a source tree> in the real one:

    FASTDEPLOY_SRC=/path/to/FastDeploy python -m pytest tests/hosts/fastdeploy/test_contract.py -rA
"""

import ast
import os
import re
from pathlib import Path

import pytest

from fd_fusion.hosts.fastdeploy.between import layer_loop, reads_between_layers, reads_in_layer
from fd_fusion.hosts.fastdeploy.pairs import ATTENTION, BLOCKS, DECODERS
from fd_fusion.hosts.fastdeploy.source import read_block

SRC = Path(os.environ.get("FASTDEPLOY_SRC", Path(__file__).parents[2] / "host")) / "fastdeploy"


def parse(path):
    return ast.parse((SRC / path).read_text())


def classes_in(*folders):
    """{name: [(file, class node)]} of every class below the folders: two models may name one class alike."""
    found = {}
    for folder in folders:
        for file in sorted((SRC / folder).rglob("*.py")):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append((file.name, node))
    return found


MODELS = classes_in("model_executor/models", "model_executor/layers")
# Decoder layers that are in no table, and why: each is named with its reason in the README of the room.
STOCK = {"Glm4MTPLayer": "draft_model"}
# Models that add image features between their layers.
READ = {"Qwen3_VLModel", "Qwen3VLMoeModel"}


def methods(cls, name, seen=()):
    """The method `name` of a class, or of the first base that has it; bases are found by their name."""
    own = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if own:
        return own[0]
    for base in cls.bases:
        base_name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", None)
        for _, node in MODELS.get(base_name, ()):
            if base_name not in seen and (found := methods(node, name, (*seen, base_name))):
                return found
    return None


def assigned(cls, seen=()):
    """Every attribute of self that a class or its bases assign, by its own name or by a constant of setattr."""
    names = {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") == "self"
    }
    names |= {node.value for node in ast.walk(cls) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for base in cls.bases:
        base_name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", None)
        if base_name not in seen:
            for _, node in MODELS.get(base_name, ()):
                names |= assigned(node, (*seen, base_name))
    return names


def arguments(function):
    return [argument.arg for argument in function.args.args if argument.arg != "self"]


def one(path, name):
    """The class or function `name` of a file; in an except branch or an if, too."""
    nodes = [n for n in ast.walk(parse(path)) if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
    assert nodes, f"{path}: no {name}"
    return nodes[0]


def test_the_loaders():
    base = one("model_executor/model_loader/base_loader.py", "BaseModelLoader")
    assert arguments(methods(base, "load_model")) == ["fd_config"]
    loaders = [
        node
        for found in classes_in("model_executor/model_loader").values()
        for _, node in found
        if any(getattr(part, "id", "") == "BaseModelLoader" for part in node.bases)
    ]
    assert len(loaders) >= 2
    for loader in loaders:
        assert arguments(methods(loader, "load_model")) == ["fd_config"], loader.name


def test_the_worker():
    runner = one("worker/gpu_model_runner.py", "GPUModelRunner")
    names = {node.name for node in runner.body if isinstance(node, ast.FunctionDef)}
    assert {"_dummy_run", "profile_run", "capture_model"} <= names
    text = (SRC / "worker/gpu_model_runner.py").read_text()
    assert "_save_model_output" in names or "post_process(" in text
    assert {"num_tokens", "batch_size"} <= set(arguments(methods(runner, "_dummy_run")))
    worker = one("worker/gpu_worker.py", "GpuWorker")
    assert methods(worker, "graph_optimize_and_warm_up_model") and methods(worker, "load_model")
    text = (SRC / "worker/gpu_worker.py").read_text()
    assert "GPUModelRunner as ModelRunner" in text and "= ModelRunner(" in text


def test_the_layers():
    linear = "model_executor/layers/linear.py"
    assert any(
        isinstance(node, ast.Assign) and ast.unparse(node) == "self.forward = self.forward_cuda"
        for node in ast.walk(one(linear, "LinearBase"))
    ), "forward is bound to the instance"
    row = one(linear, "RowParallelLinear")
    assert "self.reduce_results" in ast.unparse(methods(row, "forward_cuda"))
    assert {"reduce_results", "split_token", "tp_group"} <= assigned(row)
    norm = one("model_executor/layers/normalization.py", "RMSNorm")
    call = arguments(methods(norm, "forward"))
    assert call[:3] == ["x", "residual_input", "forward_meta"]
    assert call[3:] in ([], ["proxy_rmsnorm"], ["external_rmsnorm"]), "the older name is one that no model passes"
    assert {"eps", "bias", "quant_scale", "begin_norm_axis", "weight"} <= assigned(norm)
    qk = one("model_executor/layers/normalization.py", "QKRMSNorm")
    assert arguments(methods(qk, "forward"))[:2] == ["qkv_out", "forward_meta"]
    assert {"q_norm", "k_norm", "q_size", "kv_size", "head_dim"} <= assigned(qk)
    moe = one("model_executor/layers/moe/moe.py", "FusedMoE")
    assert "self.reduce_results" in ast.unparse(methods(moe, "forward"))
    reduce = one("distributed/communication.py", "tensor_model_parallel_all_reduce")
    assert arguments(reduce) == ["input_", "group_"]
    # Defined here in older versions, and in a package of its own in newer ones.
    logger = SRC / "logger/__init__.py"
    if "    get_logger," in (SRC / "utils.py").read_text() and logger.exists():
        assert arguments(one("logger/__init__.py", "get_logger"))[:2] == ["name", "file_name"]
    else:
        assert arguments(one("utils.py", "get_logger"))[:2] == ["name", "file_name"]


@pytest.mark.skipif("FASTDEPLOY_SRC" not in os.environ, reason="the contract host has no all-reduce of its own")
def test_the_all_reduce_that_tune_measures_against():
    """Opened, called and captured as the host does."""
    start = arguments(one("distributed/communication.py", "use_custom_allreduce"))
    assert start == ["tp_group", "custom_all_reduce_max_bytes"]
    assert arguments(one("distributed/communication.py", "capture_custom_allreduce")) == []
    communication = (SRC / "distributed/communication.py").read_text()
    assert "_TP_AR = CustomAllreduce(" in communication and "_TP_AR.capture()" in communication
    assert "_TP_AR.should_custom_ar(input_)" in communication and "_TP_AR.custom_all_reduce(input_)" in communication
    own = one("distributed/custom_all_reduce/custom_all_reduce.py", "CustomAllreduce")
    assert "_SUPPORTED_WORLD_SIZES = [2, 4, 6, 8]" in ast.unparse(own), "with other numbers of ranks it is NCCL"
    assert "self.register_graph_buffers()" in ast.unparse(methods(own, "capture"))
    assert "inp_size > self.max_size" in ast.unparse(methods(own, "should_custom_ar"))
    assert {"_initialized", "capturing"} <= assigned(own)
    assert "    custom_ar = False" in (SRC / "distributed/custom_all_reduce/custom_all_reduce.py").read_text()
    assert '"FD_CUSTOM_AR_MAX_SIZE_MB"' in (SRC / "envs.py").read_text()


@pytest.mark.skipif("FASTDEPLOY_SRC" not in os.environ, reason="the contract host captures nothing")
def test_how_graphs_are_captured():
    """What the README of the room says of them."""
    backend = one("model_executor/graph_optimization/cudagraph_piecewise_backend.py", "CudaGraphPiecewiseBackend")
    call = ast.unparse(methods(backend, "__call__"))
    assert "entry.runnable = self.runnable if static_cudagraph_for_prefill else self.dy_runnable" in call
    assert "graphs.CUDAGraph(pool_id=self.unique_memory_pool_id)" in call, "in Paddle's default mode, thread-local"
    warm_up, capture = (call.index(part) for part in ("self.warm_up_size", "with capture_custom_allreduce()"))
    assert warm_up < capture < call.index("capture_begin()")
    choice = one("model_executor/graph_optimization/graph_optimization_backend.py", "GraphOptBackend")
    choice = ast.unparse(methods(choice, "__call__"))
    assert "if is_dy2st and is_split_cudagraph:" in choice and "should_skip_cudagraph = True" in choice
    runner = one("worker/gpu_model_runner.py", "GPUModelRunner")
    assert "sorted(capture_sizes, reverse=True)" in ast.unparse(methods(runner, "capture_model"))
    for name in ("update_parameters", "wakeup"):
        text = ast.unparse(methods(runner, name))
        graphs_alone = re.findall(r"if self\.use_cudagraph:\n +self\.capture_model\(\)", text)
        assert text.count("capture_model()") == len(graphs_alone) == 1
    dummies = [node for node in runner.body if "_dummy_" in getattr(node, "name", "")]
    assert dummies and not any("_save_model_output" in ast.unparse(node) for node in dummies)
    own = one("distributed/custom_all_reduce/custom_all_reduce.py", "CustomAllreduce")
    assert "all_gather_object(" in ast.unparse(methods(own, "register_graph_buffers"))


EMBED_BEFORE = {
    "ERNIE 4.5 VL": "Ernie4_5_VLModel",
    "Qwen2.5-VL": "Qwen2_5_VLModel",
    "PaddleOCR-VL": "PaddleOCRVLModel",
}
OTHERS = {"PaddleFormersModelBase", "Ernie4_5_MTPModel", "Glm4MTPModel"}  # no pairs, or a draft


@pytest.mark.skipif("FASTDEPLOY_SRC" not in os.environ, reason="the contract host captures nothing")
def test_which_graphs_begin_with_the_embedding():
    """Those of text models: there the ranks meet before the first fused call."""
    graphed = {
        name: node
        for name, found in MODELS.items()
        for _, node in found
        if any("support_graph_optimization" in ast.unparse(part) for part in node.decorator_list)
    }
    before = {name for name, node in graphed.items() if "embed_tokens(" not in ast.unparse(methods(node, "forward"))}
    assert before - READ - OTHERS == set(EMBED_BEFORE.values())
    assert {"Glm4MoeModel", "Qwen3Model", "DeepSeekV3Model", "Ernie4_5_Model"} <= graphed.keys() - before
    page = (Path(__file__).parents[3] / "fd_fusion/hosts/fastdeploy/README.md").read_text()
    assert all(name in page for name in EMBED_BEFORE)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_layer(name):
    if name not in MODELS:
        pytest.skip(f"this version has no {name}")
    for file, cls in MODELS[name]:
        attributes = assigned(cls)
        assert {"mlp", "input_layernorm", "post_attention_layernorm"} <= attributes, file
        assert any(where.split(".")[0] in attributes for where in ATTENTION), file
        assert reads_in_layer(methods(cls, "forward")) is None or name == "MiniCPM4DecoderLayer", file


def test_every_decoder_layer_of_the_tree_is_known():
    """By its name, or by the two norms that it holds: fused, or stock with a reason. So is every block of experts."""
    norms = {"input_layernorm", "post_attention_layernorm"}
    names = {
        name
        for name, found in classes_in("model_executor/models").items()
        for _, node in found
        if name.endswith(("DecoderLayer", "MTPLayer"))
        or norms <= set(re.findall(r"self\.(\w+) = ", ast.unparse(node)))
    } - {"DecoderLayer"}  # the base of the contract host's
    assert len(names) >= 6 and names <= {*DECODERS, *STOCK}, names - {*DECODERS, *STOCK}
    page = (Path(__file__).parents[3] / "fd_fusion/hosts/fastdeploy/README.md").read_text()
    assert not [name for name in {*DECODERS, *STOCK} if f"`{name}`" not in page]
    made = {
        node.func.id
        for name in names
        for _, layer in MODELS[name]
        for part in ast.walk(layer)
        if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "self.mlp"
        for node in [part.value]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert made <= set(BLOCKS), made - set(BLOCKS)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block(name):
    if name not in MODELS:
        pytest.skip(f"this version has no {name}")
    for file, cls in MODELS[name]:
        for part in BLOCKS[name]:
            assert part.split(".")[0] in assigned(cls), f"{file}: {part}"
        if BLOCKS[name] != ("down_proj",):
            assert read_block(methods(cls, "forward")) is not None, f"{file}: it would stay stock"


def test_the_models_read_nothing_between_their_layers():
    stacks = [
        (file, name, methods(node, "forward"))
        for name, found in MODELS.items()
        for file, node in found
        if name.endswith("Model") and "layers" in assigned(node) and methods(node, "forward")
        if any(decoder in ast.unparse(node) for decoder in DECODERS) or "layer_class" in ast.unparse(node)
    ]
    assert stacks
    reading = {name for _, name, forward in stacks if reads_between_layers(forward)}
    assert reading <= READ and reading == READ & {name for _, name, _ in stacks}, reading
    for file, name, forward in stacks:
        assert layer_loop(forward), f"{file}: {name}: a loop over its layers that is not known"
