"""Families of the layers of a Hugging Face causal LM, read from its config.

One layer of such a model often holds several blocks of ours: a token mixer and a feed-forward. Its hidden states do not
show what is between them, so the layer's family names all of them, mixer first: "A+F", "M+E".

A attention, M Mamba or another state space, R another recurrence (gated delta net, RG-LRU, linear attention),
E experts, F dense feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errors import InputError

# What "linear_attention" (transformers' newer word for every recurrence) stands for, by model type.
STATE_SPACE = {
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "granite_moe_hybrid",
    "jamba",
    "mamba",
    "mamba2",
    "nemotron_h",
    "zamba",
    "zamba2",
}
MIXERS = {
    "attention": "A",
    "full_attention": "A",
    "sliding_attention": "A",
    "chunked_attention": "A",
    "*": "A",
    "mamba": "M",
    "mamba2": "M",
    "M": "M",
    "recurrent": "R",
    "conv": "R",
    "moe": "E",
    "E": "E",
    "mlp": "F",
    "-": "F",
}
# Each layer is one block: nothing follows the mixer.
BARE = {"nemotron_h", "mamba", "mamba2"}
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def layer_families(config: Any) -> list[str]:
    """config: a transformers config (or anything with its attributes). One family per layer, first to last.

    Raises InputError: no number of layers, or a layer type that is not known.
    """
    model_type = str(getattr(config, "model_type", ""))
    types = _layer_types(config)
    if types is None:
        n_layers = getattr(config, "num_hidden_layers", None)
        if not isinstance(n_layers, int) or n_layers < 1:
            raise InputError(f"--hf: the config of a {model_type or 'nameless'} model says no number of layers")
        types = ["mamba" if model_type in STATE_SPACE else "full_attention"] * n_layers
    return [_family(config, model_type, index, kind) for index, kind in enumerate(types)]


def _layer_types(config: Any) -> list[str] | None:
    for name in ("layers_block_type", "layer_types", "hybrid_override_pattern"):
        found = getattr(config, name, None)
        if isinstance(found, str) and found:
            return list(found)
        if isinstance(found, Sequence) and found and all(isinstance(kind, str) for kind in found):
            return list(found)
    cycle = getattr(config, "block_types", None)  # RecurrentGemma's: repeated to depth
    if cycle:
        return [cycle[index % len(cycle)] for index in range(config.num_hidden_layers)]
    return None


def _family(config: Any, model_type: str, index: int, kind: str) -> str:
    if kind == "hybrid":  # Zamba: shared attention and feed-forward beside Mamba; Falcon-H1: attention beside Mamba
        return "A+F+M" if model_type.startswith("zamba") else "A+M+F"
    if kind == "linear_attention":
        mixer = "M" if model_type in STATE_SPACE else "R"
    elif kind in MIXERS:
        mixer = MIXERS[kind]
    else:
        raise InputError(f"--hf: layer {index} of this {model_type} model has the unknown type {kind!r}")
    if mixer in "EF" or model_type in BARE or model_type.startswith("zamba"):
        return mixer
    return f"{mixer}+{'E' if _has_experts(config, index) else 'F'}"


def _has_experts(config: Any, index: int) -> bool:
    per_layer = getattr(config, "layers_num_experts", None)  # Jamba
    if isinstance(per_layer, Sequence) and per_layer:
        return per_layer[index] > 1
    kinds = getattr(config, "mlp_layer_types", None)
    if isinstance(kinds, Sequence) and kinds:
        return kinds[index] in ("sparse", "moe")
    n_experts = max((getattr(config, name, None) or 0 for name in EXPERT_COUNTS), default=0)
    if n_experts < 2 or index in (getattr(config, "mlp_only_layers", None) or []):
        return False
    if index < (getattr(config, "first_k_dense_replace", None) or 0):
        return False
    return (index + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0
