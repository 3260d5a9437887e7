"""T5 as Hugging Face transformers stores it (T5ForConditionalGeneration): t5-small to t5-11b, v1.1, Flan-T5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.layers.t5 import T5, T5Config
from minivlm.pretrained import language, preprocessing
from minivlm.pretrained.fields import Known
from minivlm.pretrained.hf_clip import read_activation, write_activation
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

model_class = T5

# ---- names -----------------------------------------------------------------------------------------------------------

SELF_ATTENTION = table("""
    layer.0.layer_norm          attention_norm
    layer.0.SelfAttention.q     attention.q_proj
    layer.0.SelfAttention.k     attention.k_proj
    layer.0.SelfAttention.v     attention.v_proj
    layer.0.SelfAttention.o     attention.out_proj
""")
CROSS_ATTENTION = table("""
    layer.1.layer_norm          cross_attention_norm
    layer.1.EncDecAttention.q   cross_attention.q_proj
    layer.1.EncDecAttention.k   cross_attention.k_proj
    layer.1.EncDecAttention.v   cross_attention.v_proj
    layer.1.EncDecAttention.o   cross_attention.out_proj
""")
MLP = table("""
    layer_norm          mlp_norm
    DenseReluDense.wi   mlp.up_proj
    DenseReluDense.wo   mlp.down_proj
""")
GATED_MLP = table("""
    layer_norm              mlp_norm
    DenseReluDense.wi_0     mlp.gate_proj
    DenseReluDense.wi_1     mlp.up_proj
    DenseReluDense.wo       mlp.down_proj
""")
# Every stack has its position biases in its first block. What is one tensor may be stored under any of its names.
AROUND = table("""
    shared|encoder.embed_tokens|decoder.embed_tokens                token_embedding
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias   encoder.relative.table
    decoder.block.0.layer.0.SelfAttention.relative_attention_bias   decoder.relative.table
    encoder.final_layer_norm                                        encoder_norm
    decoder.final_layer_norm                                        decoder_norm
    lm_head|shared|encoder.embed_tokens|decoder.embed_tokens        head
""")


def rows(config: T5Config) -> list[Row]:
    mlp = GATED_MLP if config.gated_mlp else MLP
    encoder = [*SELF_ATTENTION, *under(mlp, "layer.1.", "")]
    decoder = [*SELF_ATTENTION, *CROSS_ATTENTION, *under(mlp, "layer.2.", "")]
    return [
        *AROUND,
        *under(encoder, "encoder.block.*.", "encoder.blocks.*."),
        *under(decoder, "decoder.block.*.", "decoder.blocks.*."),
    ]


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "n_positions": 512,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


KNOWN = Known.of(DEFAULTS, "dense_act_fn", "is_gated_act", "scale_decoder_outputs")


def known(values: dict[str, Any]) -> dict[str, Known]:
    return {"": KNOWN}


def read_config(values: dict[str, Any]) -> T5Config:
    """transformers' config.json → ours."""
    v = {**DEFAULTS, **values}
    gated, word = v["feed_forward_proj"].startswith("gated-"), v["feed_forward_proj"].removeprefix("gated-")
    if gated and word == "gelu":
        word = "gelu_new"  # Flan-T5 was trained so; BLIP-2's, with the exact one, says so in dense_act_fn
    return T5Config(
        vocab_size=v["vocab_size"],
        width=v["d_model"],
        depth=v["num_layers"],
        decoder_depth=v["num_decoder_layers"],
        heads=v["num_heads"],
        head_width=v["d_kv"],
        mlp_width=v["d_ff"],
        activation=read_activation(v.get("dense_act_fn", word)),
        gated_mlp=gated,
        norm_eps=v["layer_norm_epsilon"],
        relative_buckets=v["relative_attention_num_buckets"],
        relative_distance=v["relative_attention_max_distance"],
        tie_head=v["tie_word_embeddings"],
        # Up to transformers 4, a tied head is a scaled one; 5 writes which it is.
        scale_head=v.get("scale_decoder_outputs", v["tie_word_embeddings"]),
        context=v["n_positions"],
        start_token=v["decoder_start_token_id"],
        **language.read_special_tokens(v),
    )


def write_config(config: T5Config) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    word = "gelu_new" if config.activation == "gelu_tanh" else write_activation(config.activation)
    scale = {} if config.scale_head == config.tie_head else {"scale_decoder_outputs": config.scale_head}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_width or config.width // config.heads,
        "d_ff": config.encoder.hidden_width,
        "num_layers": config.depth,
        "num_decoder_layers": config.decoder.depth,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": f"gated-{word.removesuffix('_new')}" if config.gated_mlp else word,
        "dense_act_fn": word,
        "n_positions": config.context,
        "tie_word_embeddings": config.tie_head,
        **scale,
        **language.write_special_tokens(config),
        "decoder_start_token_id": config.start_token,
    }


# ---- processor: texts end in </s> ------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: T5Config) -> Processor:
    return language.read_processor(directory, config, read_words(directory))


def read_words(directory: Path) -> Tokenizer | bytes | None:
    return preprocessing.read_tokenizer(directory, "T5Tokenizer")
