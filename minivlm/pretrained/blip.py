"""BLIP as Hugging Face transformers stores it, by its use: BlipForConditionalGeneration (blip-image-captioning-base and kin),
BlipForQuestionAnswering (blip-vqa-base), BlipForImageTextRetrieval (blip-itm-base-coco).

Each holds the roles that it needs, as copies that share nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.layers.bert import BERTConfig
from minivlm.layers.resnet import ResNetConfig
from minivlm.models.blip import BLIP, BLIPConfig
from minivlm.pretrained import bert, blip2, hf_clip, language, preprocessing
from minivlm.pretrained.fields import Known, fields, refuse_unless
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = BLIP

# ---- names -----------------------------------------------------------------------------------------------------------

TEXT_BLOCK = table("""
    crossattention.self.query       cross_attention.q_proj
    crossattention.self.key         cross_attention.k_proj
    crossattention.self.value       cross_attention.v_proj
    crossattention.output.dense     cross_attention.out_proj
    crossattention.output.LayerNorm cross_attention_norm
""")
TEXT = [*bert.MODEL, *under(TEXT_BLOCK, "encoder.layer.*.", "transformer.blocks.*.")]
HEAD = table("""
    transform.dense             text_head.dense
    transform.LayerNorm         text_head.norm
    decoder.weight              head.weight
    bias|decoder.bias           head.bias
""")

VISION = under(blip2.VISION, "vision_model.", "vision.")
ENCODER = under(TEXT, "text_encoder.", "encoder.")
DECODER = [*under(TEXT, "text_decoder.bert.", "decoder."), *under(HEAD, "text_decoder.cls.predictions.", "")]
COMPARING = table("""
    vision_proj     vision_projection
    text_proj       text_projection
    itm_head        match_head
""")
ROWS = {
    "match": [*VISION, *ENCODER, *COMPARING],
    "caption": [*VISION, *DECODER],
    "answer": [*VISION, *ENCODER, *DECODER],
}


def rows(config: BLIPConfig) -> list[Row]:
    return ROWS[config.roles]


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

ROLES = {
    "BlipForConditionalGeneration": "caption",
    "BlipForQuestionAnswering": "answer",
    "BlipForImageTextRetrieval": "match",
}
VISION_FIELDS = hf_clip.VISION_FIELDS.but(image_size=384, patch_size=16, hidden_act="gelu")
TEXT_FIELDS = fields("""
    vocab_size                  vocab_size      30524
    hidden_size                 width           768
    num_hidden_layers           depth           12
    num_attention_heads         heads           8
    intermediate_size           mlp_width       3072
    hidden_act                  activation      "gelu"
    max_position_embeddings     context         512
    layer_norm_eps              norm_eps        1e-12
    bos_token_id                -               30522
    sep_token_id                -               102
    pad_token_id                -               0
""")


known = hf_clip.of_towers(
    Known.of(TEXT_FIELDS, "projection_dim", "encoder_hidden_size"),
    Known.of(VISION_FIELDS, "projection_dim"),
    Known.of("projection_dim", "image_text_hidden_size", tie_word_embeddings=(True,)),
)


def read_config(values: dict[str, Any]) -> BLIPConfig:
    """transformers' config.json → ours."""
    [architecture] = values.get("architectures") or [None]
    if architecture not in ROLES:
        raise UserError(f"config.json asks for a {architecture}; of BLIP there are {', '.join(ROLES)}.")
    text = TEXT_FIELDS.complete(hf_clip.part(values, "text_config"))
    vision = hf_clip.read_vision(
        VISION_FIELDS, hf_clip.part(values, "vision_config"), embedding_norm=False, patch_bias=True
    )
    refuse_unless(text, is_decoder=True)  # else its blocks have no cross-attention
    return BLIPConfig(
        vision=vision,
        text=BERTConfig(
            **TEXT_FIELDS.read(text),
            token_types=0,
            cross_attention_every=1,
            context_width=vision.width,  # transformers sets encoder_hidden_size to it
        ),
        roles=ROLES[architecture],
        embed_width=values.get("image_text_hidden_size", 256),
        temperature=None,
        decode_token=text["bos_token_id"],
        end_token=text["sep_token_id"],
        pad_token=text["pad_token_id"],
        attend_padding=ROLES[architecture] == "answer",
    )


def write_config(config: BLIPConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    if config.roles == "all":
        raise UserError("transformers has no BLIP of all roles at once, but one for each; save without layout='hf'.")
    if isinstance(config.vision, ResNetConfig):
        raise UserError("transformers' BLIP cannot express a ResNet tower; save without layout='hf'.")
    text = config.text
    return {
        "architectures": [name for name, roles in ROLES.items() if roles == config.roles],
        "model_type": "blip",
        "image_text_hidden_size": config.embed_width,
        "vision_config": {"model_type": "blip_vision_model", **hf_clip.write_vision(config.vision)},
        "text_config": {
            "model_type": "blip_text_model",
            **TEXT_FIELDS.write(text),
            "encoder_hidden_size": text.context_width or text.width,
            "is_decoder": True,
            "bos_token_id": config.decode_token,
            "sep_token_id": config.end_token,
            "pad_token_id": config.pad_token,
        },
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: BLIPConfig) -> Processor:
    """[CLS] text [SEP]; what is said begins with [DEC] instead, which some tokenisers do not have."""
    source = preprocessing.read_tokenizer(directory, "BertTokenizer")
    language.check_vocabulary(language.vocabulary(source, directory), config.text)
    images = blip2.read_images(directory, config.vision)
    text = {"context": config.text.context, "chat": "encoder"}
    return preprocessing.make_processor(directory, source, pad=config.pad_token, **text, **images)


def write_processor(processor: Processor, config: BLIPConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it, beside the tokeniser."""
    images = preprocessing.write_images(processor.config, "BlipImageProcessor")
    return {"preprocessor_config.json": {**images, "processor_class": "BlipProcessor"}}
