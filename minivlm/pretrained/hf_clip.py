"""CLIP as Hugging Face transformers stores it (CLIPModel): openai/clip-vit-base-patch32, laion/CLIP-ViT-H-14-…."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.layers.text import TextConfig
from minivlm.layers.tower import TowerConfig
from minivlm.layers.vit import VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.pretrained import preprocessing
from minivlm.pretrained.fields import Fields, Known, fields
from minivlm.pretrained.names import table, under
from minivlm.processor import Processor

model_class = CLIP

# ---- names -----------------------------------------------------------------------------------------------------------

ENCODER = table("""
    layers.*.layer_norm1            blocks.*.attention_norm
    layers.*.self_attn.q_proj       blocks.*.attention.q_proj
    layers.*.self_attn.k_proj       blocks.*.attention.k_proj
    layers.*.self_attn.v_proj       blocks.*.attention.v_proj
    layers.*.self_attn.out_proj     blocks.*.attention.out_proj
    layers.*.layer_norm2            blocks.*.mlp_norm
    layers.*.mlp.fc1                blocks.*.mlp.up_proj
    layers.*.mlp.fc2                blocks.*.mlp.down_proj
""")

VISION = table("""
    embeddings.class_embedding              class_embedding
    embeddings.patch_embedding              patch_embedding
    embeddings.position_embedding.weight    position_embedding
    pre_layrnorm                            embedding_norm
    post_layernorm                          norm
""") + under(ENCODER, "encoder.", "transformer.")  # fmt: skip

TEXT = table("""
    embeddings.token_embedding              token_embedding
    embeddings.position_embedding.weight    position_embedding
    final_layer_norm                        norm
""") + under(ENCODER, "encoder.", "transformer.")  # fmt: skip

rows = [
    *under(VISION, "vision_model.", "vision."),
    *under(TEXT, "text_model.", "text."),
    *table("""
        visual_projection           image_projection
        text_projection             text_projection
        logit_scale                 loss.logit_scale
    """),
]


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

TEXT_FIELDS = fields("""
    vocab_size                  vocab_size      49408
    hidden_size                 width           512
    intermediate_size           mlp_width       2048
    num_hidden_layers           depth           12
    num_attention_heads         heads           8
    max_position_embeddings     context         77
    hidden_act                  activation      "quick_gelu"
    layer_norm_eps              norm_eps        1e-5
    eos_token_id                -               49407
""")
VISION_FIELDS = fields("""
    hidden_size             width           768
    intermediate_size       mlp_width       3072
    num_hidden_layers       depth           12
    num_attention_heads     heads           12
    num_channels            -               3
    image_size              image_size      224
    patch_size              patch_size      32
    hidden_act              activation      "quick_gelu"
    layer_norm_eps          norm_eps        1e-5
""")

TEXT_KNOWN = Known.of(TEXT_FIELDS, "projection_dim")
VISION_KNOWN = Known.of(VISION_FIELDS, "projection_dim")


def of_towers(text: Known, vision: Known, whole: Known) -> dict[str, Known]:
    """The fields of configs whose towers may be described twice, see `part`."""
    return {"": whole, **dict.fromkeys(("text_config", "text_config_dict"), text),
            **dict.fromkeys(("vision_config", "vision_config_dict"), vision)}  # fmt: skip


known = of_towers(TEXT_KNOWN, VISION_KNOWN, Known.of("projection_dim"))


def read_config(values: dict[str, Any]) -> CLIPConfig:
    """transformers' config.json → ours."""
    text = TEXT_FIELDS.complete(part(values, "text_config"))
    # A config from before August 2023 says 2, which is no token of the vocabulary: it stands for the largest id.
    end = text["eos_token_id"]
    pool = {"pool": "argmax"} if end == 2 else {"pool": "end", "end_token": end}
    return CLIPConfig(
        vision=read_vision(VISION_FIELDS, part(values, "vision_config")),
        text=TextConfig(**TEXT_FIELDS.read(text), causal=True, **pool),
        embed_width=values.get("projection_dim", 512),
    )


def part(values: dict[str, Any], name: str) -> dict[str, Any]:
    """text_config or vision_config. Where the older text_config_dict is given, it alone counts."""
    given = values.get(f"{name}_dict")
    return (values.get(name) if given is None else given) or {}


def read_vision(table: Fields, values: dict[str, Any], **more) -> VisionConfig:
    if (channels := table.complete(values)["num_channels"]) != 3:
        raise UserError(f"config.json asks for images of {channels} channels; only 3 are supported.")
    given = table.read(values)
    image, patch = square(given["image_size"], "image_size"), square(given["patch_size"], "patch_size")
    return VisionConfig(**{**given, "image_size": image, "patch_size": patch}, drop_border=image % patch != 0, **more)


def square(size: Any, name: str) -> int:
    """224 or [224, 224] → 224"""
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise UserError(f"config.json has the {name} {size}; only squares are supported.")
    return sides.pop()


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Ours → transformers' config.json. What it cannot say is found by reading it back (see `pretrained.write`)."""
    text, width = config.text, {"projection_dim": config.embed_width}
    end = {"eos_token_id": 2 if text.pool == "argmax" else text.end_token}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **width,
        "text_config": {"model_type": "clip_text_model", **TEXT_FIELDS.write(text), **width, **end},
        "vision_config": {"model_type": "clip_vision_model", **write_vision(config.vision), **width},
    }


def write_vision(vision: TowerConfig) -> dict[str, Any]:
    if not isinstance(vision, VisionConfig):
        kind = type(vision).__name__.removesuffix("Config")
        raise UserError(f"transformers' CLIP cannot express a {kind} tower; save without layout='hf'.")
    return VISION_FIELDS.write(vision)


# ---- processor -------------------------------------------------------------------------------------------------------


def write_processor(processor: Processor, config: CLIPConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it, beside the tokeniser."""
    return {"preprocessor_config.json": preprocessing.write_images(processor.config, "CLIPImageProcessor")}


def read_processor(directory: Path, values: dict[str, Any], config: CLIPConfig) -> Processor:
    source = preprocessing.read_tokenizer(directory, "CLIPTokenizer")
    images = preprocessing.read_images(directory, config.vision.image_size, preprocessing.CLIP_IMAGES)
    return preprocessing.make_processor(directory, source, pad="<|endoftext|>", context=config.text.context, **images)
