"""What is read from the structure and the source of a built host model, and every reason why a pair stays stock."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "host"))
from hosting import ARCHITECTURES

from fd_fusion.hosts.fastdeploy import pairs as fastdeploy_pairs
from fd_fusion.hosts.fastdeploy.between import reads_between_layers, reads_in_layer
from fd_fusion.hosts.fastdeploy.pairs import find_pairs, whole_model_reason
from fd_fusion.hosts.fastdeploy.source import read_block


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path))


def fd_config_of(architecture="Glm4MoeForCausalLM", size=2, **model):
    """The config of one rank of `size`, with no process group: nothing is run."""
    from fastdeploy import config as host

    fd_config = host.FDConfig(
        host.ModelConfig({"architectures": [architecture]}),
        host.ParallelConfig({"tensor_parallel_size": size}),
        host.LoadConfig({}),
        host.SpeculativeConfig(None),
        host.GraphOptimizationConfig(None),
    )
    for key, value in model.items():
        setattr(fd_config.model_config, key, value)
    return fd_config


def build(architecture="Glm4MoeForCausalLM", **model):
    from fastdeploy.model_executor.models.model_base import ModelRegistry

    fd_config = fd_config_of(architecture, **model)
    return ModelRegistry.get_class(architecture)(fd_config), fd_config


def layers_of(model):
    return model.model.layers


def names(found):
    return [pair.name for pair in found[0]]


def codes(found):
    return {one.name.split(" -> ")[0]: one.reason.code for one in found[1]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_decoder_has_two_pairs_a_layer(architecture):
    model, _ = build(architecture)
    pairs, rejected = find_pairs(model, "float32")
    assert len(pairs) == 2 * len(layers_of(model)) and not rejected
    norms = [pair.norm for pair in pairs]
    assert norms[-1] is model.model.norm and layers_of(model)[0].input_layernorm not in norms
    assert len({id(norm) for norm in norms}) == len(norms), "no norm is read by two pairs"
    assert all(
        getattr(s.layer, s.attribute) and not (s.off and s.off is not True and s.off != 1)
        for pair in pairs
        for s in pair.switches
    )


def test_what_is_switched_in_each_kind_of_block():
    def switched(architecture):
        model, _ = build(architecture)
        pair = find_pairs(model, "float32")[0][3]
        mlp = layers_of(model)[1].mlp
        assert pair.producer is mlp
        return {
            (next((n for n, part in mlp.named_sublayers() if part is s.layer), ""), s.attribute, s.off)
            for s in pair.switches
        }

    reduce = "reduce_results"
    assert switched("Glm4MoeForCausalLM") == {("", "merge_ffn_tp", False)}
    assert switched("DeepseekV3ForCausalLM") == {("", "tp_size", 1)}
    assert switched("Qwen3MoeForCausalLM") == {("experts", reduce, False)}
    assert switched("MiniMaxM2ForCausalLM") == {("experts", reduce, False)}
    assert switched("Ernie4_5_MoeForCausalLM") == {
        ("experts", reduce, False),
        ("shared_experts.down_proj", reduce, False),
    }


def _split_token(model):
    layers_of(model)[0].self_attn.o_proj.split_token = True
    return "model.layers.0.self_attn.o_proj", "split_token"


def _not_reduced(model):
    layers_of(model)[0].mlp.down_proj.reduce_results = False
    return "model.layers.0.mlp.down_proj", "not_reduced"


def _quantised(model):
    model.model.norm.quant_scale = 0.5
    return "model.layers.2.mlp", "quantised_norm"


def _norm_bias(model):
    layers_of(model)[1].post_attention_layernorm.bias = model.model.norm.weight
    return "model.layers.1.self_attn.o_proj", "norm_bias"


def _other_axis(model):
    layers_of(model)[1].post_attention_layernorm.begin_norm_axis = 2
    return "model.layers.1.self_attn.o_proj", "unknown_norm"


def _gathers(model):
    layers_of(model)[1].input_layernorm.allgather_out = True
    return "model.layers.0.mlp.down_proj", "sequence_parallel"


def _unknown_block(model):
    layers_of(model)[1].mlp.experts.reduce_results = True  # reduces inside, and once more behind
    return "model.layers.1.mlp", "unknown_block"


@pytest.mark.parametrize(
    "change",
    [_split_token, _not_reduced, _quantised, _norm_bias, _other_axis, _gathers, _unknown_block],
)
def test_a_pair_stays_stock_with_its_own_reason(change):
    model, _ = build()
    where, code = change(model)
    found = find_pairs(model, "float32")
    assert codes(found) == {where: code}
    assert len(names(found)) == 2 * len(layers_of(model)) - 1 and where not in str(names(found))


def test_an_unknown_block_class_and_missing_attributes(monkeypatch):
    model, _ = build()
    monkeypatch.delitem(fastdeploy_pairs.BLOCKS, "Glm4MoeMLP")
    assert codes(find_pairs(model, "float32")) == {"model.layers.0.mlp": "unknown_block"}
    linear = layers_of(model)[1].self_attn.o_proj
    for name in ("split_token", "enable_all_reduce_fusion"):
        del linear.__dict__[name]
    norm = layers_of(model)[1].post_attention_layernorm
    for name in ("quant_scale", "bias", "split_x", "allgather_out", "begin_norm_axis"):
        del norm.__dict__[name]
    assert "model.layers.1.self_attn.o_proj" in str(names(find_pairs(model, "float32")))


def test_a_bound_layer_cannot_be_copied():
    """A copy would run the forward, and so the weights, of the layer that it was copied from."""
    from fd_fusion.hosts.fastdeploy.adapters import HostStock

    model, _ = build()
    found = find_pairs(model, "float32")[0][0]
    before = [dict(vars(part)) for part in (found.producer, found.norm)]
    detach = HostStock(found, None).attach(SimpleNamespace())
    for part in (found.producer, found.norm):
        with pytest.raises(TypeError, match="unbind"):
            copy.deepcopy(part)
    detach()
    assert [dict(vars(part)) for part in (found.producer, found.norm)] == before
    copy.deepcopy(found.norm)


def test_a_layer_of_another_pipeline_rank():
    from paddle import nn

    model, _ = build()
    layers_of(model)[1] = nn.Identity()
    found = find_pairs(model, "float32")
    assert codes(found) == {"model.layers.0.mlp.down_proj": "pipeline_boundary"}
    assert len(names(found)) == 3  # both attentions, and the last block to the final norm


def test_a_float32_residual_beside_half_activations():
    model, _ = build("Qwen2ForCausalLM", norm_dtype="float32")
    assert not find_pairs(model, "float32")[1]
    ((stock,), pairs) = find_pairs(model, "bfloat16")[::-1]
    assert stock.reason.code == "wide_residual" and not pairs


def test_two_batch_overlap(monkeypatch):
    model, _ = build()
    monkeypatch.setattr(sys.modules[type(model.model).__module__], "split_batch_decoder_layers", None, raising=False)
    assert [one.reason.code for one in find_pairs(model, "float32")[1]] == ["two_batch_overlap"]


def test_a_layer_that_scales_before_the_norm_stays_stock():
    """MiniCPM4's does; so would a known decoder that began to."""
    from fastdeploy.model_executor.models.qwen2 import Qwen2DecoderLayer

    class MiniCPM4DecoderLayer(Qwen2DecoderLayer):
        def forward(self, forward_meta, hidden_states, residual=None):
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
            hidden_states = self.self_attn(forward_meta, hidden_states)
            hidden_states = hidden_states * self.residual_scale
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
            return hidden_states * self.residual_scale, residual

    model, _ = build("Qwen2ForCausalLM")
    layers_of(model)[1].__class__ = MiniCPM4DecoderLayer
    ((stock,), pairs) = find_pairs(model, "float32")[::-1]
    assert stock.reason.code == "read_between_layers" and not pairs
    assert "hidden_states = hidden_states * self.residual_scale" in str(stock.reason)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expert_parallel_keeps_the_attention_and_the_dense_layers(architecture):
    """The experts are not split over the group, so they owe it nothing; every linear that is split still does."""
    fd_config = fd_config_of(architecture)
    fd_config.parallel_config.expert_parallel_size = 2
    from fastdeploy.model_executor.models.model_base import ModelRegistry

    model = ModelRegistry.get_class(architecture)(fd_config)
    assert whole_model_reason(model, fd_config) is None
    pairs, rejected = find_pairs(model, "float32", expert_parallel=True)
    experts = [i for i, layer in enumerate(layers_of(model)) if not type(layer.mlp).__name__.endswith("MLP")]
    assert {one.name.split(" -> ")[0] for one in rejected} == {f"model.layers.{i}.mlp" for i in experts}
    assert all(one.reason.code == "expert_parallel" and one.reason.is_rule for one in rejected)
    assert len(pairs) == 2 * len(layers_of(model)) - len(experts)
    assert not experts or len(pairs) >= len(layers_of(model))


def test_a_norm_that_a_draft_model_runs_too_stays_stock(monkeypatch):
    """ERNIE's draft ends with the norm of the model that it drafts for, on a sum that nobody handed over."""
    from fastdeploy.model_executor.models.model_base import ModelRegistry

    model, _ = build("Ernie4_5_MoeForCausalLM")
    fd_config = fd_config_of("Ernie4_5_MTPForCausalLM")
    fd_config.speculative_config.sharing_model = model
    draft = ModelRegistry.get_class("Ernie4_5_MTPForCausalLM")(fd_config)
    monkeypatch.setattr(fastdeploy_pairs, "drafts", {draft})
    found = find_pairs(model, "float32")
    assert codes(found) == {"model.layers.2.mlp": "shared_with_draft"} and len(names(found)) == 5
    assert found[1][0].reason.is_rule
    assert len(names(find_pairs(build("Ernie4_5_MoeForCausalLM")[0], "float32"))) == 6, "another model's norm"


def test_an_unknown_decoder_has_no_pairs(monkeypatch):
    model, _ = build()
    monkeypatch.setattr(fastdeploy_pairs, "DECODERS", ("Qwen2DecoderLayer",))
    assert find_pairs(model, "float32") == ([], [])


@pytest.mark.parametrize(
    "change, code",
    [
        (lambda c: setattr(c.parallel_config, "tensor_parallel_size", 1), "one_rank"),
        (lambda c: setattr(c.parallel_config, "expert_parallel_size", 2), None),
        (lambda c: setattr(c.parallel_config, "use_sequence_parallel_moe", True), "sequence_parallel"),
        (lambda c: setattr(c.speculative_config, "model_type", "mtp"), "draft_model"),
        (lambda c: None, None),
    ],
)
def test_reasons_for_a_whole_model(change, code):
    model, fd_config = build("Qwen2ForCausalLM")
    change(fd_config)
    reason = whole_model_reason(model, fd_config)
    assert (reason and reason.code) == code


def test_a_draft_model_by_its_class_and_the_proxy_norm_by_its_variable(monkeypatch):
    model, fd_config = build("Qwen2ForCausalLM")
    draft = type("Glm4MTPForCausalLM", (), {})()
    assert whole_model_reason(draft, fd_config).code == "draft_model"
    model, fd_config = build("Qwen2ForCausalLM")
    monkeypatch.setenv("FD_USE_PHI_RMSNORM", "1")
    assert whole_model_reason(model, fd_config).code == "proxy_rmsnorm"


def test_a_config_without_the_newer_parts():
    """Older versions have no speculative config, and some attributes came later."""
    bare = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))
    assert whole_model_reason(object(), bare) is None


# The forwards below are read, not run. Each stands for a shape that a version of the host has, or might get.


def tensor_model_parallel_all_reduce(x, group=None):
    return x


def gather(*args):
    return args[:3]


class Blocks:
    def plain(self, x):
        """A docstring."""
        out = self.experts(x, self.gate)
        if self.n_shared > 0:
            out = out + self.shared_experts(x)
        return out

    def guarded(self, x):
        out = self.experts(x, self.gate) + self.shared_experts(x)
        if self.tp_size > 1:
            out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out

    def nested(self, x):
        out = self.experts(x)
        if self.merge:  # noqa: SIM102
            if not (self.fused and out.shape[0] <= 2048):
                out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out

    def one_condition(self, x):
        out = self.experts(x)
        if self.merge and not (self.fused and out.shape[0] <= 2048):
            out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out

    def names_its_condition(self, x):
        out = self.experts(x)
        if self.merge:
            skip = self.fused and out.shape[0] <= 2048
            if not skip:
                # A comment.
                out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out

    def returns_early(self, x):
        out = self.experts(x)
        if self.merge:
            if self.fused and out.shape[0] <= 2048:
                return out
            out = tensor_model_parallel_all_reduce(out, self.tp_group)
        return out

    def expert_parallel_first(self, x):
        shared = self.shared_experts(x)
        if self.attn_tp_size > 1 and self.ep_size > 1:
            shared = tensor_model_parallel_all_reduce(shared)
        out = self.experts(x) + shared
        if self.tp_size > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out

    def always(self, x):
        out = self.experts(x)
        out = tensor_model_parallel_all_reduce(out)
        return out

    def at_once(self, x):
        return tensor_model_parallel_all_reduce(self.experts(x))

    def flag_has_another_reader(self, x):
        out = self.experts(x)
        if self.merge:
            out = out + self.shared_experts(x)
        if self.merge:
            out = tensor_model_parallel_all_reduce(out)
        return out

    def something_follows(self, x):
        out = self.experts(x)
        if self.merge:
            out = tensor_model_parallel_all_reduce(out)
        out = out + x
        return out

    def twice(self, x):
        out = self.experts(x)
        if self.a:
            out = tensor_model_parallel_all_reduce(out)
        if self.b:
            out = tensor_model_parallel_all_reduce(out)
        return out

    def scaled(self, x):
        out = self.experts(x) * 0.5
        if self.merge:
            out = tensor_model_parallel_all_reduce(out)
        return out

    def scattered(self, x, meta):
        if self.n_shared > 0:
            shared = self.shared_experts(x)
        x, text, image = gather(x, meta.text, meta.image, True)
        x, _, _ = gather(x, self.text(text), self.image(image), False)
        if self.n_shared > 0:
            x += shared
        if self.tp_size > 1:
            x = tensor_model_parallel_all_reduce(x)
        return x

    def returns_before(self, x):
        if x.shape[0] == 0:
            return x
        out = self.experts(x)
        if self.merge:
            out = tensor_model_parallel_all_reduce(out)
        return out

    def renames_inside(self, x):
        out = self.experts(x)
        if self.merge:
            skip = self.more(out)
            if not skip:
                out = tensor_model_parallel_all_reduce(out)
        return out

    def other_tensor(self, x):
        out = self.experts(x)
        if self.merge:
            more = tensor_model_parallel_all_reduce(x)
        return out + more

    def otherwise(self, x):
        out = self.experts(x)
        if self.merge:
            out = tensor_model_parallel_all_reduce(out)
        else:
            out = out + x
        return out

    def either(self, x):
        out = self.experts(x)
        if self.merge or self.more:
            out = tensor_model_parallel_all_reduce(out)
        return out

    def loops(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize(
    "name, flag",
    [
        ("plain", ""),
        ("guarded", "tp_size"),
        ("nested", "merge"),
        ("one_condition", "merge"),
        ("names_its_condition", "merge"),
        ("returns_early", "merge"),
        ("expert_parallel_first", "tp_size"),
        ("scaled", "merge"),
        ("scattered", "tp_size"),
    ],
)
def test_known_shapes_of_a_block(name, flag):
    assert read_block(getattr(Blocks, name)) == flag


@pytest.mark.parametrize(
    "name",
    [
        "always",
        "at_once",
        "flag_has_another_reader",
        "something_follows",
        "twice",
        "returns_before",
        "renames_inside",
        "other_tensor",
        "otherwise",
        "either",
        "loops",
    ],
)
def test_unknown_shapes_of_a_block(name):
    assert read_block(getattr(Blocks, name)) is None


def test_a_forward_without_source_is_unknown():
    namespace = {}
    exec("def forward(self, x):\n    return self.experts(x)", namespace)
    assert read_block(namespace["forward"]) is None and reads_between_layers(namespace["forward"]) is None


class Models:
    def plain(self, ids, meta):
        hidden = self.embed(ids)
        residual = None
        for i in range(self.num_layers):
            hidden, residual = self.layers[i](meta, hidden, residual)
        out = self.norm(hidden, residual, forward_meta=meta)[0]
        if self.norm.is_last_norm:
            out = self.norm.allgather(out, meta)
        return out

    def renames(self, ids, meta):
        hidden, residual = self.embed(ids), None
        for layer in range(2):
            hidden, residual = self.layers[layer](meta, hidden, residual_input=residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden

    def collects(self, ids, meta):
        hidden, residual, extra = self.embed(ids), None, []
        for i in range(2):
            hidden, residual = self.layers[i](meta, hidden, residual)
            extra.append(hidden + residual)
        return self.norm(hidden, residual)[0], extra

    def adds_before_the_norm(self, ids, meta):
        hidden, residual = self.embed(ids), None
        for i in range(2):
            hidden, residual = self.layers[i](meta, hidden, residual)
        hidden = hidden + residual
        return self.norm(hidden)

    def takes_the_layers_themselves(self, ids, meta):
        hidden, residual = self.embed(ids), None
        for layer in self.layers[: self.end]:
            hidden, residual = layer(meta, hidden, residual)
        return self.norm(hidden, residual)[0]

    def adds_for_some_requests(self, ids, meta, images=None):
        hidden, residual = self.embed(ids), None
        for i, layer in enumerate(self.layers):
            hidden, residual = layer(meta, hidden, residual)
            if images is not None and i < len(images):
                hidden = hidden + images[i]
        hidden, _ = self.norm(hidden, residual)
        return hidden

    def names_the_layer_first(self, ids, meta):
        hidden, residual = self.embed(ids), None
        for i in range(2):
            layer = self.layers[i]
            hidden, residual = layer(meta, hidden, residual)
            hidden = hidden * self.scale
        return self.norm(hidden, residual)[0]

    def another_loop(self, ids, meta):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("name", ["plain", "renames", "takes_the_layers_themselves", "another_loop"])
def test_a_model_that_reads_nothing_in_between(name):
    assert reads_between_layers(getattr(Models, name)) is None


@pytest.mark.parametrize(
    "name, line",
    [
        ("collects", "extra.append(hidden + residual)"),
        ("adds_before_the_norm", "hidden = hidden + residual"),
        ("adds_for_some_requests", "hidden = hidden + images[i]"),
        ("names_the_layer_first", "hidden = hidden * self.scale"),
    ],
)
def test_a_model_that_reads_a_sum_in_between(name, line):
    assert reads_between_layers(getattr(Models, name)) == line


class Layers:
    def plain(self, meta, hidden, residual=None):
        hidden, residual = self.input_layernorm(hidden, residual_input=residual, forward_meta=meta)
        hidden = self.self_attn(meta, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        hidden = self.mlp(hidden, meta)
        return hidden, residual

    def branches(self, meta, hidden, residual, images=None):
        if hidden.shape[0] > 0:
            hidden, residual = self.input_layernorm(hidden, residual)
            if self.is_linear:
                hidden = self.linear_attn(hidden)
            else:
                hidden = self.self_attn(hidden)
            hidden, residual = self.post_attention_layernorm(hidden, residual)
        else:
            residual = hidden
        if images is not None:
            hidden = self.mlp(hidden, meta, images)
        else:
            hidden = self.mlp(hidden, meta)
        return hidden, residual

    def returns_the_call(self, meta, hidden, residual):
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden), residual)
        return self.mlp(hidden), residual

    def scales_attention(self, meta, hidden, residual):
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(meta, hidden)
        hidden = hidden * self.residual_scale
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual

    def scales_what_it_returns(self, meta, hidden, residual):
        hidden = self.mlp(hidden)
        return hidden * self.residual_scale, residual

    def scales_the_call(self, meta, hidden, residual):
        hidden, residual = self.post_attention_layernorm(self.self_attn(hidden) * 0.5, residual)
        return self.mlp(hidden), residual

    def scales_in_place(self, meta, hidden, residual):
        hidden = self.mlp(hidden)
        hidden *= self.residual_scale
        return hidden, residual

    def scales_under_a_condition(self, meta, hidden, residual):
        out = self.mlp(hidden)
        if self.scale != 1:
            out.scale_(self.scale)
        return out, residual

    def asks(self, meta, hidden, residual):
        out = self.mlp(hidden)
        if out.max() > 1:
            residual = residual + 1
        return out, residual


@pytest.mark.parametrize("name", ["plain", "branches", "returns_the_call"])
def test_a_layer_that_reads_nothing_in_between(name):
    assert reads_in_layer(getattr(Layers, name)) is None


@pytest.mark.parametrize(
    "name, line",
    [
        ("scales_attention", "hidden = hidden * self.residual_scale"),
        ("scales_what_it_returns", "return (hidden * self.residual_scale, residual)"),
        (
            "scales_the_call",
            "hidden, residual = self.post_attention_layernorm(self.self_attn(hidden) * 0.5, residual)",
        ),
        ("scales_in_place", "hidden *= self.residual_scale"),
        ("scales_under_a_condition", "out.scale_(self.scale)"),
        ("asks", "out.max() > 1"),
    ],
)
def test_a_layer_that_reads_a_sum_in_between(name, line):
    assert reads_in_layer(getattr(Layers, name)) == line
