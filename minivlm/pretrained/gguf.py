"""A language model of the LLaMA family (LLaMA, Mistral, SmolLM2; Qwen2) in a GGUF file, as llama.cpp reads it.

model.gguf   metadata ─→ the config.json that the same model is published with ─→ llama.py
                      ─→ tokeniser (gguf_tokenizer.py) and chat template
             tensors  ─→ names below; LLaMA's queries and keys in the order of the published ones
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minivlm import pretrained
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.position import RopeScaling
from minivlm.pretrained import language, llama
from minivlm.pretrained.chat_template import with_template
from minivlm.pretrained.fields import refuse_unknown
from minivlm.pretrained.gguf_file import GGUF
from minivlm.pretrained.gguf_tokenizer import named_tokens, read_tokenizer
from minivlm.pretrained.names import table, under
from minivlm.processor import Processor, ProcessorConfig

SUFFIX = ".gguf"

# ---- names -----------------------------------------------------------------------------------------------------------

BLOCK = table("""
    attn_norm       attention_norm
    attn_q          attention.q_proj
    attn_k          attention.k_proj
    attn_v          attention.v_proj
    attn_output     attention.out_proj
    ffn_norm        mlp_norm
    ffn_gate        mlp.gate_proj
    ffn_up          mlp.up_proj
    ffn_down        mlp.down_proj
""")
FREQUENCIES = "rope_freqs.weight"
rows = under(BLOCK, "blk.*.", "transformer.blocks.*.") + table(f"""
    token_embd      token_embedding
    output_norm     norm
    output          head
    {FREQUENCIES}   -                   unread
""")

# ---- metadata → the fields of config.json ----------------------------------------------------------------------------

FIELDS = {  # theirs, below "llama." or "qwen2." → config.json's
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
EPSILON, SCALING, TURNED = "attention.layer_norm_rms_epsilon", "rope.scaling.type", "rope.dimension_count"
NEEDED = ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count", EPSILON)
KNOWN = {*FIELDS, EPSILON, SCALING, TURNED, "rope.scaling.factor", "vocab_size", "attention.value_length"}
WITHOUT_EFFECT = {"rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout"}
PAIRS_NEIGHBOURS = ("llama",)  # architectures whose files pair neighbouring channels for rotary positions


def find(directory: Path) -> Path:
    """The file: `directory` itself, or the only one in it. UserError for several."""
    if directory.is_file():
        return directory
    files = sorted(path for path in directory.iterdir() if path.suffix == SUFFIX)
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4]) + (", …" if files[4:] else "")
        raise UserError(f"{directory} holds {len(files)} GGUF files ({names}): name the one that is meant.")
    return files[0]


def read(directory: Path) -> pretrained.Published:
    """Everything but the tensors, which are at hand. UserError for what cannot be followed exactly."""
    path = find(directory)
    file = GGUF(path)
    kind = file.metadata.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise UserError(
            f"{path} holds a model of the architecture {kind!r}; of GGUF files llama and qwen2 are supported."
        )
    if file.metadata.get("split.count", 1) > 1:
        raise UserError(f"{path} is a part of a model in several files: join them with llama.cpp's gguf-split --merge.")
    values = read_values(file, kind, str(path))
    try:
        config = llama.read_config(values)
        processor = read_processor(file, config, path)
    except pretrained.UNREADABLE as error:
        raise UserError(f"{path} describes no model that can be built ({type(error).__name__}: {error}).") from error
    if kind in PAIRS_NEIGHBOURS:
        file.turned = {"attn_q": config.heads, "attn_k": config.kv_heads or config.heads}
    return pretrained.Published(LanguageModel, config, rows, (path.name,), processor, file=(path, file))


def read_values(file: GGUF, kind: str, where: str) -> dict[str, Any]:
    """The metadata as the fields of config.json."""
    given = {key.removeprefix(f"{kind}."): v for key, v in file.metadata.items() if key.startswith(f"{kind}.")}
    refuse_unknown(given, f"{where}: {kind}", KNOWN | WITHOUT_EFFECT)
    if missing := [f"{kind}.{key}" for key in NEEDED if key not in given]:
        raise UserError(f"{where} lacks {', '.join(missing)}.")
    values = {theirs: given[key] for key, theirs in FIELDS.items() if key in given}
    heads, key = values["num_attention_heads"], given.get("attention.key_length")
    if given.get("attention.value_length", key) != key:
        raise UserError(f"{where} has values of another width than keys, which is not supported.")
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    words, ends = file.names.get("token_embd.weight"), ("eos_token_id", "eot_token_id")
    token = lambda name: file.metadata.get(f"tokenizer.ggml.{name}")
    return {
        **values,
        "model_type": kind,
        "num_key_value_heads": values.get("num_key_value_heads", heads),
        "rms_norm_eps": shortest(given[EPSILON]),
        "rope_theta": shortest(values.get("rope_theta", 10_000.0)),
        "partial_rotary_factor": given.get(TURNED, head_dim) / head_dim,
        "rope_scaling": rope_scaling(file, given, where, head_dim),
        "vocab_size": words.shape[0] if words else given.get("vocab_size"),
        "tie_word_embeddings": "output.weight" not in file,
        "attention_bias": "blk.0.attn_q.bias" in file,
        "mlp_bias": "blk.0.ffn_up.bias" in file,
        "eos_token_id": list(dict.fromkeys(token(end) for end in ends if token(end) is not None)),
        "pad_token_id": token("padding_token_id"),
    }


def shortest(value: float) -> float:
    """1e-05 for the float32 that is closest to it, as config.json has it."""
    return float(f"{value:.7g}")


def rope_scaling(file: GGUF, given: dict[str, Any], where: str, head_dim: int) -> dict[str, Any] | None:
    """rope_scaling of config.json. Of Llama 3.1's a file has the factors alone, by which each frequency is divided."""
    kind = given.get(SCALING, "none")
    if kind not in ("none", "linear"):
        raise UserError(f"{where} has rope.scaling.type = {kind!r}, which is not supported; none and linear are.")
    if kind == "linear":
        return {"rope_type": "linear", "factor": given["rope.scaling.factor"]}
    if FREQUENCIES not in file:
        return None
    factors, pairs = file[FREQUENCIES].float(), torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequency = given.get("rope.freq_base", 10_000.0) ** (-pairs / head_dim)
    scaling = RopeScaling("llama3", factor=factors.max().item())
    if factors.shape != frequency.shape or not torch.allclose(scaling(frequency), frequency / factors, rtol=1e-4):
        raise UserError(
            f"{where} has {FREQUENCIES}, which are not Llama 3.1's: longer contexts of its kind are not supported."
        )
    low, high, context = scaling.low_frequency, scaling.high_frequency, scaling.original_context
    values = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": context}
    return {"rope_type": "llama3", "factor": scaling.factor, **values}


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(file: GGUF, config: LanguageModelConfig, path: Path) -> Processor:
    """For texts alone: tokeniser and chat template out of the metadata."""
    source = read_tokenizer(file.metadata, str(path))
    vocab = language.vocabulary(source, path)
    language.check_vocabulary(vocab, config)
    pad, end = config.pad_token, language.answer_end(vocab, config)
    processor = Processor(source, ProcessorConfig(context=config.context, pad_token=pad, answer_end=end))
    template = file.metadata.get("tokenizer.chat_template")
    return processor if template is None else with_template(processor, template, named_tokens(file.metadata))
