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
from minivlm.pretrained.fields import Known
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor, ProcessorConfig

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

ROWS = [
    *under(VISION, "vision_model.", "vision."),
    *under(TEXT, "text_model.", "text."),
    *table("""
        visual_projection           image_projection
        text_projection             text_projection
        logit_scale                 loss.logit_scale
    """),
]


def rows(config: CLIPConfig) -> list[Row]:
    return ROWS


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

ACTIVATIONS = {  # their word → ours; of several words, the first is the one that is written
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
}


TEXT_KNOWN = Known.of(TEXT_DEFAULTS, "projection_dim")
VISION_KNOWN = Known.of(VISION_DEFAULTS, "projection_dim")


def known(values: dict[str, Any]) -> dict[str, Known]:
    return of_towers(TEXT_KNOWN, VISION_KNOWN, Known.of("projection_dim"))


def of_towers(text: Known, vision: Known, whole: Known) -> dict[str, Known]:
    """Of configs whose towers may be described twice, see `part`."""
    return {"": whole, **dict.fromkeys(("text_config", "text_config_dict"), text),
            **dict.fromkeys(("vision_config", "vision_config_dict"), vision)}  # fmt: skip


def read_config(values: dict[str, Any]) -> CLIPConfig:
    """transformers' config.json → ours."""
    text = part(values, "text_config", TEXT_DEFAULTS)
    vision = part(values, "vision_config", VISION_DEFAULTS)
    # A config from before August 2023 says 2, which is no token of the vocabulary: it stands for the largest id.
    end = text["eos_token_id"]
    return CLIPConfig(
        vision=read_vision(vision),
        text=TextConfig(
            **read_encoder(text),
            vocab_size=text["vocab_size"],
            context=text["max_position_embeddings"],
            causal=True,
            **({"pool": "argmax"} if end == 2 else {"pool": "end", "end_token": end}),
        ),
        embed_width=values.get("projection_dim", 512),
    )


def part(values: dict[str, Any], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """text_config or vision_config, completed. Where the older text_config_dict is given, it alone counts."""
    given = values.get(f"{name}_dict")
    given = values.get(name) if given is None else given
    return {**defaults, **(given or {})}


def read_encoder(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that both towers share, under our names."""
    return {
        "width": values["hidden_size"],
        "depth": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "mlp_width": values["intermediate_size"],
        "activation": read_activation(values["hidden_act"]),
        "norm_eps": values["layer_norm_eps"],
    }


def read_activation(word: str) -> str:
    if word not in ACTIVATIONS:
        raise UserError(f"config.json asks for the activation {word!r}; there are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[word]


def write_activation(name: str) -> str:
    return next(word for word, ours in ACTIVATIONS.items() if ours == name)


def read_vision(values: dict[str, Any], **more) -> VisionConfig:
    if values["num_channels"] != 3:
        raise UserError(f"config.json asks for images of {values['num_channels']} channels; only 3 are supported.")
    image, patch = square(values["image_size"], "image_size"), square(values["patch_size"], "patch_size")
    return VisionConfig(
        **read_encoder(values), image_size=image, patch_size=patch, drop_border=image % patch != 0, **more
    )


def square(size: Any, name: str) -> int:
    """224 or [224, 224] → 224"""
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1:
        raise UserError(f"config.json has the {name} {size}; only squares are supported.")
    return sides.pop()


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Ours → transformers' config.json. What it cannot say is found by reading it back (see `pretrained.write`)."""
    text = config.text
    end = 2 if text.pool == "argmax" else text.end_token
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_width,
        "text_config": {
            "model_type": "clip_text_model",
            **write_encoder(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context,
            "projection_dim": config.embed_width,
            "eos_token_id": end,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **write_vision(config.vision),
            "projection_dim": config.embed_width,
        },
    }


def write_vision(vision: TowerConfig) -> dict[str, Any]:
    if not isinstance(vision, VisionConfig):
        kind = type(vision).__name__.removesuffix("Config")
        raise UserError(f"transformers' CLIP cannot express a {kind} tower; save without layout='hf'.")
    return {**write_encoder(vision), "image_size": vision.image_size, "patch_size": vision.patch_size}


def write_encoder(tower: TextConfig | VisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.hidden_width,
        "hidden_act": write_activation(tower.activation),
        "layer_norm_eps": tower.norm_eps,
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def write_processor(processor: Processor, config: CLIPConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it, beside the tokeniser."""
    return {"preprocessor_config.json": preprocessing.write_images(processor.config, "CLIPImageProcessor")}


def read_processor(directory: Path, values: dict[str, Any], config: CLIPConfig) -> Processor:
    return Processor(
        preprocessing.read_tokenizer(directory, "CLIPTokenizer"),
        ProcessorConfig(
            **preprocessing.read_images(directory, config.vision.image_size, preprocessing.CLIP_IMAGES),
            context=config.text.context,
            pad_token=preprocessing.read_pad_token(directory, "<|endoftext|>"),
        ),
    )
