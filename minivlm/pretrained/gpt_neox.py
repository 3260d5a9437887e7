"""GPT-NeoX as Hugging Face transformers stores it (GPTNeoXForCausalLM): Pythia, RedPajama-INCITE (the language model of
OpenFlamingo-4B), and kin. Black et al. 2022, "GPT-NeoX-20B", §2.1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.pretrained import language, llama, preprocessing
from minivlm.pretrained.fields import Known, fields
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = LanguageModel

# ---- names -----------------------------------------------------------------------------------------------------------

BLOCK = table("""
    input_layernorm                 attention_norm
    attention.query_key_value       attention.{q,k,v}_proj
    attention.dense                 attention.out_proj
    post_attention_layernorm        mlp_norm
    mlp.dense_h_to_4h               mlp.up_proj
    mlp.dense_4h_to_h               mlp.down_proj
""")

MODEL = table("""
    embed_in            token_embedding
    final_layer_norm    norm
""") + under(BLOCK, "layers.*.", "transformer.blocks.*.")  # fmt: skip

ROWS = under(MODEL, ("gpt_neox.", ""), "") + table("embed_out|lm_head head")


def rows(config: LanguageModelConfig) -> list[Row]:
    """q, k and v of a head stand together: (H, 3, K) rows."""
    return [replace(row, heads=config.heads) if row.parts > 1 else row for row in ROWS]


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

FIELDS = fields("""
    vocab_size                  vocab_size          50432
    max_position_embeddings     context             2048
    hidden_size                 width               6144
    intermediate_size           mlp_width           24576
    num_hidden_layers           depth               44
    num_attention_heads         heads               64
    hidden_act                  activation          "gelu"
    layer_norm_eps              norm_eps            1e-5
    use_parallel_residual       parallel_residual   true
    tie_word_embeddings         tie_head            false
    attention_bias              -                   true
    rotary_pct                  -                   0.25
    rotary_emb_base             -                   10000
    eos_token_id                -                   2
""")

KNOWN = Known.of(FIELDS, "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
known = {"": KNOWN}


def read_config(values: dict[str, Any]) -> LanguageModelConfig:
    """transformers' config.json → ours."""
    v = FIELDS.complete(values)
    config = LanguageModelConfig(
        **FIELDS.read(v),
        positions="none",
        **dict.fromkeys(("qkv_bias", "out_bias"), v["attention_bias"]),
        **llama.read_rope({"rope_theta": v["rotary_emb_base"], **v}),
        rotary_fraction=llama.rope_values(v).get("partial_rotary_factor", v["rotary_pct"]),
        **language.read_special_tokens(v),
    )
    if config.rotary_width < 2 or config.rotary_width % 2:
        raise ValueError(f"rotary_pct lets {config.rotary_width} channels of a head turn, which are no pairs")
    return config


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **FIELDS.write(config),
        "attention_bias": config.qkv_bias,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope_theta,
        "rope_theta": config.rope_theta,
        "rope_scaling": llama.write_rope_scaling(config.rope_scaling),
        **language.write_special_tokens(config),
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LanguageModelConfig) -> Processor:
    return language.read_processor(directory, config, preprocessing.read_tokenizer(directory, "GPTNeoXTokenizer"))
