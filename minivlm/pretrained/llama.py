"""LLaMA as Hugging Face transformers stores it (LlamaForCausalLM: LLaMA, TinyLlama, SmolLM2, Vicuna …), and two that
differ in a field or two: Qwen2 (Qwen2ForCausalLM) and Mistral (MistralForCausalLM)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from minivlm.errors import Note, UserError
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.position import RopeScaling
from minivlm.pretrained import language, preprocessing
from minivlm.pretrained.fields import Known, fields, refuse_unless
from minivlm.pretrained.names import table, under
from minivlm.processor import Processor

model_class = LanguageModel

# ---- names -----------------------------------------------------------------------------------------------------------

BLOCK = table("""
    input_layernorm             attention_norm
    self_attn.q_proj            attention.q_proj
    self_attn.k_proj            attention.k_proj
    self_attn.v_proj            attention.v_proj
    self_attn.o_proj            attention.out_proj
    post_attention_layernorm    mlp_norm
    mlp.gate_proj               mlp.gate_proj
    mlp.up_proj                 mlp.up_proj
    mlp.down_proj               mlp.down_proj
""")

MODEL = table("""
    embed_tokens    token_embedding
    norm            norm
""") + under(BLOCK, "layers.*.", "transformer.blocks.*.")  # fmt: skip

rows = under(MODEL, ("model.", ""), "") + table("lm_head head")


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

FIELDS = fields("""
    vocab_size                  vocab_size      32000
    hidden_size                 width           4096
    intermediate_size           mlp_width       11008
    num_hidden_layers           depth           32
    num_attention_heads         heads           32
    num_key_value_heads         kv_heads        null
    head_dim                    head_width      null
    hidden_act                  activation      "silu"
    max_position_embeddings     context         2048
    rms_norm_eps                norm_eps        1e-6
    tie_word_embeddings         tie_head        false
    attention_bias              -               false
    mlp_bias                    -               false
    eos_token_id                -               2
""")
MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2 = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
KINDS = {"llama": FIELDS, "mistral": FIELDS.but(**MISTRAL), "qwen2": FIELDS.but(**QWEN2)}
TOKENIZERS = {"qwen2": "Qwen2Tokenizer"}  # the others have LLaMA's
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}  # that are written


KNOWN = Known.of(
    *KINDS.values(),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types"),
    *("pretraining_tp", "max_sequence_length", "is_llama_config"),
    rope_interleaved=(False,),
)
known = {"": KNOWN}


def read_config(values: dict[str, Any]) -> LanguageModelConfig:
    """transformers' config.json → ours."""
    kind = values["model_type"]
    v = KINDS[kind].complete(values)
    refuse_unless({**v, **rope_values(v)}, partial_rotary_factor=1.0)
    biases = {"qkv_bias": v["attention_bias"], "out_bias": v["attention_bias"], "mlp_bias": v["mlp_bias"]}
    if kind != "llama":  # they have no such fields
        biases = {"qkv_bias": kind == "qwen2", "out_bias": False, "mlp_bias": False}
    return LanguageModelConfig(
        **{**FIELDS.read(v), "context": context_of(v)},
        positions="none",
        gated_mlp=True,
        norm="rmsnorm",
        **biases,
        **read_rope(v),
        **language.read_special_tokens(v),
    )


def context_of(values: dict[str, Any]) -> int:
    """The longest text. Where attention slides, texts within the window are computed as without one."""
    slides = values["model_type"] == "mistral"
    if values["model_type"] == "qwen2" and values["use_sliding_window"]:
        types = values.get("layer_types")
        full = values["max_window_layers"] >= values["num_hidden_layers"]
        slides = "sliding_attention" in types if types else not full
    window, context = values.get("sliding_window"), values["max_position_embeddings"]
    if not slides or window is None or window >= context:
        return context
    window_note = (
        f"config.json lets a token see the last {window} alone (sliding_window): texts may have up to {window} tokens"
    )
    warnings.warn(f"{window_note}, not {context}.", Note, stacklevel=2)
    return window


def rope_values(values: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling of transformers 4, or rope_parameters of transformers 5."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    return rope.get("full_attention", rope)  # one for each type of layer, of which we have only this


def read_rope(values: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and `rope_values` → our fields."""
    rope = rope_values(values)
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        return {"rope_theta": theta, "rope_scaling": RopeScaling("linear", float(rope["factor"]))}
    if kind != "llama3":
        raise UserError(
            f"config.json asks for rotary positions of the type {kind!r}; there are default, linear and llama3."
        )
    scaling = RopeScaling(
        "llama3",
        float(rope["factor"]),
        low_frequency=float(rope["low_freq_factor"]),
        high_frequency=float(rope["high_freq_factor"]),
        original_context=rope.get("original_max_position_embeddings", values["max_position_embeddings"]),
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_config(config: LanguageModelConfig) -> dict[str, Any]:
    """Ours → transformers' config.json: LLaMA's, or Qwen2's where q, k and v alone have biases."""
    kind = "qwen2" if language.kind_of(config) == "qwen2" else "llama"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **FIELDS.write(config),
        "rope_theta": config.rope_theta,
        "rope_scaling": write_rope_scaling(config.rope_scaling),
        **({"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias} if kind == "llama" else {}),
        **language.write_special_tokens(config),
    }


def write_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """rope_scaling as transformers 4 has it, which transformers 5 reads as well."""
    if scaling is None:
        return None
    values = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values["low_freq_factor"] = scaling.low_frequency
        values["high_freq_factor"] = scaling.high_frequency
        values["original_max_position_embeddings"] = scaling.original_context
    return values


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: LanguageModelConfig) -> Processor:
    # Of vocab.json and merges.txt alone, without tokenizer.json, not all rules would be known.
    source = preprocessing.read_tokenizer(directory, TOKENIZERS.get(values["model_type"], "LlamaTokenizer"))
    return language.read_processor(directory, config, source)
