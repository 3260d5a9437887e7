"""BERT as Hugging Face transformers stores it (BertModel, BertForMaskedLM …): bert-base-uncased and kin.

The heads of its pre-training and the pooler are not read: what is taken over is the encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.layers.bert import BERT, BERTConfig
from minivlm.pretrained import language, preprocessing
from minivlm.pretrained.fields import Known
from minivlm.pretrained.hf_clip import read_activation, write_activation
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor, ProcessorConfig

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

ROWS = under(MODEL, ("bert.", ""), "") + table("cls|classifier|qa_outputs - unread")


def rows(config: BERTConfig) -> list[Row]:
    return ROWS


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


KNOWN = Known.of(
    *(DEFAULTS, "position_embedding_type", "directionality", "pooler_fc_size", "pooler_num_attention_heads"),
    *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
)


def known(values: dict[str, Any]) -> dict[str, Known]:
    return {"": KNOWN}


def read_config(values: dict[str, Any]) -> BERTConfig:
    """transformers' config.json → ours."""
    v = {**DEFAULTS, **values}
    language.refuse_unless(v, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return BERTConfig(
        vocab_size=v["vocab_size"],
        context=v["max_position_embeddings"],
        token_types=v["type_vocab_size"],
        width=v["hidden_size"],
        depth=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        mlp_width=v["intermediate_size"],
        activation=read_activation(v["hidden_act"]),
        norm_eps=v["layer_norm_eps"],
    )


def write_config(config: BERTConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "type_vocab_size": config.token_types,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden_width,
        "hidden_act": write_activation(config.activation),
        "layer_norm_eps": config.norm_eps,
    }


# ---- processor: [CLS] text [SEP] ---------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: BERTConfig) -> Processor:
    source = preprocessing.read_tokenizer(directory, "BertTokenizer")
    pad = preprocessing.read_pad_token(directory, values.get("pad_token_id", 0))
    return Processor(source, ProcessorConfig(context=config.context, pad_token=pad))
