"""SigLIP as Hugging Face transformers stores it (SiglipModel): google/siglip-base-patch16-224 and kin; SigLIP 2 for images of
one size (google/siglip2-base-patch16-224), which is the same model with Gemma's tokeniser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.layers.text import TextConfig
from minivlm.layers.vit import VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.pretrained import hf_clip, preprocessing
from minivlm.pretrained.fields import Known
from minivlm.pretrained.names import table, under
from minivlm.processor import Processor

model_class = CLIP

# ---- names: CLIP's, and a pooling head on each tower -----------------------------------------------------------------

VISION = hf_clip.VISION + table("""
    head.probe                      attention_pool.query
    head.attention.in_proj_weight   attention_pool.attention.{q,k,v}_proj.weight
    head.attention.in_proj_bias     attention_pool.attention.{q,k,v}_proj.bias
    head.attention.out_proj         attention_pool.attention.out_proj
    head.layernorm                  attention_pool.norm
    head.mlp.fc1                    attention_pool.mlp.up_proj
    head.mlp.fc2                    attention_pool.mlp.down_proj
""")

rows = [
    *under(VISION, "vision_model.", "vision."),
    *under(hf_clip.TEXT, "text_model.", "text."),
    *table("""
        text_model.head         text_projection
        logit_scale             loss.logit_scale        one
        logit_bias              loss.logit_bias         one
    """),
]


# ---- config ----------------------------------------------------------------------------------------------------------

ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
TEXT_FIELDS = hf_clip.TEXT_FIELDS.but(**ENCODER, vocab_size=32000, max_position_embeddings=64, projection_size=None)
VISION_FIELDS = hf_clip.VISION_FIELDS.but(**ENCODER, patch_size=16, vision_use_head=True)

VISION_KNOWN = Known.of(VISION_FIELDS)
known = hf_clip.of_towers(Known.of(TEXT_FIELDS), VISION_KNOWN, Known.of())


def read_config(values: dict[str, Any]) -> CLIPConfig:
    """transformers' config.json → ours."""
    text = TEXT_FIELDS.complete(hf_clip.part(values, "text_config"))
    vision = read_vision(hf_clip.part(values, "vision_config"))
    if vision.pool != "attention":
        raise UserError("config.json has vision_use_head false: this SigLIP has no image embedding to load.")
    return CLIPConfig(
        vision=vision,
        text=TextConfig(**TEXT_FIELDS.read(text), causal=False, use_mask=False, pool="last"),
        embed_width=text["projection_size"] or text["hidden_size"],
        image_projection=False,
        text_projection_bias=True,
        loss="sigmoid",
    )


def read_vision(values: dict[str, Any]) -> VisionConfig:
    pool = "attention" if VISION_FIELDS.complete(values)["vision_use_head"] else "mean"
    return hf_clip.read_vision(VISION_FIELDS, values, pool=pool, embedding_norm=False, patch_bias=True)


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    text = {**TEXT_FIELDS.write(config.text), "projection_size": config.embed_width}
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **text},
        "vision_config": {"model_type": "siglip_vision_model", **hf_clip.write_vision(config.vision)},
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def write_processor(processor: Processor, config: CLIPConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it, beside the tokeniser."""
    return {"preprocessor_config.json": preprocessing.write_images(processor.config, "SiglipImageProcessor")}


def read_processor(directory: Path, values: dict[str, Any], config: CLIPConfig) -> Processor:
    source = preprocessing.read_tokenizer(directory, "SiglipTokenizer")
    images = preprocessing.read_images(directory, config.vision.image_size, preprocessing.SIGLIP_IMAGES)
    text = {"context": config.text.context, "pad_to_context": True}
    return preprocessing.make_processor(directory, source, pad="</s>", **text, **images)
