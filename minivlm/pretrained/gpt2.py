"""GPT-2 as Hugging Face transformers stores it (GPT2LMHeadModel): gpt2 to gpt2-xl, distilgpt2, DialoGPT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.pretrained import language, preprocessing
from minivlm.pretrained.fields import Known, fields, refuse_unless
from minivlm.pretrained.names import table, under
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

rows = under(MODEL, ("transformer.", ""), "") + table("lm_head head")


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

FIELDS = fields("""
    vocab_size              vocab_size      50257
    n_positions             context         1024
    n_embd                  width           768
    n_layer                 depth           12
    n_head                  heads           12
    n_inner                 mlp_width       null
    activation_function     activation      "gelu_new"
    layer_norm_epsilon      norm_eps        1e-5
    tie_word_embeddings     tie_head        true
    eos_token_id            -               50256
""")

KNOWN = Known.of(
    *(FIELDS, "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "n_ctx", "reorder_and_upcast_attn"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
)
known = {"": KNOWN}


def read_config(values: dict[str, Any]) -> LanguageModelConfig:
    """transformers' config.json → ours."""
    v = FIELDS.complete(values)
    refuse_unless(v, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return LanguageModelConfig(**FIELDS.read(v), **language.read_special_tokens(v))


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **FIELDS.write(config),
        "n_inner": config.mlp_width,
        **language.write_special_tokens(config),
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LanguageModelConfig) -> Processor:
    source = preprocessing.read_tokenizer(directory, "GPT2Tokenizer", special=["<|endoftext|>"])
    return language.read_processor(directory, config, source)
