"""GPT-NeoX as Hugging Face transformers stores it (GPTNeoXForCausalLM): Pythia, RedPajama-INCITE (the language model of
OpenFlamingo-4B), and kin. Black et al. 2022, "GPT-NeoX-20B", §2.1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.pretrained import language, llama, preprocessing
from minivlm.pretrained.fields import Known
from minivlm.pretrained.hf_clip import read_activation, write_activation
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

DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


KNOWN = Known.of(DEFAULTS, "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def known(values: dict[str, Any]) -> dict[str, Known]:
    return {"": KNOWN}


def read_config(values: dict[str, Any]) -> LanguageModelConfig:
    """transformers' config.json → ours."""
    v = {**DEFAULTS, **values}
    config = LanguageModelConfig(
        vocab_size=v["vocab_size"],
        context=v["max_position_embeddings"],
        positions="none",
        width=v["hidden_size"],
        depth=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        mlp_width=v["intermediate_size"],
        activation=read_activation(v["hidden_act"]),
        norm_eps=v["layer_norm_eps"],
        **dict.fromkeys(("qkv_bias", "out_bias"), v["attention_bias"]),
        **llama.read_rope({"rope_theta": v["rotary_emb_base"], **v}),
        rotary_fraction=llama.rope_values(v).get("partial_rotary_factor", v["rotary_pct"]),
        parallel_residual=v["use_parallel_residual"],
        tie_head=v["tie_word_embeddings"],
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
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "hidden_act": write_activation(config.activation),
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rope_theta,
        "rope_theta": config.rope_theta,
        "rope_scaling": llama.write_rope_scaling(config.rope_scaling),
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_head,
        **language.write_special_tokens(config),
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LanguageModelConfig) -> Processor:
    return language.read_processor(directory, config, preprocessing.read_tokenizer(directory, "GPTNeoXTokenizer"))
