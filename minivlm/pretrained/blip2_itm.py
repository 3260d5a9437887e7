"""Stage 1 of BLIP-2 as Hugging Face transformers stores it (Blip2ForImageTextRetrieval): blip2-itm-vit-g and kin.

These files have neither the head that generates nor a temperature: they compare and match.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.models.blip2_stage1 import BLIP2Stage1, BLIP2Stage1Config
from minivlm.pretrained import blip2, language, preprocessing
from minivlm.pretrained.fields import Known
from minivlm.pretrained.names import table
from minivlm.processor import Processor

model_class = BLIP2Stage1

rows = blip2.VISION_FEATURES + table("""
    embeddings.word_embeddings      qformer.token_embedding
    embeddings.position_embeddings  qformer.position_embedding
    vision_projection               vision_projection
    text_projection                 text_projection
    itm_head                        match_head
""")

# The tokens of bert-base-uncased; [DEC] was added to them.
CLS, SEP = 101, 102


known = {
    **blip2.VISION_FEATURES_KNOWN,
    "": blip2.WHOLE_KNOWN | Known.of("text_config"),
}  # the language model is not read


def read_config(values: dict[str, Any]) -> BLIP2Stage1Config:
    """transformers' config.json → ours."""
    features = blip2.read_vision_features(values, text=True)
    return BLIP2Stage1Config(
        **features,
        embed_width=values.get("image_text_hidden_size", 256),
        temperature=None,
        text_head=False,
        start_token=CLS,
        decode_token=features["qformer"].vocab_size - 1,
        end_token=SEP,
    )


def write_config(config: BLIP2Stage1Config) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    values = blip2.write_vision_features(config)
    values["qformer_config"]["use_qformer_text_input"] = True
    return {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "image_text_hidden_size": config.embed_width,
        **values,
        "text_config": {"model_type": "opt"},
    }


def read_processor(directory: Path, values: dict[str, Any], config: BLIP2Stage1Config) -> Processor:
    source = preprocessing.read_tokenizer(directory, "BertTokenizer")
    language.check_vocabulary(language.vocabulary(source, directory), config.qformer)
    images, context = blip2.read_images(directory, config.vision), config.qformer.context
    return preprocessing.make_processor(directory, source, pad=config.pad_token, context=context, **images)


write_processor = blip2.write_processor
