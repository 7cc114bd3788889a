"""Which layer of a built FastDeploy model feeds which norm: read from the instances, never from names in a prefix.

    attention's output linear          -> this layer's post_attention_layernorm
    the MLP's down_proj, or the block  -> the next layer's input_layernorm, after the last layer the final norm

Layer 0's input norm has no producer. Nothing is changed: a pair names what could be switched, and a pair that must
stay as the host made it has a reason.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fd_fusion.binding.attributes import follow
from fd_fusion.frameworks.tensors import dtype_name
from fd_fusion.hosts.fastdeploy.between import reads_between_layers, reads_in_layer
from fd_fusion.hosts.fastdeploy.source import read_block
from fd_fusion.reasons import Reason, because
from fd_fusion.site import Rejected

# Classes of decoder layers. What their forwards do with a sum on its way to the norm is read from their source.
DECODERS = (
    "DeepSeekV3DecoderLayer",
    "Ernie4_5_DecoderLayer",
    "Ernie4_5_VLDecoderLayer",
    "Glm4MoeDecoderLayer",
    "GptOssDecoderLayer",
    "MiniCPM4DecoderLayer",
    "MiniMaxM2_5DecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Qwen3_5DecoderLayer",
)
# Where the attention's partial sum comes from: an instance has one of them.
ATTENTION = ("self_attn.o_proj", "linear_attn.out_proj")
# Class of `mlp` -> the layers in it that may reduce. With one linear, that is the producer itself.
_DENSE = ("Glm4Moe", "Qwen2", "Qwen3", "Qwen3_5", "DeepSeekV3", "Ernie4_5_", "Ernie4_5_VL", "MiniCPM4")
_VL = tuple(f"{kind}_fused_moe.{part}" for kind in ("text", "image") for part in ("experts", "down_proj"))
BLOCKS = {
    **dict.fromkeys((f"{name}MLP" for name in _DENSE), ("down_proj",)),
    **dict.fromkeys(("Qwen3MoeBlock", "GptOssMoe", "MiniMaxM2_5MoE"), ("experts",)),
    **dict.fromkeys(("Glm4Moe", "DeepSeekV3MoE", "Ernie4_5_MoE"), ("experts", "shared_experts.down_proj")),
    "Ernie4_5_VLMoE": (*_VL, "shared_experts.down_proj"),
}

# Models of this process that draft for another one, and share layers with it.
drafts: weakref.WeakSet = weakref.WeakSet()


@dataclass(frozen=True)
class Switch:
    """An attribute of one instance, and the value with which that instance leaves its sum unreduced."""

    layer: Any
    attribute: str
    off: Any


@dataclass(frozen=True)
class HostPair:
    """A producer whose forward returns the partial sum once all `switches` are off, and the norm that reads it."""

    name: str
    producer: Any
    norm: Any
    switches: tuple[Switch, ...]
    reader: Any = None  # the attention, MLP or block that reads the norm; None of the final norm


def whole_model_reason(model: Any, fd_config: Any) -> Reason | None:
    """Return why no pair of this model may have a Site, whatever its layers are, or None."""
    parallel = fd_config.parallel_config
    speculative = getattr(fd_config, "speculative_config", None)
    name = type(model).__name__
    if getattr(parallel, "tensor_parallel_size", 1) < 2:
        return because("one_rank")
    if getattr(speculative, "model_type", "main") not in (None, "main") or "MTP" in name.upper():
        return because("draft_model", model=name)
    if getattr(parallel, "use_sequence_parallel_moe", False):
        return because("sequence_parallel")
    if os.environ.get("FD_USE_PHI_RMSNORM", "0").strip().lower() in ("1", "true"):
        return because("proxy_rmsnorm")
    return None


def find_pairs(model: Any, dtype: str, expert_parallel: bool = False) -> tuple[list[HostPair], list[Rejected]]:
    """Return all pairs of `model` in order, and the ones that have to stay stock, each with its reason.

    `dtype` is that of the activations, "bfloat16" for example. `expert_parallel`: each rank has whole experts.
    """
    pairs, rejected = [], []
    lent = {id(layer) for draft in drafts for layer in draft.sublayers()}
    for path, stack in _decoder_stacks(model):
        if reason := _stack_reason(stack, dtype):
            rejected.append(Rejected(path or type(stack).__name__, reason))
            continue
        for name, producer, norm, found, reader in _candidates(path, stack, expert_parallel):
            reason = found if isinstance(found, Reason) else _norm_reason(norm)
            if not reason and not lent.isdisjoint((id(producer), id(norm))):
                reason = because("shared_with_draft")
            if reason:
                rejected.append(Rejected(name, reason))
            else:
                pairs.append(HostPair(name, producer, norm, found, reader))
    return pairs, rejected


def has_state(model: Any) -> bool:
    """Return whether a forward moves a recurrent state on, so that a second one gives other numbers."""
    return any(hasattr(layer, "linear_attn") for _, stack in _decoder_stacks(model) for layer in stack.layers)


def _decoder_stacks(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers of `model` that hold a list of known decoder layers and the final norm."""
    for path, layer in model.named_sublayers(include_self=True):
        layers = getattr(layer, "layers", None)
        if layers is not None and any(type(part).__name__ in DECODERS for part in layers):
            yield path, layer


def _stack_reason(stack: Any, dtype: str) -> Reason | None:
    if hasattr(sys.modules.get(type(stack).__module__), "split_batch_decoder_layers"):
        return because("two_batch_overlap", model=type(stack).__name__)
    # A norm computes in the dtype of its weight, and the first one gives its cast input on as the residual.
    first = norm_dtype(getattr(stack.layers[0], "input_layernorm", None))
    if first not in (None, dtype):
        return because("wide_residual", got=first, dtype=dtype)
    kinds = {type(layer) for layer in stack.layers if type(layer).__name__ in DECODERS}
    lines = [reads_between_layers(type(stack).forward), *(reads_in_layer(kind.forward) for kind in kinds)]
    return next((because("read_between_layers", line=line) for line in lines if line), None)


def _candidates(
    path: str, stack: Any, expert_parallel: bool
) -> Iterator[tuple[str, Any, Any, tuple[Switch, ...] | Reason, Any]]:
    """Yield (name, producer, norm, switches or the reason why not, what reads the norm) of each pair."""
    layers = list(stack.layers)
    prefix = f"{path}." if path else ""
    for i, layer in enumerate(layers):
        if type(layer).__name__ not in DECODERS:
            continue  # another rank's layer in a pipeline, or an identity in its place
        for where in ATTENTION:
            linear = follow(layer, where)
            if linear is not None:
                name = f"{prefix}layers.{i}.{where} -> {prefix}layers.{i}.post_attention_layernorm"
                yield name, linear, layer.post_attention_layernorm, _linear_switches(linear), layer.mlp
        producer, switches, where = _block(layer.mlp, expert_parallel)
        name = f"{prefix}layers.{i}.mlp{where} -> "
        if i + 1 == len(layers):
            norm = getattr(stack, "norm", None)
            if norm is not None:
                yield f"{name}{prefix}norm", producer, norm, switches, None
        elif type(layers[i + 1]).__name__ in DECODERS:
            after = layers[i + 1]
            reader = next((part for where in ATTENTION if (part := follow(after, where.partition(".")[0]))), None)
            yield f"{name}{prefix}layers.{i + 1}.input_layernorm", producer, after.input_layernorm, switches, reader
        else:
            yield f"{name}layers.{i + 1}", producer, None, because("pipeline_boundary", layer=i + 1), None


def _linear_switches(linear: Any) -> tuple[Switch, ...] | Reason:
    if getattr(linear, "split_token", False):
        return because("split_token")
    if not getattr(linear, "reduce_results", False):
        return because("not_reduced", producer=type(linear).__name__)
    return (Switch(linear, "reduce_results", False),)


def _block(mlp: Any, expert_parallel: bool) -> tuple[Any, tuple[Switch, ...] | Reason, str]:
    """Return (producer, its switches, its path below mlp) for a dense MLP or a mixture of experts."""
    known = BLOCKS.get(type(mlp).__name__)
    if known is None:
        return mlp, because("unknown_block", block=type(mlp).__name__), ""
    if known == ("down_proj",):
        return mlp.down_proj, _linear_switches(mlp.down_proj), ".down_proj"
    if expert_parallel:
        return mlp, because("expert_parallel"), ""
    inner = [part for part in (follow(mlp, where) for where in known) if part is not None]
    reducing = [part for part in inner if getattr(part, "reduce_results", False)]
    flag = read_block(type(mlp).forward)
    if flag == "" and len(reducing) == len(inner):
        return mlp, tuple(Switch(part, "reduce_results", False) for part in inner), ""
    if flag and not reducing and (value := getattr(mlp, flag, None)):
        return mlp, (Switch(mlp, flag, False if isinstance(value, bool) else 1),), ""
    return mlp, because("unknown_block", block=type(mlp).__name__), ""


def _norm_reason(norm: Any) -> Reason | None:
    if getattr(norm, "quant_scale", None) not in (None, -1):
        return because("quantised_norm")
    if getattr(norm, "bias", None) is not None:
        return because("norm_bias")
    if getattr(norm, "begin_norm_axis", 1) != 1 or getattr(norm, "weight", None) is None:
        return because("unknown_norm", norm=type(norm).__name__)
    if getattr(norm, "split_x", False) or getattr(norm, "allgather_out", False):
        return because("sequence_parallel")
    return None


def norm_dtype(norm: Any) -> str | None:
    """Return the dtype of a norm's weight, "bfloat16"; None for a norm without a weight."""
    weight = getattr(norm, "weight", None)
    return None if weight is None else dtype_name(weight)
