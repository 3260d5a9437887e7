"""GPT-2 as Hugging Face transformers stores it (GPT2LMHeadModel): gpt2 to gpt2-xl, distilgpt2, DialoGPT."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.pretrained import language, preprocessing, tokenizer_config
from minivlm.pretrained.fields import Known
from minivlm.pretrained.hf_clip import read_activation, write_activation
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = LanguageModel

# ---- names: the published file of 2019 has them without "transformer." -----------------------------------------------

BLOCK = table("""
    ln_1            attention_norm
    attn.c_attn     attention.{q,k,v}_proj      transpose
    attn.c_proj     attention.out_proj          transpose
    ln_2            mlp_norm
    mlp.c_fc        mlp.up_proj                 transpose
    mlp.c_proj      mlp.down_proj               transpose
""")

MODEL = table("""
    wte     token_embedding
    wpe     position_embedding
    ln_f    norm
""") + under(BLOCK, "h.*.", "transformer.blocks.*.")  # fmt: skip

ROWS = under(MODEL, ("transformer.", ""), "") + table("lm_head head")


def rows(config: LanguageModelConfig) -> list[Row]:
    return ROWS


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
}


KNOWN = Known.of(
    *(DEFAULTS, "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "n_ctx", "reorder_and_upcast_attn"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
)


def known(values: dict[str, Any]) -> dict[str, Known]:
    return {"": KNOWN}


def read_config(values: dict[str, Any]) -> LanguageModelConfig:
    """transformers' config.json → ours."""
    v = {**DEFAULTS, **values}
    language.refuse_unless(v, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return LanguageModelConfig(
        vocab_size=v["vocab_size"],
        context=v["n_positions"],
        width=v["n_embd"],
        depth=v["n_layer"],
        heads=v["n_head"],
        mlp_width=v["n_inner"],
        activation=read_activation(v["activation_function"]),
        norm_eps=v["layer_norm_epsilon"],
        tie_head=v["tie_word_embeddings"],
        **language.read_special_tokens(v),
    )


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "activation_function": write_activation(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_head,
        **language.write_special_tokens(config),
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LanguageModelConfig) -> Processor:
    about = tokenizer_config.read_about(directory)
    start = tokenizer_config.spelt(about, "bos_token", "<|endoftext|>") if about.get("add_bos_token") else None
    how = {"start": start, "prefix_space": bool(about.get("add_prefix_space"))}
    build = partial(preprocessing.byte_level_tokenizer, special=["<|endoftext|>"], **how)
    source = preprocessing.read_tokenizer(directory, "GPT2Tokenizer", build)
    return language.read_processor(directory, config, source)
