"""BERT as Hugging Face transformers stores it (BertModel, BertForMaskedLM …): bert-base-uncased and kin.

The heads of its pre-training and the pooler are not read: what is taken over is the encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.layers.bert import BERT, BERTConfig
from minivlm.pretrained import preprocessing
from minivlm.pretrained.fields import Known, fields, refuse_unless
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = BERT

# ---- names: files of 2018 call a norm's weight and bias gamma and beta -------------------------------------------------


def norm(theirs: str, ours: str) -> list[Row]:
    return table(f"""
        {theirs}.weight|{theirs}.gamma  {ours}.weight
        {theirs}.bias|{theirs}.beta     {ours}.bias
    """)


BLOCK = [
    *table("""
        attention.self.query        attention.q_proj
        attention.self.key          attention.k_proj
        attention.self.value        attention.v_proj
        attention.output.dense      attention.out_proj
        intermediate.dense          mlp.up_proj
        output.dense                mlp.down_proj
    """),
    *norm("attention.output.LayerNorm", "attention_norm"),
    *norm("output.LayerNorm", "mlp_norm"),
]

MODEL = [
    *table("""
        embeddings.word_embeddings          token_embedding
        embeddings.position_embeddings      position_embedding
        embeddings.token_type_embeddings    type_embedding
        pooler                              -                   unread
    """),
    *norm("embeddings.LayerNorm", "norm"),
    *under(BLOCK, "encoder.layer.*.", "transformer.blocks.*."),
]

rows = under(MODEL, ("bert.", ""), "") + table("cls|classifier|qa_outputs - unread")


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

FIELDS = fields("""
    vocab_size                  vocab_size      30522
    max_position_embeddings     context         512
    type_vocab_size             token_types     2
    hidden_size                 width           768
    num_hidden_layers           depth           12
    num_attention_heads         heads           12
    intermediate_size           mlp_width       3072
    hidden_act                  activation      "gelu"
    layer_norm_eps              norm_eps        1e-12
""")

KNOWN = Known.of(
    *(FIELDS, "position_embedding_type", "directionality", "pooler_fc_size", "pooler_num_attention_heads"),
    *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
)
known = {"": KNOWN}


def read_config(values: dict[str, Any]) -> BERTConfig:
    """transformers' config.json → ours."""
    refuse_unless(values, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return BERTConfig(**FIELDS.read(values))


def write_config(config: BERTConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    return {"architectures": ["BertModel"], "model_type": "bert", **FIELDS.write(config)}


# ---- processor: [CLS] text [SEP] ---------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: BERTConfig) -> Processor:
    source = preprocessing.read_tokenizer(directory, "BertTokenizer")
    return preprocessing.make_processor(directory, source, pad=values.get("pad_token_id", 0), context=config.context)
