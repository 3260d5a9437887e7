"""T5 as Hugging Face transformers stores it (T5ForConditionalGeneration): t5-small to t5-11b, v1.1, Flan-T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.layers.t5 import T5, T5Config
from minivlm.pretrained import language, preprocessing
from minivlm.pretrained.fields import Known, fields, read_activation, write_activation
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

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

FIELDS = fields("""
    vocab_size                          vocab_size          32128
    d_model                             width               512
    d_kv                                head_width          64
    d_ff                                mlp_width           2048
    num_layers                          depth               6
    num_decoder_layers                  decoder_depth       null
    num_heads                           heads               8
    relative_attention_num_buckets      relative_buckets    32
    relative_attention_max_distance     relative_distance   128
    layer_norm_epsilon                  norm_eps            1e-6
    n_positions                         context             512
    tie_word_embeddings                 tie_head            true
    decoder_start_token_id              start_token         0
    feed_forward_proj                   -                   "relu"
    eos_token_id                        -                   1
    pad_token_id                        -                   0
""")

KNOWN = Known.of(FIELDS, "dense_act_fn", "is_gated_act", "scale_decoder_outputs")
known = {"": KNOWN}


def read_config(values: dict[str, Any]) -> T5Config:
    """transformers' config.json → ours."""
    v = FIELDS.complete(values)
    gated, word = v["feed_forward_proj"].startswith("gated-"), v["feed_forward_proj"].removeprefix("gated-")
    if gated and word == "gelu":
        word = "gelu_new"  # Flan-T5 was trained so; BLIP-2's, with the exact one, says so in dense_act_fn
    return T5Config(
        **FIELDS.read(v),
        activation=read_activation(v.get("dense_act_fn", word)),
        gated_mlp=gated,
        # Up to transformers 4, a tied head is a scaled one; 5 writes which it is.
        scale_head=v.get("scale_decoder_outputs", v["tie_word_embeddings"]),
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
        **FIELDS.write(config),
        "feed_forward_proj": f"gated-{word.removesuffix('_new')}" if config.gated_mlp else word,
        "dense_act_fn": word,
        **scale,
        **language.write_special_tokens(config),
    }


# ---- processor: texts end in </s> ------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: T5Config) -> Processor:
    return language.read_processor(directory, config, read_tokenizer(directory))


def read_tokenizer(directory: Path) -> bytes | None:
    return preprocessing.read_tokenizer(directory, "T5Tokenizer")
