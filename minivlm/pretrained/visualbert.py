"""VisualBERT as Hugging Face transformers stores it (VisualBertForQuestionAnswering …): uclanlp/visualbert-vqa and kin.

There is no vision tower in these files: regions and their features are those of a detector. Where no
tokeniser is beside the weights, bert-base-uncased's tokenizer.json or vocab.txt belongs there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.models.visualbert import VisualBERT, VisualBERTConfig
from minivlm.pretrained import bert, language, preprocessing
from minivlm.pretrained.fields import Known, refuse_unless
from minivlm.pretrained.names import table, under
from minivlm.processor import Processor

model_class = VisualBERT

REGIONS = table("""
    embeddings.visual_projection                regions.projection
    embeddings.visual_position_embeddings       regions.position_embedding
    embeddings.visual_token_type_embeddings     regions.type_embedding
    pooler.dense                                pooler
""")

rows = [
    *under(REGIONS, ("visual_bert.", ""), ""),
    *under([row for row in bert.MODEL if row.how != "unread"], ("visual_bert.", ""), "bert."),
    *table("""
        cls.predictions.transform.dense                     word_head.dense
        cls.predictions.bias|cls.predictions.decoder.bias   word_bias
        cls.seq_relationship                                match_head          flip
        cls                                                 answer_head
        cls.predictions.decoder.weight                      -                   unread
    """),
    *bert.norm("cls.predictions.transform.LayerNorm", "word_head.norm"),
]
EMBEDDING, DECODER = "visual_bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"

FIELDS = bert.FIELDS.but(visual_embedding_dim=512)
ANSWERING, PRETRAINING, ALONE = "VisualBertForQuestionAnswering", "VisualBertForPreTraining", "VisualBertModel"


known = {"": bert.KNOWN | Known.of(FIELDS, "bypass_transformer", "special_visual_initialize")}


def read_config(values: dict[str, Any]) -> VisualBERTConfig:
    """transformers' config.json → ours."""
    v = FIELDS.complete(values)
    refuse_unless(v, bypass_transformer=False)
    [architecture] = v.get("architectures") or [ALONE]
    if architecture not in (ANSWERING, PRETRAINING, ALONE):
        raise UserError(
            f"config.json asks for a {architecture}; of VisualBERT there are {ANSWERING}, {PRETRAINING} and {ALONE}."
        )
    answers, pretraining = (), architecture == PRETRAINING
    if architecture == ANSWERING:
        named = v.get("id2label") or {i: f"LABEL_{i}" for i in range(v.get("num_labels", 2))}
        answers = tuple(named[i] for i in sorted(named, key=int))
    heads = {"heads": ("words", "matching"), "word_bias": True} if pretraining else {}
    return VisualBERTConfig(text=bert.read_config(v), region_width=v["visual_embedding_dim"], answers=answers, **heads)


def prepare(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The file. UserError for a decoder that is not the word embedding."""
    if EMBEDDING in weights and DECODER in weights and not torch.equal(weights[EMBEDDING], weights[DECODER]):
        raise UserError(f"{DECODER} is not {EMBEDDING}, but a table of its own, which is not supported.")
    return weights


def write_config(config: VisualBERTConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    answers = config.answers
    return {
        **bert.write_config(config.text),
        "architectures": [ANSWERING if answers else PRETRAINING if config.heads else ALONE],
        "model_type": "visual_bert",
        "visual_embedding_dim": config.region_width,
        "id2label": {str(i): answer for i, answer in enumerate(answers)},
        "label2id": {answer: i for i, answer in enumerate(answers)},
    }


def read_processor(directory: Path, values: dict[str, Any], config: VisualBERTConfig) -> Processor:
    """For texts alone. The pad_token_id of published configs is wrong, and read by no one."""
    source = preprocessing.read_tokenizer(directory, "BertTokenizer")
    language.check_vocabulary(language.vocabulary(source, directory), config.text)
    return preprocessing.make_processor(directory, source, pad=0, context=config.text.context)
