"""BLIP-2 as Hugging Face transformers stores it (Blip2ForConditionalGeneration): blip2-opt-2.7b, blip2-flan-t5-xl and kin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.layers.qformer import QFormerConfig
from minivlm.layers.t5 import T5Config
from minivlm.layers.vit import VisionConfig
from minivlm.models.blip2 import BLIP2, BLIP2Config
from minivlm.pretrained import hf_clip, language, opt, preprocessing, t5
from minivlm.pretrained.fields import Known, fields, refuse_unless
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = BLIP2

# ---- names -----------------------------------------------------------------------------------------------------------

VISION = [
    *table("""
        embeddings.class_embedding      class_embedding     two
        embeddings.position_embedding   position_embedding  one
        embeddings.patch_embedding      patch_embedding
        post_layernorm                  norm
    """),
    *under(
        table("""
            layer_norm1             attention_norm
            self_attn.qkv           attention.{q,k,v}_proj
            self_attn.projection    attention.out_proj
            layer_norm2             mlp_norm
            mlp.fc1                 mlp.up_proj
            mlp.fc2                 mlp.down_proj
        """),
        "encoder.layers.*.",
        "transformer.blocks.*.",
    ),
]

QFORMER_BLOCK = table("""
    attention.attention.query       attention.q_proj
    attention.attention.key         attention.k_proj
    attention.attention.value       attention.v_proj
    attention.output.dense          attention.out_proj
    attention.output.LayerNorm      attention_norm
    crossattention.attention.query  cross_attention.q_proj
    crossattention.attention.key    cross_attention.k_proj
    crossattention.attention.value  cross_attention.v_proj
    crossattention.output.dense     cross_attention.out_proj
    crossattention.output.LayerNorm cross_attention_norm
    intermediate_query.dense        query_mlp.up_proj
    output_query.dense              query_mlp.down_proj
    output_query.LayerNorm          query_mlp_norm
    intermediate.dense              mlp.up_proj
    output.dense                    mlp.down_proj
    output.LayerNorm                mlp_norm
""")

VISION_FEATURES = [
    *under(VISION, ("vision_model.", "model.vision_model."), "vision."),
    *under(QFORMER_BLOCK, "qformer.encoder.layer.*.", "qformer.blocks.*."),
    *table("""
        query_tokens        qformer.queries     one
        qformer.layernorm   qformer.norm
    """),
]


def rows(config: BLIP2Config) -> list[Row]:
    text = t5.rows(config.language) if isinstance(config.language, T5Config) else opt.rows
    return [
        *VISION_FEATURES,
        *table("language_projection projection"),
        *under(text, "language_model.", "language_model."),
    ]


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

VISION_FIELDS = hf_clip.VISION_FIELDS.but(
    hidden_size=1408,
    intermediate_size=6144,
    num_hidden_layers=39,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    qkv_bias=True,
)
QFORMER_FIELDS = fields("""
    vocab_size                      -                           30522
    hidden_size                     width                       768
    num_hidden_layers               depth                       12
    num_attention_heads             heads                       12
    intermediate_size               mlp_width                   3072
    hidden_act                      activation                  "gelu"
    max_position_embeddings         context                     512
    layer_norm_eps                  norm_eps                    1e-12
    cross_attention_frequency       cross_attention_every       2
    encoder_hidden_size             context_width               1408
""")

WHOLE_KNOWN = Known.of(
    *("num_query_tokens", "image_text_hidden_size", "image_token_index", "image_token_id"),
    "use_decoder_only_language_model",
)
VISION_FEATURES_KNOWN = {
    "vision_config": Known.of(VISION_FIELDS, "projection_dim"),
    "qformer_config": Known.of(
        QFORMER_FIELDS, "position_embedding_type", "use_qformer_text_input", "qformer_text_input"
    ),
}


def known(values: dict[str, Any]) -> dict[str, Known]:
    text = t5.KNOWN if (values.get("text_config") or {}).get("model_type") == "t5" else opt.KNOWN
    return {"": WHOLE_KNOWN, **VISION_FEATURES_KNOWN, "text_config": text}


def read_config(values: dict[str, Any]) -> BLIP2Config:
    """transformers' config.json → ours."""
    return BLIP2Config(
        **read_vision_features(values, text=False),
        language=read_language(values),
        image_token=values.get("image_token_index", values.get("image_token_id")),
    )


def read_vision_features(values: dict[str, Any], *, text: bool) -> dict[str, Any]:
    """The fields that both stages' configs have. text: does the Q-Former read it?"""
    vision, qformer = values.get("vision_config") or {}, values.get("qformer_config") or {}
    refuse_unless(vision, qkv_bias=True)
    refuse_unless(qformer, position_embedding_type="absolute")
    return {
        "vision": hf_clip.read_vision(VISION_FIELDS, vision, embedding_norm=False, patch_bias=True),
        "qformer": QFormerConfig(
            **QFORMER_FIELDS.read(qformer),
            queries=values.get("num_query_tokens", 32),
            vocab_size=QFORMER_FIELDS.complete(qformer)["vocab_size"] if text else None,
        ),
    }


def read_language(values: dict[str, Any]) -> LanguageModelConfig | T5Config:
    text = values.get("text_config") or {}
    kinds = {"opt": opt, "t5": t5}
    if (kind := text.get("model_type", "opt")) not in kinds:
        raise UserError(
            f"config.json asks for a language model of type {kind!r}; supported in a BLIP-2 are opt and t5."
        )
    outer = {k: values[k] for k in ("eos_token_id", "pad_token_id") if values.get(k) is not None}
    return kinds[kind].read_config({**text, **outer})


def write_config(config: BLIP2Config) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    decoder = isinstance(config.language, LanguageModelConfig)
    text = opt.write_config(config.language) if decoder else t5.write_config(config.language)
    placeholder = {} if config.image_token is None else {"image_token_index": config.image_token}
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        **write_vision_features(config),
        **placeholder,
        "use_decoder_only_language_model": decoder,
        "tie_word_embeddings": config.language.tie_head,
        "text_config": text,
    }


def write_vision_features(config: BLIP2Config) -> dict[str, Any]:
    """The fields of transformers' config for the vision tower and the Q-Former, of either stage."""
    if not isinstance(config.vision, VisionConfig):
        kind = type(config.vision).__name__.removesuffix("Config")
        raise UserError(f"transformers' BLIP-2 cannot express a {kind} tower; save without layout='hf'.")
    q = config.qformer
    return {
        "num_query_tokens": q.queries,
        "vision_config": {"model_type": "blip_2_vision_model", **hf_clip.write_vision(config.vision), "qkv_bias": True},
        "qformer_config": {
            "model_type": "blip_2_qformer",
            **QFORMER_FIELDS.write(q),
            **({} if q.vocab_size is None else {"vocab_size": q.vocab_size}),
        },
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: BLIP2Config) -> Processor:
    """The processor. `<image>` in a text becomes a placeholder for every query; without an image token it is text."""
    source = t5.read_tokenizer(directory) if isinstance(config.language, T5Config) else opt.read_tokenizer(directory)
    vocab = language.vocabulary(source, directory)
    spelt = {id: token for token, id in vocab.items()}
    language.check_vocabulary(vocab, config.language, spelt.get(config.image_token))
    return preprocessing.make_processor(
        directory,
        source,
        pad=config.language.pad_token,
        context=config.language.context,
        image_token=spelt.get(config.image_token, "<image>"),
        image_tokens=0 if config.image_token is None else config.image_tokens,
        chat="blip2",
        **read_images(directory, config.vision),
    )


def read_images(directory: Path, vision: VisionConfig) -> dict[str, Any]:
    """BlipImageProcessor's: squashed into a square, CLIP's colours."""
    return preprocessing.read_images(directory, vision.image_size, preprocessing.BLIP_IMAGES)


def write_processor(processor: Processor, config: BLIP2Config) -> dict[str, dict[str, Any]]:
    """File name → what is in it, beside the tokeniser."""
    about = {"processor_class": "Blip2Processor", "num_query_tokens": config.qformer.queries}
    images = preprocessing.write_images(processor.config, "BlipImageProcessor")
    return {"preprocessor_config.json": {**images, **about}, "processor_config.json": about}
