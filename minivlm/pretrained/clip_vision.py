"""The vision tower of a CLIP or a SigLIP alone, as Hugging Face transformers stores it (CLIPVisionModel, SiglipVisionModel).

A projection into the space that CLIP's texts share is not read: the vector of an image is what the tower pools.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.layers.vit import VisionConfig, VisionTransformer
from minivlm.pretrained import hf_clip, preprocessing, siglip, vit
from minivlm.pretrained.names import table, under
from minivlm.processor import Processor

model_class = VisionTransformer
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"

rows = under(siglip.VISION, ("vision_model.", ""), "") + table("visual_projection   -   unread")


def known(values: dict[str, Any]) -> dict[str, Any]:
    return {"": siglip.VISION_KNOWN if values["model_type"] == SIGLIP else hf_clip.VISION_KNOWN}


def read_config(values: dict[str, Any]) -> VisionConfig:
    """transformers' config.json → ours."""
    if values["model_type"] == SIGLIP:
        return siglip.read_vision(values)
    return hf_clip.read_vision(hf_clip.VISION_FIELDS, values)


def write_config(config: VisionConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    kind, architecture = (SIGLIP, "SiglipVisionModel") if config.pool == "attention" else (CLIP, "CLIPVisionModel")
    return {"architectures": [architecture], "model_type": kind, **hf_clip.write_vision(config)}


def read_processor(directory: Path, values: dict[str, Any], config: VisionConfig) -> Processor:
    """For images alone."""
    defaults = preprocessing.SIGLIP_IMAGES if values["model_type"] == SIGLIP else preprocessing.CLIP_IMAGES
    return vit.image_processor(directory, config, defaults)


def write_processor(processor: Processor, config: VisionConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it."""
    kind = "SiglipImageProcessor" if config.pool == "attention" else "CLIPImageProcessor"
    return {"preprocessor_config.json": preprocessing.write_images(processor.config, kind)}
