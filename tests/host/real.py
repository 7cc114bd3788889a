"""FastDeploy's real layers and models from FASTDEPLOY_SRC, on a CPU, with stand-ins for what they cannot do without.

Real are the linear layers, FusedMoE, the norms, the decoders and models, the model loaders' base, the all-reduce.
Stand-ins, which hold nothing but their names:

    packages       PACKAGES, where they are not installed
    of FastDeploy  its engine and server (AROUND), attention backends, samplers, and every compiled op (ops.gpu ...)
    in a model     attention without a cache, the activation, the embedding, the head, and the experts' product

The one compiled op that a norm needs, fused_rms_norm, is its formula.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import paddle
from paddle import nn

PACKAGES = ("paddleformers", "requests", "yaml", "aistudio_sdk", "fastapi", "huggingface_hub", "pynvml", "scipy")
PACKAGES += ("zmq", "transformers", "safetensors", "opentelemetry", "prometheus_client", "pydantic", "msgspec")
AROUND = ("entrypoints", "engine", "scheduler", "cache_manager", "inter_communicator", "input", "eplb", "output")
AROUND += ("trace", "metrics", "multimodal", "spec_decode", "worker", "model_executor.guided_decoding")
AROUND += ("model_executor.layers.attention", "model_executor.layers.sample", "model_executor.ops")


class Anything:
    """Stands for any class or function of a stand-in: as a decorator it returns what it decorates."""

    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class StandIn(types.ModuleType):
    __path__ = ()
    __version__ = "9.9.9"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Anything,), {}) if name[:1].isupper() else Anything()
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`names` and all below them are stand-ins."""

    def __init__(self, names):
        self._names = names

    def find_spec(self, name, path, target=None):
        known = any(name == one or name.startswith(f"{one}.") for one in self._names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


def install():
    """Make `fastdeploy` importable, without what its packages import by themselves."""
    root = Path(os.environ["FASTDEPLOY_SRC"]) / "fastdeploy"
    sys.meta_path.insert(0, Finder([f"fastdeploy.{name}" for name in AROUND]))
    sys.meta_path.append(Finder(PACKAGES))  # behind all others: only what is missing
    for name in ("fastdeploy", "fastdeploy.model_executor", "fastdeploy.model_executor.models"):
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    importlib.import_module("fastdeploy.envs")
    install_worker()


def install_worker():
    """The names of a rank's worker, which the plugin patches."""

    class GPUModelRunner:
        def _save_model_output(self, *args):
            pass

        def _dummy_run(self, *args):
            pass

    class GpuWorker:
        def graph_optimize_and_warm_up_model(self):
            pass

    sys.modules["fastdeploy.worker.gpu_model_runner"] = SimpleNamespace(GPUModelRunner=GPUModelRunner)
    sys.modules["fastdeploy.worker.gpu_worker"] = SimpleNamespace(GpuWorker=GpuWorker, ModelRunner=GPUModelRunner)


class Config(SimpleNamespace):
    """A config: whatever was not given is None."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def fd_config_of(rank, size, tp_group, flag=False, level=0, expert_parallel=False, speculative=None, **changes):
    counts = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}
    counts |= {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_layer_start_index": 1}
    experts |= {"num_experts": 4, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "topk_method": ""}
    experts |= {"first_k_dense_replace": 1, "mlp_only_layers": [0], "decoder_sparse_step": 1, "moe_gate_fp32": True}
    kind = {
        "rms_norm_eps": 1e-6,
        "dtype": "float32",
        "hidden_act": "silu",
        "model_type": "",
        "model_format": "paddle",
    }
    kind |= {"is_quantized": False, "pretrained_config": Config(prefix_name="model"), "num_local_experts": 4}
    kind |= {"im_patch_id": 2, "architectures": [""], "max_model_len": 64}
    parallel = {"tensor_parallel_size": size, "tensor_parallel_rank": rank, "tp_group": tp_group}
    parallel |= {"expert_parallel_size": size if expert_parallel else 1, "enable_flashinfer_allreduce_fusion": flag}
    parallel |= {"expert_parallel_rank": rank if expert_parallel else 0, "use_ep": expert_parallel}
    return Config(
        model_config=Config(**{**counts, **experts, **kind, **changes}),
        parallel_config=Config(**parallel, use_sequence_parallel_moe=False),
        graph_opt_config=Config(graph_opt_level=level, use_cudagraph=False, cudagraph_capture_sizes=[8]),
        load_config=Config(load_choices="default_v1"),
        speculative_config=speculative or Config(model_type="main"),
        routing_replay_config=Config(enable_routing_replay=False),
        eplb_config=Config(enable_eplb=False),
        scheduler_config=Config(max_num_batched_tokens=64),
        cache_config=Config(),
    )


class Activation(nn.Layer):
    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return nn.functional.silu(a) * b


class Attention(nn.Layer):
    def __init__(self, fd_config, **kwargs):
        super().__init__()
        model = fd_config.model_config
        self.width = model.num_attention_heads * model.head_dim // fd_config.parallel_config.tensor_parallel_size

    def forward(self, qkv, forward_meta=None, **kwargs):
        return paddle.tanh(qkv[:, : self.width])


class LatentAttention(nn.Layer):
    """In place of DeepSeek's: its output linear is the real one."""

    def __init__(self, fd_config, layer_id, prefix=""):
        super().__init__()
        from fastdeploy.model_executor.layers.linear import RowParallelLinear

        size, hidden = fd_config.parallel_config.tensor_parallel_size, fd_config.model_config.hidden_size
        self.width = hidden // size
        self.o_proj = RowParallelLinear(fd_config, prefix=f"{prefix}.o_proj", input_size=hidden, output_size=hidden)

    def forward(self, forward_meta, hidden_states, *more):
        return self.o_proj(paddle.tanh(hidden_states[:, : self.width]))


class Embedding(nn.Layer):
    def __init__(self, fd_config, num_embeddings, embedding_dim, **kwargs):
        super().__init__()
        self.embeddings = nn.Embedding(num_embeddings, embedding_dim)

    def forward(self, ids_remove_padding=None, forward_meta=None):
        return self.embeddings(ids_remove_padding)


class Head(nn.Layer):
    def __init__(self, *args, **kwargs):
        super().__init__()


class Projection(nn.Layer):
    """In place of a draft model's: the same on every rank."""

    def __init__(self, fd_config, num_embeddings, embedding_dim, **kwargs):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, num_embeddings)

    def forward(self, x):
        return self.linear(x)


def gather_scatter(hidden_states, text, image, token_type_ids, text_index, image_index, to_parts):
    """The rows of images and of text to their experts, or back in place."""
    where = [paddle.nonzero(token_type_ids == kind).flatten() for kind in (0, 1)]
    if to_parts:
        return hidden_states, hidden_states[where[0]], hidden_states[where[1]]
    for rows, part in zip(where, (text, image)):
        if len(rows):
            hidden_states[rows] = part
    return hidden_states, text, image


class Experts:
    """The quant method of FusedMoE: one product, weighted by the gate."""

    def init_ep(self, layer):
        pass

    def create_weights(self, layer, **kwargs):
        layer.product = layer.create_parameter([layer.hidden_size, layer.hidden_size])

    def apply(self, layer, x, gate, *args, **kwargs):
        return paddle.matmul(x, layer.product) * nn.functional.softmax(gate(x.astype("float32")))[:, :1]


def rms_norm(x, norm_weight, norm_bias, epsilon, begin_norm_axis, bias=None, residual=None, **kwargs):
    x = x if residual is None else x + residual
    return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * norm_weight, x


PARTS = {
    "Attention": Attention,
    "DeepseekV3MLAAttention": LatentAttention,
    "DeepseekV32DSAAttention": LatentAttention,
    "ParallelEHProjection": Projection,
    "text_image_gather_scatter": gather_scatter,
    "text_image_index_out": Anything(),
    "SiluAndMul": Activation,
    "VocabParallelEmbedding": Embedding,
    "ParallelLMHead": Head,
}


def make_kimi():
    """Kimi K2.5, of a pull request: a subclass of DeepSeek's model, with a loader of weights of its own alone."""
    base = importlib.import_module("fastdeploy.model_executor.models.deepseek_v3").DeepseekV3ForCausalLM
    kimi = type("KimiK25ForConditionalGeneration", (base,), {})
    sys.modules["fastdeploy.model_executor.models.kimi_k25"] = module = types.ModuleType("kimi_k25")
    module.KimiK25ForConditionalGeneration = kimi


def load(models):
    """Import the models, and put the stand-ins of their parts in."""
    if importlib.util.find_spec("fastdeploy.model_executor.models.kimi_k25") is None:
        make_kimi()
    modules = [importlib.import_module(f"fastdeploy.model_executor.models.{name}") for name in models]
    norms = importlib.import_module("fastdeploy.model_executor.layers.normalization")
    moe = importlib.import_module("fastdeploy.model_executor.layers.moe.moe")
    # Only now, since what is imported for CUDA asks the device for its properties.
    type(sys.modules["fastdeploy.platforms"].current_platform).is_cuda = lambda self: True
    norms.fused_rms_norm, norms._TRITON_AVAILABLE, moe.get_moe_method = rms_norm, False, lambda *layer: Experts()
    for module in modules:
        vars(module).setdefault(
            "get_position_ids_and_mask_encoder_batch", Anything()
        )  # in older versions of DeepSeek
        for name, part in PARTS.items():
            if hasattr(module, name):
                setattr(module, name, part)
