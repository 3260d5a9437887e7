"""A plain ViT as Hugging Face transformers stores it (ViTModel, ViTForImageClassification): google/vit-base-patch16-224-in21k.

The tower alone is read. A pooler and a classifier are heads of other tasks: the vector of an image is its class token.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlm.errors import Note
from minivlm.layers.vit import VisionConfig, VisionTransformer
from minivlm.pretrained import hf_clip, preprocessing
from minivlm.pretrained.fields import Known, fields
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor, ProcessorConfig

model_class = VisionTransformer

# ---- names: of each pair the second is that of transformers 5 --------------------------------------------------------

EMBEDDINGS = table("""
    embeddings.cls_token                        class_embedding         two
    embeddings.patch_embeddings.projection      patch_embedding
    embeddings.position_embeddings              position_embedding      one
    layernorm                                   norm
    embeddings.mask_token|pooler                -                       unread
""")
ATTENTION = table("""
    attention.attention.query|attention.q_proj      attention.q_proj
    attention.attention.key|attention.k_proj        attention.k_proj
    attention.attention.value|attention.v_proj      attention.v_proj
    attention.output.dense|attention.o_proj         attention.out_proj
""")
BLOCK = ATTENTION + table("""
    layernorm_before                attention_norm
    layernorm_after                 mlp_norm
    intermediate.dense|mlp.fc1      mlp.up_proj
    output.dense|mlp.fc2            mlp.down_proj
""")


def whole(block: list[Row], *prefixes: str, more: Sequence[Row] = ()) -> list[Row]:
    """The table of a tower with such blocks: alone or, below one of these prefixes, with a head."""
    blocks = under(block, ("encoder.layer.*.", "layers.*."), "transformer.blocks.*.")
    return [*under([*EMBEDDINGS, *blocks, *more], ("", *prefixes), ""), *table("classifier|decoder    -    unread")]


rows = whole(BLOCK, "vit.")

# ---- config: a file holds only what differs from these ---------------------------------------------------------------

FIELDS = fields("""
    hidden_size             width           768
    intermediate_size       mlp_width       3072
    num_hidden_layers       depth           12
    num_attention_heads     heads           12
    num_channels            -               3
    image_size              image_size      224
    patch_size              patch_size      16
    hidden_act              activation      "gelu"
    layer_norm_eps          norm_eps        1e-12
    qkv_bias                qkv_bias        true
""")
known = {"": Known.of(FIELDS, "encoder_stride", "pooler_output_size", "pooler_act")}


def read_config(values: dict[str, Any]) -> VisionConfig:
    """transformers' config.json → ours."""
    tell_of_classifier(values)
    return hf_clip.read_vision(FIELDS, values, embedding_norm=False, patch_bias=True)


def tell_of_classifier(values: dict[str, Any]) -> None:
    [architecture, *_] = values.get("architectures") or [""]
    if "Classification" in architecture:
        warnings.warn(
            f"the classifier of this {architecture} is not read: what is loaded is its vision tower.",
            Note,
            stacklevel=4,
        )


def write_config(config: VisionConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    return {"architectures": ["ViTModel"], "model_type": "vit", **FIELDS.write(config)}


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: VisionConfig) -> Processor:
    """For images alone."""
    return image_processor(directory, config, preprocessing.VIT_IMAGES)


def image_processor(directory: Path, config: VisionConfig, defaults: dict[str, Any]) -> Processor:
    return Processor(None, ProcessorConfig(**preprocessing.read_images(directory, config.image_size, defaults)))


def write_processor(processor: Processor, config: VisionConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it."""
    kind = "BitImageProcessor" if processor.config.crop != "none" else "ViTImageProcessor"
    return {"preprocessor_config.json": preprocessing.write_images(processor.config, kind)}
