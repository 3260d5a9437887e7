"""MPT as Hugging Face transformers stores it (MptForCausalLM: mosaicml/mpt-7b), and as its forerunner MosaicGPT did
(anas-awadalla/mpt-1b-redpajama-200b, the language model of OpenFlamingo-3B)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.pretrained import language, preprocessing
from minivlm.pretrained.fields import Known, fields, refuse_unless
from minivlm.pretrained.names import table, under
from minivlm.processor import Processor

model_class = LanguageModel

# ---- names: MPT's, MosaicGPT's ---------------------------------------------------------------------------------------

BLOCK = table("""
    norm_1|ln_1                     attention_norm
    attn.Wqkv                       attention.{q,k,v}_proj
    attn.q_ln                       attention.q_norm
    attn.k_ln                       attention.k_norm
    attn.out_proj                   attention.out_proj
    norm_2|ln_2                     mlp_norm
    ffn.up_proj|mlp.mlp_up          mlp.up_proj
    ffn.down_proj|mlp.mlp_down      mlp.down_proj
""")

MODEL = table("""
    wte             token_embedding
    norm_f|ln_f     norm
""") + under(BLOCK, "blocks.*.", "transformer.blocks.*.")  # fmt: skip

rows = under(MODEL, "transformer.", "") + table("lm_head head")


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

# The last two are MosaicGPT's; in MPT the MLPs always have four times the width.
FIELDS = fields("""
    vocab_size              vocab_size      50368
    max_seq_len             context         2048
    d_model                 width           2048
    n_layers                depth           24
    n_heads                 heads           16
    layer_norm_epsilon      norm_eps        1e-5
    mlp_ratio               -               4
    attn_qk_ln              -               false
""")

ATTENTION = Known.of(
    *("attn_type", "attn_impl", "alibi", "alibi_bias_max", "clip_qkv", "softmax_scale", "prefix_lm", "qk_ln"),
    *("attn_uses_sequence_id", "rope_impl", "rope_theta", "rope_dail_config", "rope_hf_config"),
    sliding_window_size=(-1,),
)
KNOWN = Known.of(  # MPT's and MosaicGPT's; expansion_ratio and learned_pos_emb are read by neither
    *(FIELDS, ATTENTION.fields, "attn_clip_qkv", "logit_scale", "no_bias", "hidden_size", "expansion_ratio"),
    *("learned_pos_emb", "init_device", "init_config", "verbose", "tokenizer_name", "low_precision_layernorm"),
    *("fan_mode", "init_div_is_residual", "init_gain", "init_nonlinearity", "param_init_fn", "emb_init_std"),
    *("emb_init_uniform_lim", "attn_uses_sequence_id", "name", "fc_type", "use_pad_tok_in_ffn"),
    embedding_fraction=(1, 1.0),
    norm_type=("low_precision_layernorm", "layernorm"),
)


known = {"": KNOWN, "attn_config": ATTENTION, "ffn_config": Known.of(ffn_type=("mptmlp",))}


def read_config(values: dict[str, Any]) -> LanguageModelConfig:
    """transformers' config.json, or MosaicGPT's, → ours."""
    v = FIELDS.complete(values)
    mosaic = values.get("model_type") == "mosaic_gpt"
    attention = v if mosaic else values.get("attn_config") or {}
    refuse_unless(v, no_bias=True, logit_scale=None)
    refuse_unless(attention, alibi=True, alibi_bias_max=8, softmax_scale=None, clip_qkv=None, attn_clip_qkv=None)
    refuse_unless(attention, attn_type="multihead_attention", prefix_lm=False, qk_ln=False)
    return LanguageModelConfig(
        **FIELDS.read(v),
        positions="none",
        alibi=True,
        mlp_width=v["d_model"] * (v["mlp_ratio"] if mosaic else 4),
        norm_bias=False,
        qk_norm="wide_layernorm" if mosaic and v["attn_qk_ln"] else None,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False),
        tie_head=True,
        **language.read_special_tokens(v),
    )


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        **FIELDS.write(config),
        "no_bias": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8},
        "tie_word_embeddings": True,
        **language.write_special_tokens(config),
    }


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LanguageModelConfig) -> Processor:
    return language.read_processor(directory, config, preprocessing.read_tokenizer(directory, "GPTNeoXTokenizer"))
