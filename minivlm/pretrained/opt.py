"""OPT as Hugging Face transformers stores it (OPTForCausalLM): opt-125m to opt-66b, and opt-350m's post-norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.pretrained import language, preprocessing
from minivlm.pretrained.fields import Known, fields, refuse_unless
from minivlm.pretrained.names import table, under
from minivlm.processor import Processor

model_class = LanguageModel

# ---- names -----------------------------------------------------------------------------------------------------------

BLOCK = table("""
    self_attn_layer_norm    attention_norm
    self_attn.q_proj        attention.q_proj
    self_attn.k_proj        attention.k_proj
    self_attn.v_proj        attention.v_proj
    self_attn.out_proj      attention.out_proj
    final_layer_norm        mlp_norm
    fc1                     mlp.up_proj
    fc2                     mlp.down_proj
""")

MODEL = table("""
    embed_tokens        token_embedding
    embed_positions     position_embedding
    project_in          project_in
    project_out         project_out
    final_layer_norm    norm
""") + under(BLOCK, "layers.*.", "transformer.blocks.*.")  # fmt: skip

rows = under(MODEL, ("model.decoder.", "decoder."), "") + table("lm_head head")


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

FIELDS = fields("""
    vocab_size                  vocab_size      50272
    max_position_embeddings     context         2048
    hidden_size                 width           768
    num_hidden_layers           depth           12
    num_attention_heads         heads           12
    ffn_dim                     mlp_width       3072
    activation_function         activation      "relu"
    tie_word_embeddings         tie_head        true
    word_embed_proj_dim         -               null
    do_layer_norm_before        -               true
    _remove_final_layer_norm    -               false
    enable_bias                 -               true
    pad_token_id                -               1
    eos_token_id                -               2
""")

KNOWN = Known.of(FIELDS, "layer_norm_elementwise_affine", learned_embeddings=(True,), scale_embeddings=(False,))
known = {"": KNOWN}


def read_config(values: dict[str, Any]) -> LanguageModelConfig:
    """transformers' config.json → ours."""
    v = FIELDS.complete(values)
    refuse_unless(v, layer_norm_elementwise_affine=True)
    before, narrow = v["do_layer_norm_before"], v["word_embed_proj_dim"]
    return LanguageModelConfig(
        **FIELDS.read(v),
        position_offset=2,  # where the padding of fairseq, which trained it, once stood
        embedding_width=None if narrow == v["hidden_size"] else narrow,
        norm_place="pre" if before else "post",
        final_norm=before and not v["_remove_final_layer_norm"],
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), v["enable_bias"]),
        **language.read_special_tokens(v),
    )


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    before = config.norm_place == "pre"
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        **FIELDS.write(config),
        "word_embed_proj_dim": config.embedding_width or config.width,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "enable_bias": config.qkv_bias,
        **language.write_special_tokens(config),
    }


# ---- processor: texts begin with </s> --------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LanguageModelConfig) -> Processor:
    return language.read_processor(directory, config, read_tokenizer(directory))


def read_tokenizer(directory: Path) -> bytes | None:
    return preprocessing.read_tokenizer(directory, "GPT2Tokenizer", special=["<pad>", "</s>"], adds_bos=True)
