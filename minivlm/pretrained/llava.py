"""LLaVA as Hugging Face transformers stores it (LlavaForConditionalGeneration): llava-hf/llava-1.5-7b-hf and kin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.files import read_json
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.layers.vit import VisionConfig
from minivlm.models.llava import LLaVA, LLaVAConfig
from minivlm.pretrained import hf_clip, language, llama, preprocessing, siglip
from minivlm.pretrained.chat_template import with_chat_template
from minivlm.pretrained.fields import Known, read_activation, write_activation
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = LLaVA

# ---- names: the first spelling is the published one, the others are what later versions of transformers wrote, and the
# last what LLaVA's authors did

VISION = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "model.vision_tower.vision_tower.vision_model.",
)
LANGUAGE = ("language_model.model.", "model.language_model.", "language_model.", "model.")

REST = table("""
    language_model.lm_head|lm_head                                              language_model.head
    multi_modal_projector.linear_1|model.multi_modal_projector.linear_1|model.mm_projector.0    projector.up_proj
    multi_modal_projector.linear_2|model.multi_modal_projector.linear_2|model.mm_projector.2    projector.down_proj
""")


def rows(config: LLaVAConfig) -> list[Row]:
    tower = siglip.VISION if is_siglip(config.vision) else hf_clip.VISION
    return [*under(tower, VISION, "vision."), *under(llama.MODEL, LANGUAGE, "language_model."), *REST]


def is_siglip(vision: VisionConfig) -> bool:
    return vision.pool != "class"


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": None,
    "vision_config": None,
}
UNDESCRIBED_VISION = {  # CLIP-L/14-336
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def known(values: dict[str, Any]) -> dict[str, Known]:
    if "mm_vision_tower" in values:  # is refused by `read_config`
        return {}
    whole = Known.of(DEFAULTS, "image_token_id", "image_seq_length", "ignore_index", "vocab_size", "hidden_size")
    vision = hf_clip.VISION_KNOWN | siglip.VISION_KNOWN | Known.of("vocab_size")
    return {"": whole, "text_config": llama.KNOWN, "vision_config": vision}


def read_config(values: dict[str, Any]) -> LLaVAConfig:
    """transformers' config.json → ours."""
    if "mm_vision_tower" in values:
        raise UserError(
            "config.json is that of LLaVA's own code, which names its vision tower instead of describing it; "
            "take the version in transformers' form, such as llava-hf/llava-1.5-7b-hf."
        )
    v = {**DEFAULTS, **values}
    vision, layers = read_vision(v["vision_config"]), v["vision_feature_layer"]
    return LLaVAConfig(
        vision=vision,
        language=read_language(v),
        image_token=v.get("image_token_id", v["image_token_index"]),
        projector_activation=read_activation(v["projector_hidden_act"]),
        projector_bias=v["multimodal_projector_bias"],
        vision_layers=tuple(layers) if isinstance(layers, list) else (layers,),
        class_token=reads_class_token(v["vision_feature_select_strategy"], vision),
    )


def read_language(values: dict[str, Any]) -> LanguageModelConfig:
    text = values["text_config"] or {}
    kind = text.get("model_type", "llama")
    if kind not in llama.KINDS:
        known = ", ".join(llama.KINDS)
        raise UserError(f"config.json asks for a language model of type {kind!r}; supported in a LLaVA are {known}.")
    outer = {k: values[k] for k in ("eos_token_id", "pad_token_id") if values.get(k) is not None}
    config = llama.read_config({**text, "model_type": kind, **outer})
    return replace(config, tie_head=config.tie_head or values.get("tie_word_embeddings", False))


def read_vision(values: dict[str, Any] | None) -> VisionConfig:
    values = UNDESCRIBED_VISION if values is None else values
    kind = values.get("model_type", "clip_vision_model")
    if kind == "clip_vision_model":
        return hf_clip.read_vision(hf_clip.VISION_FIELDS, values)
    if kind == "siglip_vision_model":
        return siglip.read_vision(values)
    raise UserError(
        f"config.json asks for a vision tower of type {kind!r}; there are clip_vision_model and siglip_vision_model."
    )


def reads_class_token(strategy: str, vision: VisionConfig) -> bool:
    """ "default": all but the first feature, which is CLIP's class token; "full": all features."""
    if strategy not in ("default", "full"):
        raise UserError(f"config.json has vision_feature_select_strategy {strategy!r}; there are default and full.")
    if is_siglip(vision) and strategy == "default":
        raise UserError(
            "config.json has vision_feature_select_strategy 'default', which drops the class token, but SigLIP has "
            "none, so its first patch would be lost; it should be 'full'."
        )
    return strategy == "full" and not is_siglip(vision)


def write_config(config: LLaVAConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    if config.lora is not None:
        raise UserError("adapters have no place in transformers' LLaVA: call merge_lora() before saving it.")
    if config.language.rope_theta is None:
        raise UserError(
            "transformers' LLaVA needs a language model with rotary positions, like LLaMA or Qwen2; "
            "save without layout='hf'."
        )
    text, vision = llama.write_config(config.language), write_vision(config.vision)
    layers = list(config.vision_layers)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": write_activation(config.projector_activation),
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": layers if len(layers) > 1 else layers[0],
        "vision_feature_select_strategy": strategy(config),
        "tie_word_embeddings": config.language.tie_head,
        "eos_token_id": text["eos_token_id"],
        "pad_token_id": text["pad_token_id"],
        "text_config": text,
        "vision_config": vision,
    }


def write_vision(vision: VisionConfig) -> dict[str, Any]:
    values = hf_clip.write_vision(vision)
    if is_siglip(vision):
        return {"model_type": "siglip_vision_model", **values, "vision_use_head": vision.pool == "attention"}
    return {"model_type": "clip_vision_model", **values}


def strategy(config: LLaVAConfig) -> str:
    return "full" if config.class_token or is_siglip(config.vision) else "default"


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LLaVAConfig) -> Processor:
    source = preprocessing.read_tokenizer(directory, "LlamaTokenizer")
    placeholder = read_placeholder(directory)
    vocab = language.vocabulary(source, directory)
    language.check_vocabulary(vocab, config.language, placeholder)
    language.check_placeholder(vocab, placeholder, config.image_token, directory, "image_token_index in config.json is")
    defaults = preprocessing.SIGLIP_IMAGES if is_siglip(config.vision) else preprocessing.CLIP_IMAGES
    images = preprocessing.read_images(directory, config.vision.image_size, defaults)
    if images["image_size"] != config.vision.image_size:
        raise UserError(
            f"{directory} prepares images of {images['image_size']} pixels, but the vision tower in config.json "
            f"reads {config.vision.image_size}."
        )
    processor = preprocessing.make_processor(
        directory,
        source,
        pad=config.language.pad_token,
        context=config.language.context,
        image_token=placeholder,
        image_tokens=config.image_tokens,
        chat="chatml" if "<|im_start|>" in vocab else "vicuna",  # where no chat template is published
        answer_end=language.answer_end(vocab, config.language),
        **images,
    )
    return with_chat_template(processor, directory, framed=True)


def read_placeholder(directory: Path) -> str:
    """The token that stands for an image."""
    path = directory / "processor_config.json"
    return (read_json(path).get("image_token") if path.exists() else None) or "<image>"


def write_processor(processor: Processor, config: LLaVAConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it, beside the tokeniser."""
    kind = "SiglipImageProcessor" if is_siglip(config.vision) else "CLIPImageProcessor"
    images = preprocessing.write_images(processor.config, kind)
    return {
        "preprocessor_config.json": {**images, "processor_class": "LlavaProcessor"},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": processor.config.image_token,
            "patch_size": config.vision.patch_size,
            "num_additional_image_tokens": 0 if is_siglip(config.vision) else 1,
            "vision_feature_select_strategy": strategy(config),
        },
    }
