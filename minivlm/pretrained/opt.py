"""OPT as Hugging Face transformers stores it (OPTForCausalLM): opt-125m to opt-66b, and opt-350m's post-norm."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.pretrained import language, preprocessing, tokenizer_config
from minivlm.pretrained.fields import Known
from minivlm.pretrained.hf_clip import read_activation, write_activation
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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

ROWS = under(MODEL, ("model.decoder.", "decoder."), "") + table("lm_head head")


def rows(config: LanguageModelConfig) -> list[Row]:
    return ROWS


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

DEFAULTS = {
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "word_embed_proj_dim": None,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


KNOWN = Known.of(DEFAULTS, "layer_norm_elementwise_affine", learned_embeddings=(True,), scale_embeddings=(False,))


def known(values: dict[str, Any]) -> dict[str, Known]:
    return {"": KNOWN}


def read_config(values: dict[str, Any]) -> LanguageModelConfig:
    """transformers' config.json → ours."""
    v = {**DEFAULTS, **values}
    language.refuse_unless(v, layer_norm_elementwise_affine=True)
    before, narrow = v["do_layer_norm_before"], v["word_embed_proj_dim"]
    return LanguageModelConfig(
        vocab_size=v["vocab_size"],
        context=v["max_position_embeddings"],
        position_offset=2,  # where the padding of fairseq, which trained it, once stood
        width=v["hidden_size"],
        embedding_width=None if narrow == v["hidden_size"] else narrow,
        depth=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        mlp_width=v["ffn_dim"],
        activation=read_activation(v["activation_function"]),
        norm_place="pre" if before else "post",
        final_norm=before and not v["_remove_final_layer_norm"],
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), v["enable_bias"]),
        tie_head=v["tie_word_embeddings"],
        **language.read_special_tokens(v),
    )


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    before = config.norm_place == "pre"
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.embedding_width or config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "ffn_dim": config.hidden_width,
        "activation_function": write_activation(config.activation),
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "enable_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_head,
        **language.write_special_tokens(config),
    }


# ---- processor: texts begin with </s> --------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LanguageModelConfig) -> Processor:
    return language.read_processor(directory, config, read_words(directory))


def read_words(directory: Path) -> Tokenizer | bytes | None:
    about = tokenizer_config.read_about(directory)
    start = "</s>" if about.get("add_bos_token", True) else None
    how = {"start": start, "prefix_space": bool(about.get("add_prefix_space"))}
    build = partial(preprocessing.byte_level_tokenizer, special=["<pad>", "</s>"], **how)
    return preprocessing.read_tokenizer(directory, "GPT2Tokenizer", build)
