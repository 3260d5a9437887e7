"""DINOv2, with and without registers, as Hugging Face transformers stores it (Dinov2Model): facebook/dinov2-small and kin.

Oquab et al. 2024, "DINOv2: Learning Robust Visual Features without Supervision"; Darcet et al. 2024 (registers).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.layers.vit import VisionConfig, VisionTransformer
from minivlm.pretrained import hf_clip, preprocessing, vit
from minivlm.pretrained.fields import Known, fields
from minivlm.pretrained.names import Row, table
from minivlm.processor import Processor

model_class = VisionTransformer

# ---- names -----------------------------------------------------------------------------------------------------------

BLOCK = vit.ATTENTION + table("""
    norm1                   attention_norm
    norm2                   mlp_norm
    layer_scale1.lambda1    attention_layer_scale
    layer_scale2.lambda1    mlp_layer_scale
""")
PLAIN = table("""
    mlp.fc1                 mlp.up_proj
    mlp.fc2                 mlp.down_proj
""")
GATED = table("""
    mlp.weights_in.weight   mlp.{gate,up}_proj.weight
    mlp.weights_in.bias     mlp.{gate,up}_proj.bias
    mlp.weights_out|mlp.down_proj       mlp.down_proj
""")


def rows(config: VisionConfig) -> list[Row]:
    block = BLOCK + (GATED if config.gated_mlp else PLAIN)
    registers = table("embeddings.register_tokens   register_tokens     one")
    return vit.whole(block, "dinov2.", "dinov2_with_registers.", more=registers)


def prepare(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The file. transformers 5 writes the two halves of a SwiGLU's weights_in apart."""
    halves = [name for name in weights if ".mlp.gate_proj." in name]
    stacked = lambda gate: torch.cat([weights[gate], weights[gate.replace("gate_proj", "up_proj")]])
    joined = {name.replace("gate_proj", "weights_in"): stacked(name) for name in halves}
    apart = {name for gate in halves for name in (gate, gate.replace("gate_proj", "up_proj"))}
    return ChainMap(joined, {n: weights[n] for n in weights if n not in apart}) if halves else weights


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

FIELDS = fields("""
    hidden_size             width           768
    num_hidden_layers       depth           12
    num_attention_heads     heads           12
    num_channels            -               3
    image_size              image_size      224
    patch_size              patch_size      14
    hidden_act              activation      "gelu"
    layer_norm_eps          norm_eps        1e-6
    qkv_bias                qkv_bias        true
    layerscale_value        layer_scale     1.0
    mlp_ratio               -               4
    use_swiglu_ffn          -               false
    num_register_tokens     -               4
""")
WITH_REGISTERS = "dinov2_with_registers"
# Of a backbone, whose feature maps are asked for by name; what else is for training.
BACKBONE = ("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names", "use_mask_token")
TRAINING = ("_out_features", "_out_indices", "drop_path_rate")
known = {"": Known.of(FIELDS, BACKBONE, TRAINING, interpolate_antialias=(True,))}  # the last of files with registers


def read_config(values: dict[str, Any]) -> VisionConfig:
    """transformers' config.json → ours."""
    vit.tell_of_classifier(values)
    registers = values.get("model_type") == WITH_REGISTERS
    table = FIELDS.but(patch_size=16) if registers else FIELDS
    v = table.complete(values)
    hidden = int(v["hidden_size"] * v["mlp_ratio"])
    config = hf_clip.read_vision(table, values, mlp_width=hidden, embedding_norm=False, patch_bias=True)
    if v["use_swiglu_ffn"]:
        config = replace(config, mlp_width=gated_width(hidden), gated_mlp=True, activation="silu")
    # The table is interpolated as each was trained: with registers antialiased, without not.
    return replace(config, registers=v["num_register_tokens"], antialias_positions=True) if registers else config


def gated_width(hidden: int) -> int:
    """Two thirds, so that three matrices are as large as two, rounded up to a multiple of 8 (Shazeer 2020)."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def write_config(config: VisionConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    kind, architecture = ("dinov2", "Dinov2Model")
    values = {**FIELDS.write(config), "mlp_ratio": mlp_ratio(config), "use_swiglu_ffn": config.gated_mlp}
    if config.registers:
        kind, architecture = WITH_REGISTERS, "Dinov2WithRegistersModel"
        values["num_register_tokens"] = config.registers
    elif config.gated_mlp:
        values["hidden_act"] = "gelu"  # which a SwiGLU does not follow
    return {"architectures": [architecture], "model_type": kind, **values, "use_mask_token": False}


def mlp_ratio(config: VisionConfig) -> int:
    """The ratio of which this width of the MLPs follows, or one nearby, which is found when it is read back."""
    nearest = round(config.hidden_width * (1.5 if config.gated_mlp else 1) / config.width)
    return max(1, nearest)


# ---- processor -------------------------------------------------------------------------------------------------------

IMAGES = {**preprocessing.CLIP_IMAGES, "size": {"shortest_edge": 256}, "crop_size": 224}
IMAGES |= {"image_mean": preprocessing.IMAGENET_MEAN, "image_std": preprocessing.IMAGENET_STD}


def read_processor(directory: Path, values: dict[str, Any], config: VisionConfig) -> Processor:
    """For images alone."""
    return vit.image_processor(directory, config, IMAGES)


write_processor = vit.write_processor
