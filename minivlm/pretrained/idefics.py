"""IDEFICS as Hugging Face transformers stores it (IdeficsForVisionText2Text): HuggingFaceM4/idefics-9b and kin, an open
reproduction of Flamingo (Laurençon et al. 2023, "OBELICS", §5)."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.layers.gated_cross_attention import GatedConfig
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.layers.vit import VisionConfig
from minivlm.models.flamingo import Flamingo, FlamingoConfig
from minivlm.pretrained import hf_clip, language, llama, preprocessing
from minivlm.pretrained.fields import Known, fields
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = Flamingo
PLACEHOLDER, FENCE = "<image>", "<fake_token_around_image>"
TURN_END = "<end_of_utterance>"  # of the instructed models

# ---- names -----------------------------------------------------------------------------------------------------------

RESAMPLER_BLOCK = table("""
    0.context_layer_norm    features_norm
    0.latents_layer_norm    latents_norm
    0.q_layer_norm          attention.q_norm
    0.k_layer_norm          attention.k_norm
    0.q_proj                attention.q_proj
    0.k_proj                attention.k_proj
    0.v_proj                attention.v_proj
    0.output_proj           attention.out_proj
    1.ln                    mlp_norm
    1.fc                    mlp.up_proj
    1.c_proj                mlp.down_proj
""")

RESAMPLER = table("""
    latents         latents
    layer_norm      norm
""") + under(RESAMPLER_BLOCK, "blocks.*.", "blocks.*.")  # fmt: skip

GATED = table("""
    input_layernorm             attention_norm
    cross_attn.q_proj           attention.q_proj
    cross_attn.k_proj           attention.k_proj
    cross_attn.v_proj           attention.v_proj
    cross_attn.o_proj           attention.out_proj
    cross_attn.q_layer_norm     attention.q_norm
    cross_attn.k_layer_norm     attention.k_norm
    post_attention_layernorm    mlp_norm
    mlp.gate_proj               mlp.gate_proj
    mlp.up_proj                 mlp.up_proj
    mlp.down_proj               mlp.down_proj
""")

ADDED = {  # what was added to LLaMA's words is stored apart from them, and joined with them here
    "model.embed_tokens.weight": "model.embed_tokens.additional_embedding.weight",
    "lm_head.weight": "lm_head.additional_fc.weight",
}


def rows(config: FlamingoConfig) -> list[Row]:
    how = "two" if config.gated.gate == "channel" else ""
    gates = table(f"alpha_cross_attn attention_gate {how}") + table(f"alpha_dense mlp_gate {how}")
    return [
        *under(hf_clip.VISION, "model.vision_model.", "vision."),
        *under(RESAMPLER, "model.perceiver_resampler.", "resampler."),
        *under([*GATED, *gates], "model.gated_cross_attn_layers.*.", "gated.*."),
        *under(llama.MODEL, "model.", "language_model."),
        *table("lm_head language_model.head"),
        *[row for added in ADDED.values() for row in table(f"{added} - unread")],
    ]


def prepare(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The file, with the added words behind the others."""
    pairs = {words: added for words, added in ADDED.items() if words in weights and added in weights}
    return ChainMap({words: torch.cat([weights[words], weights[added]]) for words, added in pairs.items()}, weights)


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

FIELDS = llama.FIELDS.but(
    additional_vocab_size=0,
    pad_token_id=0,
    cross_layer_interval=1,
    qk_layer_norms=False,
    use_resampler=False,
    alpha_type="float",
)
VISION_FIELDS = fields("""
    embed_dim               width           768
    intermediate_size       mlp_width       5120
    num_hidden_layers       depth           32
    num_attention_heads     heads           16
    num_channels            -               3
    image_size              image_size      224
    patch_size              patch_size      14
    hidden_act              activation      "gelu"
    layer_norm_eps          norm_eps        1e-5
""")
RESAMPLER_FIELDS = fields("""
    resampler_n_latents         latents         64
    resampler_depth             depth           6
    resampler_n_heads           heads           16
    resampler_head_dim          head_width      96
    qk_layer_norms_perceiver    -               false
""")
GATES = {"float": "scalar", "vector": "channel"}


def known(values: dict[str, Any]) -> dict[str, Known]:
    flat = {*RESAMPLER_FIELDS, *(f"vision_{name}" for name in VISION_FIELDS)}
    whole = Known.of(
        *(llama.KNOWN.fields, FIELDS, flat, "image_token_id", "alpha_initializer", "alphas_initializer_range"),
        *("freeze_text_layers", "freeze_text_module_exceptions", "freeze_lm_head", "freeze_vision_layers"),
        *("freeze_vision_module_exceptions", "vision_model_name", "vision_model_params", "word_embed_proj_dim"),
        "ffn_dim",
        cross_layer_activation_function=("swiglu",),
    )
    vision = Known.of(VISION_FIELDS, "hidden_size", "projection_dim", "vision_model_name", "vision_model_params")
    return {"": whole, "vision_config": vision, "perceiver_config": Known.of(RESAMPLER_FIELDS, "use_resampler")}


def read_config(values: dict[str, Any]) -> FlamingoConfig:
    """transformers' config.json → ours."""
    v = FIELDS.complete(values)
    vision, language_model = read_vision(values), read_language(v)
    if v["alpha_type"] not in GATES:
        raise UserError(f"config.json has alpha_type = {v['alpha_type']!r}; there are {', '.join(GATES)}.")
    if language_model.depth % v["cross_layer_interval"]:
        raise UserError(
            f"config.json has num_hidden_layers = {language_model.depth}, which is no multiple of cross_layer_interval = "
            f"{v['cross_layer_interval']}; the reference cannot run such a model either."
        )
    return FlamingoConfig(
        vision=vision,
        class_token=True,
        vision_norm=False,
        language=language_model,
        image_token=v.get("image_token_id", v["vocab_size"] + 1),  # the first added token frames it
        resampler=read_resampler(values, vision) if v["use_resampler"] else None,
        every=v["cross_layer_interval"],
        gated=GatedConfig(
            norm="rmsnorm",
            norm_eps=v["rms_norm_eps"],
            activation=language_model.activation,
            gated_mlp=True,
            qk_norm="rmsnorm" if v["qk_layer_norms"] else None,
            gate=GATES[v["alpha_type"]],
        ),
    )


def read_language(values: dict[str, Any]) -> LanguageModelConfig:
    config = llama.read_config({**values, "model_type": "llama"})
    return replace(config, vocab_size=values["vocab_size"] + values["additional_vocab_size"])


def read_vision(values: dict[str, Any]) -> VisionConfig:
    """The first files had no vision_config, but fields such as vision_embed_dim."""
    flat = {name: values[f"vision_{name}"] for name in VISION_FIELDS if f"vision_{name}" in values}
    return hf_clip.read_vision(VISION_FIELDS, flat | (values.get("vision_config") or {}))


def read_resampler(values: dict[str, Any], vision: VisionConfig) -> PerceiverConfig:
    flat = {name: values[name] for name in RESAMPLER_FIELDS if name in values}
    v = RESAMPLER_FIELDS.complete(flat | (values.get("perceiver_config") or {}))
    qk_norm = "layernorm" if v["qk_layer_norms_perceiver"] else None
    return PerceiverConfig(**RESAMPLER_FIELDS.read(v), width=vision.width, activation="relu", qk_norm=qk_norm)


def write_config(config: FlamingoConfig) -> dict[str, Any]:
    """Ours → transformers' config.json. All words are in the one table, and none are added."""
    text = llama.write_config(config.language)
    resampler, vision = config.resampler, hf_clip.write_vision(config.vision)
    perceiver = {"use_resampler": resampler is not None}
    if resampler is not None:
        perceiver |= RESAMPLER_FIELDS.write(resampler)
        perceiver["qk_layer_norms_perceiver"] = resampler.qk_norm is not None
    return {
        **text,
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        "additional_vocab_size": 0,
        "image_token_id": config.image_token,
        "cross_layer_interval": config.every,
        "qk_layer_norms": config.gated.qk_norm is not None,
        "alpha_type": next(theirs for theirs, ours in GATES.items() if ours == config.gated.gate),
        "use_resampler": resampler is not None,
        "perceiver_config": perceiver,
        "vision_config": {**vision, "embed_dim": vision["hidden_size"]},
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: FlamingoConfig) -> Processor:
    """IdeficsImageProcessor's images: squashed into a square, CLIP's colours. An image is one placeholder in the text."""
    source = preprocessing.read_tokenizer(directory, "LlamaTokenizer")
    vocab = language.vocabulary(source, directory)
    language.check_vocabulary(vocab, config.language, PLACEHOLDER)
    language.check_placeholder(vocab, PLACEHOLDER, config.image_token, directory, "by its config.json it is")
    _, about = preprocessing.find_images(directory)
    size = about.get("image_size") or config.vision.image_size
    return preprocessing.make_processor(
        directory,
        source,
        pad=config.language.pad_token,
        context=config.language.context,
        image_token=PLACEHOLDER,
        image_tokens=1,
        image_fence=FENCE if FENCE in vocab else None,
        chat="idefics-instruct" if TURN_END in vocab else "idefics",
        **preprocessing.read_images(directory, size, preprocessing.BLIP_IMAGES, more=("image_size",)),
    )


def write_processor(processor: Processor, config: FlamingoConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it, beside the tokeniser."""
    images = preprocessing.write_images(processor.config, "IdeficsImageProcessor")
    size = {"image_size": processor.config.image_size, "image_num_channels": 3}
    return {"preprocessor_config.json": {**images, **size, "processor_class": "IdeficsProcessor"}}
